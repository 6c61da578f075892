#!/usr/bin/env bash
# DyVM on Vim-Small, ImageNet-1K: the paper's recipe, made for 4 GPUs.
#
#   MODEL_PATH=vim_small.pth DATA_PATH=/path/to/imagenet GPUS=4 bash scripts/vim-s.sh [flags of main.py]
#
# MODEL_PATH is the dense Vim-Small checkpoint: teacher and start of the student. More in scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_dyvm "${VIM_S_RECIPE[@]}" "$@"
