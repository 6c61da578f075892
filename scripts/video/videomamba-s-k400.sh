#!/usr/bin/env bash
# VideoMamba-Small on Kinetics-400, 8 frames, fine-tuned from ImageNet-1K; made for 8 GPUs (published: 79.3 top-1).
#
#   MODEL_PATH=videomamba_small_in1k.pth DATA_PATH=/path/to/lists GPUS=8 bash scripts/video/videomamba-s-k400.sh [flags of main.py]
#
# MODEL_PATH is the image model of VideoMamba-Small. More in scripts/video/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

fine_tune "${K400_RECIPE[@]}" "${SMALL[@]}" \
  --model videomamba_small --epochs 50 --batch-size 64 --lr 4e-4 \
  "$@"
