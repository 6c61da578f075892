"""Where class and register tokens stand among the patch tokens.

A layout is a rule: given how many patch tokens an image has, where do its class tokens stand? The
same rule holds at the input, after each pruning stage at evaluation (as many patches as were kept)
and in training (as many as that image kept; its dropped tokens stand behind). Positions are a tuple
of ints when all images agree, else [B, n].

B images, M patch tokens, n class or register tokens, L = M + n tokens, d width.
Source: Vim (arXiv 2401.09417), VideoMamba (2403.06977), Mamba-R (2405.14858).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Positions = tuple[int, ...] | Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Rule for `num_tokens` class tokens; `positions` works alike for an int and for a tensor of
    counts [B].
    """

    num_tokens: int

    def _position(self, index: int, patches):
        raise NotImplementedError

    def positions(self, patches: int | Tensor) -> Positions:
        """Ascending sequence indexes of the class tokens: a tuple for an int, [B, n] for counts
        [B].
        """
        if isinstance(patches, int):
            return tuple(self._position(i, patches) for i in range(self.num_tokens))
        return torch.stack([self._position(i, patches) for i in range(self.num_tokens)], dim=-1)


class MiddleClassToken(TokenLayout):
    """Vim: one class token at index M // 2."""

    def __init__(self):
        super().__init__(1)

    def _position(self, index: int, patches):
        return patches // 2


class HeadClassToken(TokenLayout):
    """VideoMamba: one class token at index 0."""

    def __init__(self):
        super().__init__(1)

    def _position(self, index: int, patches):
        return patches * 0


class SpreadRegisters(TokenLayout):
    """MambaReg: n registers spread evenly; with q = M // (n + 1), register i at (q + 1)(i + 1) - 1."""

    def _position(self, index: int, patches):
        return (patches // (self.num_tokens + 1) + 1) * (index + 1) - 1


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, T] or [B, T, d], index [B, S] -> [B, S] or [B, S, d]: the chosen tokens of each
    image.
    """
    if tokens.dim() == 2:
        return tokens.gather(1, index)
    batch, count, width = tokens.shape
    # Whole rows of a flat table are copied several times faster than single elements are gathered.
    rows = index + torch.arange(batch, device=index.device).unsqueeze(1) * count
    return (
        tokens.reshape(batch * count, width)
        .index_select(0, rows.flatten())
        .view(batch, index.shape[1], width)
    )


def read(sequence: Tensor, positions: Positions) -> Tensor:
    """The class tokens of a sequence [B, L, d] -> [B, n, d], without touching the other tokens."""
    if isinstance(positions, Tensor):
        return take(sequence, positions)
    return torch.stack([sequence[:, p] for p in positions], dim=1)


def insert(patches: Tensor, class_tokens: Tensor, positions: Positions) -> Tensor:
    """patches [B, M, d] (or [B, M]) and class tokens [B, n, d] ([B, n]) -> sequence [B, L, d] ([B,
    L]).
    """
    if isinstance(positions, Tensor):
        slots = torch.arange(patches.shape[1] + class_tokens.shape[1], device=patches.device)
        before = (positions.unsqueeze(-2) < slots.unsqueeze(-1)).sum(-1)
        is_class = (positions.unsqueeze(-2) == slots.unsqueeze(-1)).any(-1)
        index = torch.where(is_class, patches.shape[1] + before, slots - before)
        return take(torch.cat([patches, class_tokens], dim=1), index)
    pieces, start = [], 0
    for i, position in enumerate(positions):
        pieces += [patches[:, start : position - i], class_tokens[:, i : i + 1]]
        start = position - i
    return torch.cat([*pieces, patches[:, start:]], dim=1)


def extract(sequence: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """Undo `insert`: sequence [B, L, d] -> patches [B, M, d], class tokens [B, n, d]."""
    if isinstance(positions, Tensor):
        return take(sequence, patch_slots(positions, sequence.shape[1])), take(sequence, positions)
    bounds = [-1, *positions, sequence.shape[1]]
    pieces = [
        sequence[:, left + 1 : right] for left, right in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return torch.cat(pieces, dim=1), read(sequence, positions)


def reordered(order: Tensor, positions: Positions, new_positions: Tensor) -> Tensor:
    """Where each slot of a re-arranged sequence comes from.

    order [B, M]: patch slot -> where that patch stood among the patches; class tokens move from
    `positions` to `new_positions` [B, n]. -> index [B, L] into the old sequence, for `take`.
    """
    length = order.shape[1] + new_positions.shape[1]
    slots = torch.arange(length, device=order.device).expand(order.shape[0], -1)
    patch_slots, class_slots = extract(slots, positions)
    return insert(take(patch_slots, order), class_slots, new_positions)


def patch_slots(positions: Tensor, length: int) -> Tensor:
    """Sequence indexes of the patch tokens: class positions [B, n] -> [B, length - n], ascending."""
    count = positions.shape[-1]
    patches = torch.arange(length - count, device=positions.device)
    # Patch p has class token i before it when fewer than p + 1 patches stand before that class
    # token.
    patches_before = positions - torch.arange(count, device=positions.device)
    return patches + (patches_before.unsqueeze(-2) <= patches.unsqueeze(-1)).sum(-1)
