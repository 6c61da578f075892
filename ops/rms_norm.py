"""Residual add + RMSNorm, as it stands before every mixer of a prenorm block."""

from typing import Optional

import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(hidden: Optional[Tensor], residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual += hidden; the normalised residual is what the mixer reads.

    hidden [B, L, d] or None, residual [B, L, d] float32, weight [d] -> normed [B, L, d], new residual [B, L, d].
    """
    if hidden is not None:
        residual = residual + hidden
    return F.rms_norm(residual, weight.shape, weight.to(residual.dtype), eps), residual
