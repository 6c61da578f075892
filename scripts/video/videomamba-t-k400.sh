#!/usr/bin/env bash
# VideoMamba-Tiny on Kinetics-400, 8 frames, fine-tuned from ImageNet-1K; made for 8 GPUs (published: 76.9 top-1).
#
#   MODEL_PATH=videomamba_tiny_in1k.pth DATA_PATH=/path/to/lists GPUS=8 bash scripts/video/videomamba-t-k400.sh [flags of main.py]
#
# MODEL_PATH is the image model of VideoMamba-Tiny. More in scripts/video/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

fine_tune "${K400_RECIPE[@]}" "${TINY[@]}" \
  --model videomamba_tiny --epochs 70 --batch-size 64 --lr 4e-4 \
  "$@"
