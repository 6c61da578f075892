#!/usr/bin/env bash
# DyVM on Vim-Tiny, ImageNet-1K: the paper's recipe, made for 4 GPUs.
#
#   MODEL_PATH=vim_tiny.pth DATA_PATH=/path/to/imagenet GPUS=4 bash scripts/vim-t.sh [flags of main.py]
#
# MODEL_PATH is the dense Vim-Tiny checkpoint: teacher and start of the student. More in scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_dyvm "${PAPER_RECIPE[@]}" \
  --model dyvm_vim_tiny --batch-size 128 --lr 3e-5 \
  --token-keep-ratio 0.9 --block-keep-ratio 0.8 \
  "$@"
