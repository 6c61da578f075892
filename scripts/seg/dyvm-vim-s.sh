#!/usr/bin/env bash
# DyVM segmentation on Vim-Small, ADE20K: 80,000 steps, made for 2 GPUs.
#
#   MODEL_PATH=dyvm_vim_small.pth DATA_PATH=/path/to/ADEChallengeData2016 GPUS=2 bash scripts/seg/dyvm-vim-s.sh [flags of main.py]
#
# MODEL_PATH is a classifier (the release's start: its score predictors are taken over where it has them) or a dense
# segmenter without rope and with hidden features, which then teaches the student too. More in scripts/seg/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_segmenter \
  --method dyvm --model dyvm_vim_small --features hidden --token-keep-ratio 0.8 --block-keep-ratio 0.8 \
  --token-pruning-weight 20 --block-pruning-weight 20 --clip-grad 5 \
  --epochs 80 --batch-size 16 --lr 1.2e-4 --warmup-lr 1.2e-10 --weight-decay 0.01 --layer-decay 0.92 \
  "$@"
