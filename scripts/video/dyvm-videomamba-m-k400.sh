#!/usr/bin/env bash
# DyVM on VideoMamba-Middle, Kinetics-400, 8 frames; made for 8 GPUs.
#
#   MODEL_PATH=videomamba_middle_k400.pth DATA_PATH=/path/to/lists GPUS=8 bash scripts/video/dyvm-videomamba-m-k400.sh [flags of main.py]
#
# MODEL_PATH is the dense model of clips, from videomamba-m-k400.sh or the official one: start and teacher.
# 0.7 of the tokens a stage and 0.8 of the scans make 44 % fewer operations (`paper`).
# More in scripts/video/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

teach "${K400_RECIPE[@]}" --aa rand-m7-n4-mstd0.5-inc1 \
  --model dyvm_videomamba_middle --epochs 15 --batch-size 32 --accum-steps 2 --grad-checkpointing --lr 5e-5 \
  --token-keep-ratio 0.7 --block-keep-ratio 0.8 \
  "$@"
