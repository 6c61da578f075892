#!/usr/bin/env bash
# DyVM segmentation on Vim-Tiny, ADE20K: 80,000 steps, made for 2 GPUs.
#
#   MODEL_PATH=dyvm_vim_tiny.pth DATA_PATH=/path/to/ADEChallengeData2016 GPUS=2 bash scripts/seg/dyvm-vim-t.sh [flags of main.py]
#
# MODEL_PATH is a classifier (the release's start: its score predictors are taken over where it has them) or the dense
# segmenter of upernet-vim-t.sh, which then teaches the student too. More in scripts/seg/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_segmenter \
  --method dyvm --model dyvm_vim_tiny --features hidden --token-keep-ratio 0.9 --block-keep-ratio 0.8 \
  --token-pruning-weight 20 --block-pruning-weight 20 --clip-grad 5 \
  --epochs 80 --batch-size 8 --lr 6e-5 --warmup-lr 6e-11 --weight-decay 0.01 --layer-decay 0.92 \
  "$@"
