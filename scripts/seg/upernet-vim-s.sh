#!/usr/bin/env bash
# UPerNet on Vim-Small, ADE20K: 60,000 steps, made for 4 GPUs (published: 44.9 mIoU).
#
#   MODEL_PATH=vim_small.pth DATA_PATH=/path/to/ADEChallengeData2016 GPUS=4 bash scripts/seg/upernet-vim-s.sh [flags of main.py]
#
# MODEL_PATH is a dense Vim-Small classifier. More in scripts/seg/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_segmenter \
  --method dense --model vim_small --model-kwargs rope=True --features residual \
  --epochs 60 --batch-size 8 --lr 1e-4 --warmup-lr 1e-10 --weight-decay 0.05 --layer-decay 0.95 \
  "$@"
