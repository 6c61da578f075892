"""Rotary position embedding of the patch grid, as Vim's segmentation backbones have it.

M patches, d width; h, w the grid of patches. Source: EVA-02 (arXiv 2303.11331), Vim's release.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .tokens import Tokens

TRAINED_GRID = 14  # positions are scaled to the grid of a classification at 224 pixels
BASE = 10000


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels of hidden and residual, without class tokens.

    The first d / 2 channels turn by a patch's row, the others by its column.
    """

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        if dim % 4:
            raise ValueError(f"rope needs an embed_dim that 4 divides, not {dim}")
        half = dim // 2
        frequencies = BASE ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
        rows, columns = (
            torch.outer(torch.arange(side) / side * TRAINED_GRID, frequencies).repeat_interleave(
                2, dim=1
            )
            for side in grid
        )
        height, width = grid
        angles = torch.cat(
            [rows[:, None].expand(height, width, half), columns[None].expand(height, width, half)],
            dim=-1,
        ).flatten(0, 1)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def rotate(self, x: Tensor) -> Tensor:
        """[B, M, d] -> the same, turned."""
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return (x * self.freqs_cos + turned * self.freqs_sin).to(x.dtype)

    def forward(self, tokens: Tokens) -> Tokens:
        hidden = None if tokens.hidden is None else self.rotate(tokens.hidden)
        return replace(tokens, hidden=hidden, residual=self.rotate(tokens.residual))
