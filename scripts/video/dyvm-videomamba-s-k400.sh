#!/usr/bin/env bash
# DyVM on VideoMamba-Small, Kinetics-400, 8 frames; made for 8 GPUs.
#
#   MODEL_PATH=videomamba_small_k400.pth DATA_PATH=/path/to/lists GPUS=8 bash scripts/video/dyvm-videomamba-s-k400.sh [flags of main.py]
#
# MODEL_PATH is the dense model of clips, from videomamba-s-k400.sh or the official one: start and teacher.
# 0.7 of the tokens a stage and 0.8 of the scans make 36 % fewer operations (`paper`), as the paper reports for video.
# More in scripts/video/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

teach "${K400_RECIPE[@]}" --aa rand-m7-n4-mstd0.5-inc1 \
  --model dyvm_videomamba_small --epochs 15 --batch-size 64 --lr 5e-5 \
  --token-keep-ratio 0.7 --block-keep-ratio 0.8 \
  "$@"
