#!/usr/bin/env bash
# VideoMamba-Small on Something-Something V2, 8 frames, fine-tuned from ImageNet-1K; made for 8 GPUs (published: 66.6 top-1).
#
#   MODEL_PATH=videomamba_small_in1k.pth DATA_PATH=/path/to/lists GPUS=8 bash scripts/video/videomamba-s-ssv2.sh [flags of main.py]
#
# MODEL_PATH is the image model of VideoMamba-Small. More in scripts/video/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

fine_tune "${SSV2_RECIPE[@]}" "${SMALL[@]}" \
  --model videomamba_small --epochs 30 --batch-size 64 --lr 8e-4 \
  "$@"
