# Sourced by the recipes of segmentation: what ../common.sh has, and the published schedule.
#
#   DATA_PATH      folder of ADE20K (ADEChallengeData2016), with images/ and annotations/
#   MODEL_PATH     checkpoint to start from: a classifier on ImageNet-1K, whose layers are taken over, or, for the
#                  DyVM recipes, a dense segmenter, which is then the teacher too
#
# shellcheck shell=bash
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# An "epoch" is 1,000 steps, after which the validation images are evaluated. Learning rates are those of the published
# batch, 32 images a step (16 for dyvm-vim-t): with another number of GPUs give --batch-size or --accum-steps so that it
# stays, or another --lr. Batch norm is over all processes.
# shellcheck disable=SC2034
ADE20K_RECIPE=(
  --data-set ADE20K --input-size 512 --decoder upernet --aux-weight 0.4
  --epoch-steps 1000 --sched poly --poly-power 1 --sched-on-updates --warmup-epochs 1.5 --min-lr 0
  --opt adamw --unscale-lr --drop-path 0.1 --no-model-ema --amp off
)

# train_segmenter FLAGS_OF_MAIN...
train_segmenter() {
  require_path MODEL_PATH "the checkpoint to start from"
  require_path DATA_PATH "the folder of ADE20K, with images/ and annotations/"
  launch --data-path "$DATA_PATH" --model-path "$MODEL_PATH" --output_dir "${OUTPUT:-$ROOT/output/$NAME}" \
    "${ADE20K_RECIPE[@]}" "$@"
}
