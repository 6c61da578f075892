#!/usr/bin/env bash
# Evaluates a checkpoint on ImageNet-1K: top-1, FLOPs and throughput, as a table and in OUTPUT/eval.json.
#
#   MODEL_PATH=output/vim-s/best_checkpoint.pth DATA_PATH=/path/to/imagenet bash scripts/eval.sh [flags of main.py]
#
# Useful flags:
#   --model dyvm_vim_small       for a checkpoint that does not say what it is, such as the official ones
#   --token-keep-ratio 0.8       another token budget from the same checkpoint
#   --dense-path vim_small.pth   the dense model to compare with (default: the teacher that the checkpoint names)
#   --data-set CIFAR100          another data set
#
# scripts/common.sh tells the rest.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

require_path MODEL_PATH "the checkpoint to evaluate"
require_path DATA_PATH "the folder of ImageNet-1K, with val/"
launch --eval --model-path "$MODEL_PATH" --data-set IMNET --data-path "$DATA_PATH" \
  --output_dir "${OUTPUT:-$ROOT/output/$NAME}" "$@"
