"""How much each token matters to a dense model: the size of the loss's gradient by its mask.

B images, M patches, S stages. Selecting by it is this project's own; a token's mask multiplies what
the scans read of it, as in "Dynamic Vision Mamba" (arXiv 2504.04787), section 3, and is 1 here.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .backbone import VisionMamba
from .layouts import class_count, insert
from .reduction import Reduction, staged_before
from .tokens import Result, Tokens


class Probe(Reduction):
    """Drops nothing; gives the tokens of each stage a mask of ones whose gradient is taken."""

    def __init__(self):
        super().__init__()
        self.masks: list[Tensor] = []  # per stage [B, M], raster order

    def __call__(self, stage, tokens: Tokens, model, images) -> Tokens:
        mask = torch.ones_like(tokens.alive, requires_grad=torch.is_grad_enabled())
        self.masks.append(mask)
        slots = tokens.class_slots
        ones = mask.new_ones(mask.shape[0], class_count(slots))
        return replace(tokens, mask=insert(mask, ones, slots))


def with_importance(
    model: VisionMamba, images: Tensor, loss: Callable[[Result], Tensor], layers: Sequence[int]
) -> Result:
    """Run a dense model and its loss backwards; -> its Result, detached, with `importance`.

    Args:
        model: in evaluation mode, its weights without gradient.
        loss: of a Result, a scalar.
        layers: importance is that of the tokens before each of these layers, for all that follow.
    """
    probe = Probe()
    with staged_before(model, layers, probe), torch.enable_grad():
        result = model(images)
        gradients = torch.autograd.grad(loss(result), probe.masks)
    # A token that is dropped at a stage is missing in all layers behind it.
    total, importance = 0, []
    for gradient in reversed(gradients):
        total = total + gradient
        importance.insert(0, total.abs())
    detached = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, result)
    return replace(detached, importance=importance)
