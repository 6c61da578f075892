"""The weights as the kernels read them.

E inner channels, N states, R step rank, G directions (1 or 2).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ops.kept import capturing, hold

from ..params import BranchParams, KeptParams


class Weights(NamedTuple):
    """Of one or both directions."""

    params: tuple[BranchParams, ...]
    conv_weight: Tensor  # [G, E, 4]
    conv_bias: Tensor  # [G, E]
    x_proj: Tensor  # [G, R + 2N, E]
    dt_proj: Tensor  # [G, E, R]
    A: Tensor  # [G, N, E]: neighbouring threads read neighbouring channels
    D: Tensor  # [G, E]
    dt_bias: Tensor  # [G, E]

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
        hold(weights)
        return weights

    @classmethod
    def of(cls, params: tuple[BranchParams, ...], dtype: torch.dtype) -> "Weights":
        """`dtype`: of the matrix products."""

        def stack(field: str) -> Tensor:
            return torch.stack([getattr(branch, field) for branch in params])

        return cls(
            params,
            stack("conv_weight"),
            stack("conv_bias"),
            stack("x_proj_weight").to(dtype),
            stack("dt_proj_weight").to(dtype),
            stack("A").mT.contiguous(),
            stack("D"),
            stack("dt_proj_bias"),
        )
