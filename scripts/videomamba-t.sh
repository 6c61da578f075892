#!/usr/bin/env bash
# DyVM on VideoMamba-Tiny, ImageNet-1K: the paper's recipe, made for 4 GPUs.
#
#   MODEL_PATH=videomamba_tiny.pth DATA_PATH=/path/to/imagenet GPUS=4 bash scripts/videomamba-t.sh [flags of main.py]
#
# MODEL_PATH is the dense VideoMamba-Tiny checkpoint: teacher and start of the student. More in scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_dyvm "${PAPER_RECIPE[@]}" \
  --model dyvm_videomamba_tiny --batch-size 128 --lr 3e-5 \
  --token-keep-ratio 0.9 --block-keep-ratio 0.8 \
  "$@"
