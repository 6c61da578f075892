#!/usr/bin/env bash
# All ablations of DyVM on Vim-Small, ImageNet-1K, with their table: ablation.py with the paper's recipe.
#
#   MODEL_PATH=vim_small.pth DATA_PATH=/path/to/imagenet GPUS=4 bash scripts/ablation/all.sh [flags of main.py]
#
#   GPUS     trainings at a time, each on one GPU (default: all visible GPUs)
#   SEEDS    seeds, separated by spaces (default: 0 1 2)
#
# The recipe is made for 4 GPUs; here each training joins 4 batches on its one GPU, which is the same whole batch and
# learning rate. Started again, it goes on where it was interrupted. More in scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

require_path MODEL_PATH "the checkpoint of the dense teacher"
require_path DATA_PATH "the folder of ImageNet-1K, with train/ and val/"
read -ra seeds <<<"${SEEDS:-0 1 2}"
python="${PYTHON:-python3}"
dry_run || python="$(bash "$ROOT/scripts/setup.sh" | tail -n 1)"
command=(
  "$python" "$ROOT/ablation.py" --dense-path "$MODEL_PATH" --output_dir "${OUTPUT:-$ROOT/output/$NAME}"
  --seeds "${seeds[@]}" --jobs "${GPUS:-$(visible_gpus)}"
  -- --data-set IMNET --data-path "$DATA_PATH" "${VIM_S_RECIPE[@]}" --accum-steps 4 "$@"
)
if dry_run; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
exec "${command[@]}"
