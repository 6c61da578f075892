#!/usr/bin/env bash
# Token merging as in R-MeeTo (arXiv 2412.12496): 11 tokens before every second layer, no router. Vim-Small, ImageNet.
#
#   MODEL_PATH=vim_small.pth DATA_PATH=/path/to/imagenet GPUS=4 bash scripts/selection/r-meeto-vim-s.sh [flags]
#
# MODEL_PATH is the dense checkpoint: teacher and start of the student. Epochs and learning rates are the published
# ones; the batch for which the rate was published is not known to us. More in scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

train_dyvm "${PAPER_RECIPE[@]}" --method token --model dyvm_vim_small --reduction merge --merge-tokens 11 \
  --epochs 15 --batch-size 64 --lr 2e-5 --min-lr 1e-6 "$@"
