#!/usr/bin/env bash
# The method from end to end on a CPU, on scikit-learn's digits: a dense teacher, a DyVM student trained from it, and
# the two side by side.
#
#   bash scripts/demo.sh [flags of main.py for both trainings]
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
OUTPUT="${OUTPUT:-$ROOT/output/demo}"
EPOCHS_DENSE="${EPOCHS_DENSE:-30}"
EPOCHS_DYVM="${EPOCHS_DYVM:-15}"
LR_DENSE="${LR_DENSE:-2e-3}"
LR_DYVM="${LR_DYVM:-5e-4}"
TOKEN_KEEP_RATIO="${TOKEN_KEEP_RATIO:-0.7}"
BLOCK_KEEP_RATIO="${BLOCK_KEEP_RATIO:-0.8}"

# Small images and a short run want less augmentation than ImageNet: shifts of up to 3 pixels and label smoothing.
DIGITS_RECIPE=(
  --data-set DIGITS --batch-size 64 --unscale-lr --sched onecycle --weight-decay 0.05 --model-ema-decay 0.99
  --crop-padding 3 --hflip 0 --aa none --color-jitter 0 --reprob 0 --no-repeated-aug
  --mixup 0 --cutmix 0 --smoothing 0.1
)

step() {
  printf '\n== %s\n' "$*" >&2
}

PYTHON="$(bash "$ROOT/scripts/setup.sh" | tail -n 1)"
SECONDS=0

step "1/3 dense vim_micro, $EPOCHS_DENSE epochs"
"$PYTHON" "$ROOT/main.py" --method dense --model vim_micro --epochs "$EPOCHS_DENSE" --lr "$LR_DENSE" \
  "${DIGITS_RECIPE[@]}" --output_dir "$OUTPUT/dense" "$@"

step "2/3 DyVM from it, $EPOCHS_DYVM epochs: $TOKEN_KEEP_RATIO of the tokens a stage, $BLOCK_KEEP_RATIO of the scans"
"$PYTHON" "$ROOT/main.py" --method dyvm --model dyvm_vim_micro --model-path "$OUTPUT/dense/best_checkpoint.pth" \
  --epochs "$EPOCHS_DYVM" --lr "$LR_DYVM" \
  --token-keep-ratio "$TOKEN_KEEP_RATIO" --block-keep-ratio "$BLOCK_KEEP_RATIO" \
  --token-pruning-weight 10 --block-pruning-weight 10 \
  "${DIGITS_RECIPE[@]}" --output_dir "$OUTPUT/dyvm" "$@"

step "3/3 evaluation"
"$PYTHON" "$ROOT/main.py" --eval --model-path "$OUTPUT/dyvm/best_checkpoint.pth" \
  --dense-path "$OUTPUT/dense/best_checkpoint.pth" --data-set DIGITS --output_dir "$OUTPUT/dyvm"

step "the demo took $((SECONDS / 60)) min $((SECONDS % 60)) s"
"$PYTHON" - "$OUTPUT/dyvm/eval.json" <<'TABLE'
import json
import sys

from tabulate import tabulate

with open(sys.argv[1]) as file:
    report = json.load(file)
dense, dynamic, reduction = report["dense"], report["dynamic"], report["reduction"]
rows = [["top-1 %", f"{dense['top1']:.2f}", f"{dynamic['top1']:.2f}", f"{dynamic['top1'] - dense['top1']:+.2f}"]]
for convention in ("paper", "exact"):
    counts = [f"{part['flops'][convention] / 1e6:.2f}" for part in (dense, dynamic)]
    rows.append([f"MFLOPs ({convention})", *counts, f"{-100 * reduction[convention]:+.1f} %"])
speeds = [f"{part['images_per_s']:.0f}" for part in (dense, dynamic)]
rows.append(["images/s", *speeds, f"x {report['speedup']:.2f}"])
print(tabulate(rows, headers=[f"{report['data_set']}, {report['device']}", "dense", "DyVM", ""],
               disable_numparse=True, colalign=("left", "right", "right", "right")))
TABLE
echo
for picture in "$OUTPUT"/dyvm/*.png; do
  [[ ! -f $picture ]] || echo "picture: $picture"
done
echo "curves:  tensorboard --logdir $OUTPUT"
