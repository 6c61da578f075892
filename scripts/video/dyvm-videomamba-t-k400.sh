#!/usr/bin/env bash
# DyVM on VideoMamba-Tiny, Kinetics-400, 8 frames; made for 8 GPUs.
#
#   MODEL_PATH=videomamba_tiny_k400.pth DATA_PATH=/path/to/lists GPUS=8 bash scripts/video/dyvm-videomamba-t-k400.sh [flags of main.py]
#
# MODEL_PATH is the dense model of clips, from videomamba-t-k400.sh or the official one: start and teacher.
# 0.7 of the tokens a stage and 0.8 of the scans make 37 % fewer operations (`paper`), as the paper reports for video. The image
# recipe of this size keeps more: --token-keep-ratio 0.9.
# More in scripts/video/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

teach "${K400_RECIPE[@]}" --aa rand-m5-n2-mstd0.25-inc1 \
  --model dyvm_videomamba_tiny --epochs 30 --batch-size 64 --lr 3e-5 \
  --token-keep-ratio 0.7 --block-keep-ratio 0.8 \
  "$@"
