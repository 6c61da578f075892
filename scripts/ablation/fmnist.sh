#!/usr/bin/env bash
# All ablations on Fashion-MNIST, on a CPU too: a dense teacher of about a million parameters, then every variant from
# it for three seeds.
#
#   bash scripts/ablation/fmnist.sh [flags of main.py for all trainings]
#
#   EPOCHS_DENSE, EPOCHS   epochs of the teacher and of each variant
#   SUBSET                 training images, of 60,000
#   SEEDS                  seeds, separated by spaces
#   JOBS                   trainings at a time
#   TOKEN_KEEP_RATIO, BLOCK_KEEP_RATIO   budgets of the variants
#   OUTPUT                 folder of the runs and of the table (default: output/ablation/fmnist in the repository)
#
# Started again, it goes on where it was interrupted.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
OUTPUT="${OUTPUT:-$ROOT/output/ablation/fmnist}"
EPOCHS_DENSE="${EPOCHS_DENSE:-12}"
EPOCHS="${EPOCHS:-4}"
SUBSET="${SUBSET:-10000}"
JOBS="${JOBS:-2}"
TOKEN_KEEP_RATIO="${TOKEN_KEEP_RATIO:-0.6}"
BLOCK_KEEP_RATIO="${BLOCK_KEEP_RATIO:-0.8}"
read -ra SEEDS <<<"${SEEDS:-0 1 2}"

FMNIST_RECIPE=(
  --data-set FMNIST --subset "$SUBSET" --input-size 28
  --model vim_micro --model-kwargs embed_dim=128 depth=8 patch_size=8 stride=5
  --batch-size 64 --unscale-lr --sched-on-updates --weight-decay 0.05
  --crop-padding 2 --hflip 0.5 --aa none --color-jitter 0 --reprob 0 --no-repeated-aug --mixup 0 --cutmix 0
  --smoothing 0.1 --no-model-ema --num-workers 0
)

PYTHON="$(bash "$ROOT/scripts/setup.sh" | tail -n 1)"

"$PYTHON" "$ROOT/main.py" --method dense "${FMNIST_RECIPE[@]}" --epochs "$EPOCHS_DENSE" --warmup-epochs 1 --lr 2e-3 \
  --throughput-seconds 0 --resume auto --output_dir "$OUTPUT/dense" "$@"

exec "$PYTHON" "$ROOT/ablation.py" --dense-path "$OUTPUT/dense/best_checkpoint.pth" --output_dir "$OUTPUT" \
  --seeds "${SEEDS[@]}" --jobs "$JOBS" -- "${FMNIST_RECIPE[@]}" \
  --pruning-layers 2 4 6 --token-keep-ratio "$TOKEN_KEEP_RATIO" --block-keep-ratio "$BLOCK_KEEP_RATIO" \
  --epochs "$EPOCHS" --warmup-epochs 0 --lr 1e-3 "$@"
