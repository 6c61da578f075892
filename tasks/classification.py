"""Image classification: one label per image."""

import argparse

from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from losses import DenseLoss, DynamicLoss
from models import DynamicVisionMamba, VisionMamba


def build_criterion(args: argparse.Namespace, model: VisionMamba) -> nn.Module:
    """Classification alone for a dense model, the terms of the method for a dynamic one."""
    if args.mixup or args.cutmix:
        classification: nn.Module = SoftTargetCrossEntropy()
    elif args.smoothing:
        classification = LabelSmoothingCrossEntropy(args.smoothing)
    else:
        classification = nn.CrossEntropyLoss()
    if not isinstance(model, DynamicVisionMamba):
        return DenseLoss(classification)
    return DynamicLoss(
        classification,
        token_keep=model.token_keep or None,
        block_keep=args.block_keep_ratio if model.route_blocks else None,
        token_weight=args.token_pruning_weight,
        block_weight=args.block_pruning_weight,
        distill_weight=args.distill_weight,
        token_budget=model.token_strategy == "learned",
    )
