"""Initialisation for training from scratch, in both directions.

Source: Mamba (arXiv 2312.00752), section 3.6.
"""

import math

import torch
from timm.layers import lecun_normal_, trunc_normal_
from torch import nn

from .mixer import ROUTER_BIAS, BidirectionalMamba

STEP_RANGE = (1e-3, 0.1)  # softplus(dt_proj.bias) is log-uniform in it


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Initialise a backbone or a part of it in place, unless it has no memory (the meta device):
    PyTorch takes ten times as long over nothing.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    for child in module.modules():
        if isinstance(child, nn.Linear):
            trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    mixers = [child for child in module.modules() if isinstance(child, BidirectionalMamba)]
    for mixer in mixers:
        _initialize_step(mixer.dt_proj)
        _initialize_step(mixer.dt_proj_b)
        mixer.out_proj.weight.div_(math.sqrt(len(mixers)))
    if hasattr(module, "patch_embed"):
        lecun_normal_(module.patch_embed.proj.weight)
        nn.init.zeros_(module.patch_embed.proj.bias)
    clips = hasattr(module, "temporal_pos_embedding")  # whose class token begins at zero
    for name in ("pos_embed",) if clips else ("cls_token", "pos_embed", "pos_embed_cls"):
        if hasattr(module, name):
            trunc_normal_(getattr(module, name), std=0.02)


def _initialize_step(dt_proj: nn.Linear) -> None:
    bound = dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, -bound, bound)
    low, high = (math.log(step) for step in STEP_RANGE)
    step = torch.empty_like(dt_proj.bias).uniform_(low, high).exp_()
    dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


@torch.no_grad()
def initialize_router(module: nn.Module) -> None:
    """Make routers keep nearly every scan: for a new model, never on resume or at evaluation."""
    for child in module.modules():
        if isinstance(child, BidirectionalMamba) and child.block_head is not None:
            nn.init.zeros_(child.block_head.weight)
            nn.init.constant_(child.block_head.bias, ROUTER_BIAS)
