#!/usr/bin/env bash
# As distilled-vim-s.sh; what is not kept is averaged into what is. Vim-Small, ImageNet-1K.
#
#   MODEL_PATH=vim_small.pth DATA_PATH=/path/to/imagenet GPUS=4 bash scripts/selection/distilled-merge-vim-s.sh [flags]
#
# MODEL_PATH is the dense checkpoint: teacher and start of the student. More in scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

train_dyvm "${VIM_S_RECIPE[@]}" --token-strategy distilled --reduction prune+merge "$@"
