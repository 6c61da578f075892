"""The weights of one scan direction.

E inner channels, N states, R step rank, W convolution width.
"""

import itertools
from functools import cached_property
from typing import NamedTuple

from torch import Tensor


class BranchParams(NamedTuple):
    """The weights of one scan direction."""

    conv_weight: Tensor  # [E, W]
    conv_bias: Tensor  # [E]
    x_proj_weight: Tensor  # [R + 2 N, E], rows: step, B, C
    dt_proj_weight: Tensor  # [E, R]
    dt_proj_bias: Tensor  # [E]
    A: Tensor  # [E, N], negative
    D: Tensor  # [E]


class KeptParams(BranchParams):
    """Weights that stay as they are, as long as this object is used; backends keep what they make
    of them in `made`.
    """

    @cached_property
    def made(self) -> dict:
        return {}

    @cached_property
    def serial(self) -> int:
        return next(_serials)


_serials = itertools.count()

COUNT = len(BranchParams._fields)
# The flat weights of both directions, as an operator takes them: None for those of a missing one.
Directions = tuple[BranchParams | None, BranchParams | None]
DIRECTIONS_SCHEMA = ", ".join(
    f"Tensor? {name}{suffix}" for suffix in ("", "_b") for name in BranchParams._fields
)


def flatten(directions: Directions) -> tuple[Tensor | None, ...]:
    """The weights of both directions in one row, None for each of a missing direction."""
    missing = (None,) * COUNT
    forward, backward = directions
    return (*(forward or missing), *(backward or missing))


def unflatten(tensors: tuple[Tensor | None, ...]) -> Directions:
    """Undo `flatten`."""
    halves = tensors[:COUNT], tensors[COUNT:]
    return tuple(None if half[0] is None else BranchParams(*half) for half in halves)
