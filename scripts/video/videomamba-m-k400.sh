#!/usr/bin/env bash
# VideoMamba-Middle on Kinetics-400, 8 frames, fine-tuned from ImageNet-1K; made for 8 GPUs (published: 80.6 top-1).
#
#   MODEL_PATH=videomamba_middle_in1k.pth DATA_PATH=/path/to/lists GPUS=8 bash scripts/video/videomamba-m-k400.sh [flags of main.py]
#
# MODEL_PATH is the image model of VideoMamba-Middle. The published run has 16 GPUs and no --accum-steps. With 16
# frames or more: --lr 2e-4. More in scripts/video/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

fine_tune "${K400_RECIPE[@]}" "${MIDDLE[@]}" \
  --model videomamba_middle --epochs 50 --batch-size 32 --accum-steps 2 --lr 4e-4 --grad-checkpointing \
  "$@"
