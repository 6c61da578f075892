#!/usr/bin/env bash
# DyVM on MambaReg-Small, ImageNet-1K: the paper's recipe, made for 4 GPUs.
#
#   MODEL_PATH=mambareg_small.pth DATA_PATH=/path/to/imagenet GPUS=4 bash scripts/mambareg-s.sh [flags of main.py]
#
# MODEL_PATH is the dense MambaReg-Small checkpoint: teacher and start of the student. More in scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_dyvm "${PAPER_RECIPE[@]}" \
  --model dyvm_mambareg_small --batch-size 64 --lr 5e-5 \
  --token-keep-ratio 0.7 --block-keep-ratio 0.8 \
  "$@"
