#!/usr/bin/env bash
# UPerNet on Vim-Tiny, ADE20K: 60,000 steps, made for 4 GPUs (published: 41.0 mIoU).
#
#   MODEL_PATH=vim_tiny.pth DATA_PATH=/path/to/ADEChallengeData2016 GPUS=4 bash scripts/seg/upernet-vim-t.sh [flags of main.py]
#
# MODEL_PATH is a dense Vim-Tiny classifier. More in scripts/seg/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_segmenter \
  --method dense --model vim_tiny --features hidden \
  --epochs 60 --batch-size 8 --lr 2e-4 --warmup-lr 2e-10 --weight-decay 0.1 --layer-decay 0.92 \
  "$@"
