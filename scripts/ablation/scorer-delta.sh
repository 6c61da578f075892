#!/usr/bin/env bash
# DyVM whose score predictors read the previous layer's step size instead of the hidden state. Vim-Small, ImageNet-1K.
#
#   MODEL_PATH=vim_small.pth DATA_PATH=/path/to/imagenet GPUS=4 bash scripts/ablation/scorer-delta.sh [flags of main.py]
#
# MODEL_PATH is the dense Vim-Small checkpoint: teacher and start of the student. More in scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

train_dyvm "${VIM_S_RECIPE[@]}" --scorer-input delta "$@"
