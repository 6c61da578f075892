#!/usr/bin/env bash
# Ways to reduce tokens at equal operations, on a CPU too: a dense teacher of small images, then every way from it
# (docs/method.md).
#
#   bash scripts/selection/compare.sh clutter|fmnist|fmnist-56|digits [flags of main.py for all trainings]
#
#   clutter     garments among cuts of others, 56 pixels: which patches hold the garment is known
#   fmnist      Fashion-MNIST as it is, 28 pixels
#   fmnist-56   the same, enlarged to 56
#   digits      scikit-learn's handwritten digits, 32 pixels
#
#   EPOCHS_DENSE   epochs of the teacher
#   STEPS          training steps of each student
#   KEEP           budgets: share of the tokens that is left, separated by spaces
#   SEEDS          seeds, separated by spaces
#   METHODS        as of compare.py, separated by spaces
#   SMALLER        --model-kwargs of smaller dense models, separated by semicolons; empty for none
#   JOBS           trainings at a time
#   OUTPUT         folder of the runs and of the table (default: output/selection/NAME in the repository)
#   FASHION_MNIST  folder of Fashion-MNIST (default: that of Debian's dataset-fashion-mnist)
#
# Started again, it goes on where it was interrupted.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
NAME="${1:-}"
RECIPE=(
  --model vim_micro --batch-size 64 --unscale-lr --sched-on-updates --weight-decay 0.05
  --aa none --color-jitter 0 --reprob 0 --no-repeated-aug --mixup 0 --cutmix 0
  --smoothing 0.1 --no-model-ema --num-workers 0
)
case "$NAME" in
  clutter)
    EPOCHS_DENSE="${EPOCHS_DENSE:-6}"
    RECIPE+=(--data-set CLUTTER --input-size 56 --model-kwargs patch_size=8 depth=6 d_state=4)
    RECIPE+=(--crop-padding 0 --hflip 0.5)
    ;;
  fmnist)
    EPOCHS_DENSE="${EPOCHS_DENSE:-6}"
    RECIPE+=(--data-set FMNIST --input-size 28 --model-kwargs patch_size=4 depth=6 d_state=4)
    RECIPE+=(--crop-padding 2 --hflip 0.5)
    ;;
  fmnist-56)
    EPOCHS_DENSE="${EPOCHS_DENSE:-6}"
    RECIPE+=(--data-set FMNIST --input-size 56 --whole-images --model-kwargs patch_size=8 depth=6 d_state=4)
    RECIPE+=(--hflip 0.5)
    ;;
  digits)
    EPOCHS_DENSE="${EPOCHS_DENSE:-40}"
    RECIPE+=(--data-set DIGITS --input-size 32 --model-kwargs patch_size=4 depth=6 d_state=4)
    RECIPE+=(--crop-padding 3 --hflip 0)
    ;;
  *)
    echo "which comparison? bash scripts/selection/compare.sh clutter|fmnist|fmnist-56|digits, not '$NAME'" >&2
    exit 2
    ;;
esac
shift
OUTPUT="${OUTPUT:-$ROOT/output/selection/$NAME}"
STEPS="${STEPS:-1000}"
JOBS="${JOBS:-2}"
read -ra KEEP <<<"${KEEP:-0.5 0.2}"
read -ra SEEDS <<<"${SEEDS:-0 1 2 3 4}"
read -ra METHODS <<<"${METHODS:-static random paper inplace distilled prune+merge distilled+merge}"
IFS=';' read -ra SMALLER <<<"${SMALLER-depth=4;depth=3}"
if [[ -n ${FASHION_MNIST:-} && $NAME != digits ]]; then
  RECIPE+=(--data-path "$FASHION_MNIST")
fi
COMPARED=(--methods "${METHODS[@]}")
# R-MeeTo's merging before every second layer of so shallow a model cannot reach these budgets.
COMPARED+=(--method merge-early "--reduction merge --pruning-layers 1 2")
COMPARED+=(--method distilled-3 "--token-strategy distilled --pruning-layers 1 2 3")
for smaller in "${SMALLER[@]}"; do
  COMPARED+=(--smaller "$smaller" --smaller-seeds 1) # one training each, as of the teacher
done

PYTHON="$(bash "$ROOT/scripts/setup.sh" | tail -n 1)"

"$PYTHON" "$ROOT/main.py" --method dense "${RECIPE[@]}" --epochs "$EPOCHS_DENSE" --warmup-epochs 1 --lr 2e-3 \
  --throughput-seconds 0 --resume auto --output_dir "$OUTPUT/dense" "$@"

exec "$PYTHON" "$ROOT/compare.py" --dense-path "$OUTPUT/dense/best_checkpoint.pth" --output_dir "$OUTPUT/compare" \
  "${COMPARED[@]}" --keep "${KEEP[@]}" --seeds "${SEEDS[@]}" --jobs "$JOBS" -- "${RECIPE[@]}" \
  --pruning-layers 2 --epoch-steps "$STEPS" --epochs 1 --warmup-epochs 0 --lr 1e-3 "$@"
