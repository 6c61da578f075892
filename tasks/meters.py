"""What an evaluation pass counts: meters, and sums that no number of processes changes."""

from typing import Any, Protocol

import torch
from torch import Tensor

from loading.loaders import Batch
from models import Result, VisionMamba
from utils.distributed import Distributed


class Meter(Protocol):
    """Watches one evaluation pass, in the words of `timm.task` and torchmetrics."""

    def update(self, batch: Batch, result: Result) -> None:
        """Count a batch of this rank, whose tensors are on the device. The next batch may overwrite
        `result`.
        """

    def compute(self, distributed: Distributed) -> dict[str, Any]:
        """Names and values over all ranks. Every rank calls it, after one image at least."""


def exact_sum(values: Tensor) -> Tensor:
    """Sum of float values in float64, each rounded to a multiple of 2^-24.

    Such sums are exact, so that neither the number of processes nor the order changes the last
    digit.
    """
    return (values.double() * 2**24).round().sum() / 2**24


class ReductionMeter:
    """What is kept on average: `keep`, the fraction of the patches that is left after each stage,
    and `gates` [depth][2], the share of the images whose forward and backward scan runs.
    """

    def __init__(self, model: VisionMamba, device: torch.device):
        self.num_patches = model.num_patches
        self.images = 0
        self.gates = torch.zeros(model.depth, 2, dtype=torch.float64, device=device)
        self.kept = torch.zeros(len(model.pruning_layers), dtype=torch.float64)

    def update(self, batch: Batch, result: Result) -> None:
        """gates [depth, B, 2]; kept: a [B, k] for each stage."""
        self.images += len(batch.images)
        self.gates += result.gates.double().sum(dim=1)
        for stage, kept in enumerate(result.kept):
            self.kept[stage] += kept.numel()

    def compute(self, distributed: Distributed) -> dict[str, Any]:
        images = distributed.all_reduce_sum([self.images]).item()
        gates, kept = (distributed.all_reduce_sum(part) for part in (self.gates, self.kept))
        return {
            "keep": (kept / images / self.num_patches).tolist(),
            "gates": (gates / images).tolist(),
        }
