"""What the passes are given.

B images, L tokens, E inner channels, G directions (1 or 2).
"""

from typing import NamedTuple

from torch import Tensor

from ..params import BranchParams
from . import in_place


class Call(NamedTuple):
    """What a call is about besides the tensors that receive gradients."""

    directions: tuple[bool, ...]  # is it reversed, per direction
    active: Tensor | None  # [B, G]
    lengths: Tensor | None  # [B]
    scale: float
    in_place: bool

    def step_mask(self, mask: Tensor | None) -> Tensor | None:
        """What multiplies the step sizes."""
        return mask if self.in_place else None

    def branches(
        self, xz: Tensor, mask: Tensor, params: tuple[BranchParams, ...]
    ) -> list[in_place.Branch]:
        """What convolves in place."""
        return in_place.branches(xz, mask, params, self.directions, self.active, self.lengths)

    def routing(self) -> tuple:
        """Kernel arguments that give an image's number of tokens per direction."""
        strides = (0, 0) if self.active is None else self.active.stride()
        return self.lengths, self.active, *strides
