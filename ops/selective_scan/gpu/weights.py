"""The weights as the kernels read them.

E inner channels, N states, R step rank, G directions (1 or 2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ops.kept import capturing

from ..params import BranchParams, KeptParams


class Weights(NamedTuple):
    """Of one or both directions; lists hold those of the first and the last direction, twice the
    same for one.
    """

    params: tuple[BranchParams, ...]
    conv: list[Tensor]  # taps [E, 4] and bias [E] of each
    x_proj: Tensor  # [G, R + 2N, E]
    dt_proj: Tensor  # [G, E, R]
    scan: list[
        Tensor
    ]  # A [N, E], so that neighbouring threads read neighbouring channels, D, step bias

    @property
    def states(self) -> int:
        return self.params[0].A.shape[1]

    @property
    def rank(self) -> int:
        return self.params[0].dt_proj_weight.shape[1]

    @classmethod
    def kept(cls, params: tuple[BranchParams, ...], dtype: torch.dtype) -> "Weights":
        """`of`, made once for weights that stay as they are."""
        if not all(isinstance(branch, KeptParams) for branch in params):
            return cls.of(params, dtype)
        made, key = params[0].made, (dtype, len(params))
        serials = tuple(branch.serial for branch in params)
        known, weights = made.get(key, (None, None))
        if known != serials:
            # Plain params: these would refer to themselves.
            weights = cls.of(tuple(BranchParams(*branch) for branch in params), dtype)
            if not capturing():
                made[key] = serials, weights
        return weights

    @classmethod
    def of(cls, params: tuple[BranchParams, ...], dtype: torch.dtype) -> "Weights":
        """`dtype`: of the matrix products."""
        first_last = params[0], params[-1]

        def stack(field: str) -> Tensor:
            return torch.stack([getattr(branch, field) for branch in params]).to(dtype)

        def read(branches: Sequence[BranchParams], *fields: str) -> list[Tensor]:
            return [getattr(p, field).contiguous() for p in branches for field in fields]

        transposed = [branch._replace(A=branch.A.t()) for branch in first_last]
        return cls(
            params,
            read(first_last, "conv_weight", "conv_bias"),
            stack("x_proj_weight"),
            stack("dt_proj_weight"),
            read(transposed, "A", "D", "dt_proj_bias"),
        )
