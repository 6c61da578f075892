#!/usr/bin/env bash
# DyVM without token pruning: every patch stays, scans are skipped as in vim-s.sh. Vim-Small, ImageNet-1K.
#
#   MODEL_PATH=vim_small.pth DATA_PATH=/path/to/imagenet GPUS=4 bash scripts/ablation/block-only.sh [flags of main.py]
#
# MODEL_PATH is the dense Vim-Small checkpoint: teacher and start of the student. More in scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

train_dyvm "${VIM_S_RECIPE[@]}" --method block "$@"
