"""Small dynamic models for the tests of reductions."""

import torch

from models import FAMILIES, DynamicVisionMamba

SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=6, num_classes=7)
FAMILY_ARGUMENTS = {"mambareg": dict(num_registers=4, register_reduction=2)}


def build(family="vim", **kwargs) -> DynamicVisionMamba:
    torch.manual_seed(0)
    stages = {} if "merge_tokens" in kwargs else dict(pruning_layers=(2, 4), token_keep=(0.7, 0.4))
    arguments = SMALL | FAMILY_ARGUMENTS.get(family, {}) | stages | kwargs
    return DynamicVisionMamba(FAMILIES[family], **arguments)
