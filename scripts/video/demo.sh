#!/usr/bin/env bash
# Video from end to end on a CPU: clips of garments in motion, whose label is the direction; a dense model, its dynamic
# student, the two side by side, the same with shuffled frames, and a report.
#
#   bash scripts/video/demo.sh [flags of main.py for both trainings]
#
# Fashion-MNIST: the Debian package dataset-fashion-mnist, or FASHION_MNIST=/folder/with/its/idx/files.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$ROOT/scripts/help.sh"
# The demo replaces its earlier run in its own folder, but not what lies in a folder that OUTPUT names.
[[ -n ${OUTPUT:-} ]] || set -- --overwrite "$@"
OUTPUT="${OUTPUT:-$ROOT/output/video-demo}"
CLIPS="${CLIPS:-$ROOT/output/clips}"
TRAIN="${TRAIN:-3000}"
VAL="${VAL:-400}"
EPOCHS_DENSE="${EPOCHS_DENSE:-12}"
EPOCHS_DYVM="${EPOCHS_DYVM:-6}"
LR_DENSE="${LR_DENSE:-2e-3}"
LR_DYVM="${LR_DYVM:-2e-3}"
TOKEN_KEEP_RATIO="${TOKEN_KEEP_RATIO:-0.62}"
BLOCK_KEEP_RATIO="${BLOCK_KEEP_RATIO:-0.8}"

# 8 frames of 48 pixels: 72 patches of 16. A flip would change the label.
CLIPS_RECIPE=(
  --data-set VIDEO_FOLDER --data-path "$CLIPS" --input-size 48 --num-frames 8
  --batch-size 32 --unscale-lr --sched-on-updates --warmup-epochs 1 --weight-decay 0.05 --model-ema-decay 0.98
  --hflip 0 --aa none --crop-area 0.5 1 --reprob 0 --mixup 0 --cutmix 0 --smoothing 0.1 --clip-grad 5
  --throughput-seconds 0
)

step() {
  printf '\n== %s\n' "$*" >&2
}

PYTHON="$(bash "$ROOT/scripts/setup.sh" | tail -n 1)"
SECONDS=0

if [[ ! -f $CLIPS/classes.txt ]]; then # written last
  step "1/6 $TRAIN + $VAL clips of 24 frames"
  "$PYTHON" "$ROOT/scripts/video/clips.py" --output "$CLIPS" --train "$TRAIN" --val "$VAL" \
    ${FASHION_MNIST:+--data-path "$FASHION_MNIST"}
fi

step "2/6 dense videomamba_micro, $EPOCHS_DENSE epochs"
"$PYTHON" "$ROOT/main.py" --method dense --model videomamba_micro --epochs "$EPOCHS_DENSE" --lr "$LR_DENSE" \
  "${CLIPS_RECIPE[@]}" --output_dir "$OUTPUT/dense" "$@"

step "3/6 its dynamic student, $EPOCHS_DYVM epochs: $TOKEN_KEEP_RATIO of the tokens a stage, $BLOCK_KEEP_RATIO of the scans"
"$PYTHON" "$ROOT/main.py" --method dyvm --model dyvm_videomamba_micro \
  --model-path "$OUTPUT/dense/best_checkpoint.pth" --epochs "$EPOCHS_DYVM" --lr "$LR_DYVM" \
  --token-keep-ratio "$TOKEN_KEEP_RATIO" --block-keep-ratio "$BLOCK_KEEP_RATIO" \
  "${CLIPS_RECIPE[@]}" --output_dir "$OUTPUT/dyvm" "$@"

evaluate() {
  "$PYTHON" "$ROOT/main.py" --eval --model-path "$OUTPUT/dyvm/best_checkpoint.pth" \
    --dense-path "$OUTPUT/dense/best_checkpoint.pth" "$@"
}

step "4/6 evaluation: dense against dynamic"
evaluate --output_dir "$OUTPUT/dyvm"

step "5/6 the same with the frames of each clip in a random order"
evaluate --eval-shuffle-frames --throughput-seconds 0 --output_dir "$OUTPUT/shuffled"

step "6/6 report"
"$PYTHON" "$ROOT/report.py" "$OUTPUT/dyvm"

step "the demo took $((SECONDS / 60)) min $((SECONDS % 60)) s"
echo "report:   $OUTPUT/dyvm/report.html"
echo "pictures: $OUTPUT/dyvm/decisions"
