#!/usr/bin/env bash
# Ways to reduce tokens at equal operations, on garments among clutter, on a CPU too: a dense teacher, then every way
# from it at two budgets, beside a smaller dense model. Which patches hold the garment is known (docs/method.md).
#
#   bash scripts/selection/clutter.sh [flags of main.py for all trainings]
#
#   EPOCHS_DENSE   epochs of the teacher
#   STEPS          training steps of each student
#   KEEP           budgets: share of the tokens that is left, separated by spaces
#   SEEDS          seeds, separated by spaces
#   METHODS        as of compare.py, separated by spaces
#   SMALLER        --model-kwargs of the smaller dense model; empty for none
#   JOBS           trainings at a time
#   OUTPUT         folder of the runs and of the table (default: output/selection/clutter in the repository)
#   FASHION_MNIST  folder of Fashion-MNIST (default: that of Debian's dataset-fashion-mnist)
#
# Started again, it goes on where it was interrupted.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
OUTPUT="${OUTPUT:-$ROOT/output/selection/clutter}"
EPOCHS_DENSE="${EPOCHS_DENSE:-6}"
STEPS="${STEPS:-1000}"
SMALLER="${SMALLER-embed_dim=32}"
JOBS="${JOBS:-2}"
read -ra KEEP <<<"${KEEP:-0.5 0.2}"
read -ra SEEDS <<<"${SEEDS:-0 1 2 3 4}"
read -ra METHODS <<<"${METHODS:-static random paper inplace distilled prune+merge distilled+merge}"

CLUTTER_RECIPE=(
  --data-set CLUTTER --input-size 56 --model vim_micro --model-kwargs patch_size=8 depth=6 d_state=4
  --batch-size 64 --unscale-lr --sched-on-updates --weight-decay 0.05
  --crop-padding 0 --hflip 0.5 --aa none --color-jitter 0 --reprob 0 --no-repeated-aug --mixup 0 --cutmix 0
  --smoothing 0.1 --no-model-ema --num-workers 0
)
if [[ -n ${FASHION_MNIST:-} ]]; then
  CLUTTER_RECIPE+=(--data-path "$FASHION_MNIST")
fi
COMPARED=(--methods "${METHODS[@]}")
# R-MeeTo's merging before every second layer of so shallow a model cannot reach these budgets.
COMPARED+=(--method merge-early "--reduction merge --pruning-layers 1 2")
if [[ -n $SMALLER ]]; then
  COMPARED+=(--smaller "$SMALLER")
fi

PYTHON="$(bash "$ROOT/scripts/setup.sh" | tail -n 1)"

"$PYTHON" "$ROOT/main.py" --method dense "${CLUTTER_RECIPE[@]}" --epochs "$EPOCHS_DENSE" --warmup-epochs 1 --lr 2e-3 \
  --throughput-seconds 0 --resume auto --output_dir "$OUTPUT/dense" "$@"

exec "$PYTHON" "$ROOT/compare.py" --dense-path "$OUTPUT/dense/best_checkpoint.pth" --output_dir "$OUTPUT/compare" \
  "${COMPARED[@]}" --keep "${KEEP[@]}" --seeds "${SEEDS[@]}" --jobs "$JOBS" -- "${CLUTTER_RECIPE[@]}" \
  --pruning-layers 2 --epoch-steps "$STEPS" --epochs 1 --warmup-epochs 0 --lr 1e-3 "$@"
