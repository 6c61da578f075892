"""The convolution of a mask in place for the `triton` backend: PyTorch's, in float32 (windows.py).

B images, L tokens, E inner channels, G directions (1 or 2), W convolution width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..params import BranchParams
from ..windows import Windows, convolve, convolve_backward


class Branch(NamedTuple):
    """One direction."""

    x: Tensor  # [B, L, E], zero where the direction does not walk
    windows: Windows
    weight: Tensor  # [E, W]
    bias: Tensor  # [E]

    @classmethod
    def of(
        cls, xz: Tensor, mask: Tensor, walked: Tensor | None, params: BranchParams, reverse: bool
    ) -> "Branch":
        """xz [B, L, 2E], mask [B, L], walked [B, L] bool; None: all."""
        weight, bias = params.conv_weight.float(), params.conv_bias.float()
        x = xz.chunk(2, dim=-1)[0].float()
        if walked is not None:
            x, mask = x.where(walked.unsqueeze(-1), 0), mask.where(walked, 0)
        return cls(x, Windows.of(mask, weight.shape[1], reverse), weight, bias)

    def sums(self) -> Tensor:
        """The convolution before SiLU, [B, L, E]."""
        return convolve(self.x, self.windows, self.weight, self.bias)

    def backward(self, grad_u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """grad_u [B, L, E] -> gradients of x [B, L, E], of the weights [W + 1, E] (taps, bias) and,
        through the windows, of the mask [B, L].
        """
        sums = self.sums()
        gate = sums.sigmoid()
        grad = grad_u.float() * gate * (1 + sums * (1 - gate))
        grad_x, grad_mask, grad_weight, grad_bias = convolve_backward(
            grad, self.x, self.windows, self.weight
        )
        return grad_x, torch.cat([grad_weight.t(), grad_bias.unsqueeze(0)]), grad_mask


def branches(
    xz: Tensor,
    mask: Tensor,
    params: tuple[BranchParams, ...],
    directions: tuple[bool, ...],
    active: Tensor | None,
    lengths: Tensor | None,
) -> list[Branch]:
    """Of each direction; `directions`: is it reversed. xz [B, L, 2E], mask [B, L], active [B, G],
    lengths [B].
    """
    exists = None
    if lengths is not None:
        exists = torch.arange(xz.shape[1], device=xz.device) < lengths.unsqueeze(1)
    found = []
    for which, (reverse, branch) in enumerate(zip(directions, params, strict=True)):
        walked = exists
        if active is not None:
            on = active[:, which, None].bool().expand(mask.shape)
            walked = on if exists is None else on & exists
        found.append(Branch.of(xz, mask, walked, branch, reverse))
    return found


def forward(branches: list[Branch], dtype: torch.dtype) -> Tensor:
    """u [G, B, L, E]."""
    return torch.stack([F.silu(branch.sums()).to(dtype) for branch in branches])


def backward(branches: list[Branch], grad_u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad_u [G, B, L, E], zero where a direction does not walk -> float32 gradients of x
    [B, L, E], of the weights [G, W + 1, E] and of the mask [B, L].
    """
    grads = [branch.backward(grad) for branch, grad in zip(branches, grad_u, strict=True)]
    by_x, by_weights, by_mask = zip(*grads, strict=True)
    return sum(by_x), torch.stack(by_weights), sum(by_mask)
