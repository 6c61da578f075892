# Sourced by the recipes of video: what ../common.sh has, and the published schedule.
#
#   DATA_PATH      folder with train.csv and val.csv; where the videos lie elsewhere, add --prefix FOLDER
#   MODEL_PATH     checkpoint to start from: the image classifier of the same size (ImageNet-1K) for the dense models;
#                  for the DyVM recipes the dense model of clips, which is the teacher too
#
# shellcheck shell=bash
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# What all recipes share: 8 frames of 224 pixels (--num-frames 16 and so on for more), two augmented clips of each video,
# bfloat16. --lr is that of 512 clips and scaled by those of a step; --min-lr and --warmup-lr are not scaled: they are
# those of the published 1,024 clips, 64 videos on each of 8 GPUs. With fewer GPUs or less memory give --batch-size and
# --accum-steps so that it stays, or --grad-checkpointing.
# shellcheck disable=SC2034
CLIPS_RECIPE=(
  --input-size 224 --num-frames 8 --tubelet-size 1 --num-sample 2 --hflip 0.5
  --sched cosine --sched-on-updates --warmup-epochs 5 --opt adamw --no-model-ema --amp bf16
  --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1
)
# Kinetics-400 is tested with 4 clips of 3 crops, Something-Something V2 with 2; between epochs one view is looked at.
# shellcheck disable=SC2034
K400_RECIPE=("${CLIPS_RECIPE[@]}" --data-set K400 --eval-segments 4 --eval-crops 3)
# shellcheck disable=SC2034
SSV2_RECIPE=("${CLIPS_RECIPE[@]}" --data-set SSV2 --frame-sampling parts --hflip 0 --eval-segments 2 --eval-crops 3)

# The published scripts name a layer decay of 0.75 that acts on the patch and position embeddings alone, where it leaves
# a thousandth of the learning rate or less; it is left out here.
# shellcheck disable=SC2034
TINY=(--drop-path 0.1 --weight-decay 0.1 --aa rand-m5-n2-mstd0.25-inc1)
# shellcheck disable=SC2034
SMALL=(--drop-path 0.35 --weight-decay 0.05 --aa rand-m7-n4-mstd0.5-inc1)
# shellcheck disable=SC2034
MIDDLE=(--drop-path 0.8 --weight-decay 0.05 --aa rand-m7-n4-mstd0.5-inc1)

# fine_tune FLAGS_OF_MAIN...: a dense model of clips from one of images.
fine_tune() {
  require_path MODEL_PATH "the checkpoint of the image model"
  _launch --method dense --min-lr 4e-6 --warmup-lr 4e-6 "$@"
}

# teach FLAGS_OF_MAIN...: a DyVM student from its dense teacher, with the paper's schedule of images.
teach() {
  require_path MODEL_PATH "the checkpoint of the dense model of clips"
  _launch --method dyvm --drop-path 0 --weight-decay 1e-8 --min-lr 1e-6 --warmup-lr 1e-5 \
    --token-pruning-weight 10 --block-pruning-weight 10 "$@"
}

_launch() {
  require_path DATA_PATH "the folder with train.csv and val.csv"
  launch --data-path "$DATA_PATH" --model-path "$MODEL_PATH" --output_dir "${OUTPUT:-$ROOT/output/$NAME}" "$@"
}
