#!/usr/bin/env bash
# UPerNet on Vim-Base, ADE20K: Vim-Small's recipe, made for 4 GPUs. Nothing is published of this size.
#
#   MODEL_PATH=vim_base.pth DATA_PATH=/path/to/ADEChallengeData2016 GPUS=4 bash scripts/seg/upernet-vim-b.sh [flags of main.py]
#
# MODEL_PATH is a dense Vim-Base classifier. More in scripts/seg/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_segmenter \
  --method dense --model vim_base --model-kwargs rope=True --features residual \
  --epochs 60 --batch-size 8 --lr 1e-4 --warmup-lr 1e-10 --weight-decay 0.05 --layer-decay 0.95 \
  "$@"
