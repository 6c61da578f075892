#!/usr/bin/env bash
# The method from end to end on a CPU, on scikit-learn's digits: a dense teacher, a DyVM student trained from it, the
# two side by side, the student at other budgets, one whose tokens are chosen by what matters to the teacher, and a
# report of it all.
#
#   bash scripts/demo.sh [flags of main.py for all trainings]
#   EPOCHS_DENSE=10 EPOCHS_DYVM=6 bash scripts/demo.sh    # half as long
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/help.sh"
# The demo replaces its earlier run in its own folder, but not what lies in a folder that OUTPUT names.
[[ -n ${OUTPUT:-} ]] || set -- --overwrite "$@"
OUTPUT="${OUTPUT:-$ROOT/output/demo}"
EPOCHS_DENSE="${EPOCHS_DENSE:-20}"
EPOCHS_DYVM="${EPOCHS_DYVM:-14}"
LR_DENSE="${LR_DENSE:-2e-3}"
LR_DYVM="${LR_DYVM:-1.5e-3}"
TOKEN_KEEP_RATIO="${TOKEN_KEEP_RATIO:-0.7}"
BLOCK_KEEP_RATIO="${BLOCK_KEEP_RATIO:-0.8}"

# Small images and a short run want less augmentation than ImageNet: shifts of up to 3 pixels and label smoothing.
DIGITS_RECIPE=(
  --data-set DIGITS --batch-size 64 --unscale-lr --sched-on-updates --weight-decay 0.05
  --model-ema-decay 0.98 --crop-padding 3 --hflip 0 --aa none --color-jitter 0 --reprob 0
  --no-repeated-aug --mixup 0 --cutmix 0 --smoothing 0.1 --throughput-seconds 0
)

# 3 epochs of warm-up, or half of a short run
warmup() {
  echo $(($1 / 2 < 3 ? $1 / 2 : 3))
}

step() {
  printf '\n== %s\n' "$*" >&2
}

PYTHON="$(bash "$ROOT/scripts/setup.sh" | tail -n 1)"
SECONDS=0

step "1/6 dense vim_micro, $EPOCHS_DENSE epochs"
"$PYTHON" "$ROOT/main.py" --method dense --model vim_micro \
  --epochs "$EPOCHS_DENSE" --warmup-epochs "$(warmup "$EPOCHS_DENSE")" --lr "$LR_DENSE" \
  "${DIGITS_RECIPE[@]}" --output_dir "$OUTPUT/dense" "$@"

# A student named $1 with the further flags $2 ...
student() {
  "$PYTHON" "$ROOT/main.py" --method dyvm --model dyvm_vim_micro --model-path "$OUTPUT/dense/best_checkpoint.pth" \
    --epochs "$EPOCHS_DYVM" --warmup-epochs "$(warmup "$EPOCHS_DYVM")" --lr "$LR_DYVM" \
    --token-keep-ratio "$TOKEN_KEEP_RATIO" --block-keep-ratio "$BLOCK_KEEP_RATIO" \
    --token-pruning-weight 10 --block-pruning-weight 10 \
    "${DIGITS_RECIPE[@]}" --output_dir "$OUTPUT/$1" "${@:2}"
}

step "2/6 DyVM from it, $EPOCHS_DYVM epochs: $TOKEN_KEEP_RATIO of the tokens a stage, $BLOCK_KEEP_RATIO of the scans"
student dyvm "$@"

step "3/6 budgets: the student at other token keep ratios"
"$PYTHON" "$ROOT/main.py" --eval --sweep 0.5:1.0:0.1 --model-path "$OUTPUT/dyvm/best_checkpoint.pth" \
  --dense-path "$OUTPUT/dense/best_checkpoint.pth" --output_dir "$OUTPUT/dyvm" --throughput-seconds 4

step "4/6 evaluation: dense against DyVM"
"$PYTHON" "$ROOT/main.py" --eval --model-path "$OUTPUT/dyvm/best_checkpoint.pth" \
  --dense-path "$OUTPUT/dense/best_checkpoint.pth" --output_dir "$OUTPUT/dyvm"

step "5/6 the same budgets, but the tokens are chosen by what matters to the teacher (docs/method.md)"
student distilled --token-strategy distilled "$@"

step "6/6 report"
"$PYTHON" "$ROOT/report.py" "$OUTPUT/dyvm" "$OUTPUT/distilled" --output "$OUTPUT/report.html"

step "the demo took $((SECONDS / 60)) min $((SECONDS % 60)) s"
echo "report:   $OUTPUT/report.html"
echo "pictures: $OUTPUT/dyvm/kept_patches.png, $OUTPUT/distilled/kept_patches.png"
echo "curves:   $PYTHON -m tensorboard.main --logdir $OUTPUT"
