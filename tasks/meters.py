"""What an evaluation pass counts: meters, and sums that are equal for any number of processes."""

from typing import Any, Protocol

import torch
from torch import Tensor

from loading.loaders import Batch
from models import Result, VisionMamba
from utils.distributed import Distributed


class Meter(Protocol):
    """Observes one evaluation pass; its methods are named as in `timm.task` and torchmetrics."""

    def update(self, batch: Batch, result: Result) -> None:
        """Count a batch of this rank, on the device. The next batch may overwrite `result`."""

    def compute(self, distributed: Distributed) -> dict[str, Any]:
        """Values over all ranks by name. Every rank calls it, after at least one image."""


def exact_sum(values: Tensor) -> Tensor:
    """Sum of float values in float64, each rounded to a multiple of 2^-24.

    Such sums are exact: the number of processes and the order do not change the last digit.
    """
    return (values.double() * 2**24).round().sum() / 2**24


class ReductionMeter:
    """Mean of what is kept: `keep` after each stage, `gates` [depth][2]; `passes` of an image.

    `keep` is the fraction of patches left, `gates` the share of images whose forward and backward
    scan runs.
    """

    def __init__(self, model: VisionMamba, device: torch.device):
        self.num_patches = model.num_patches
        self.images = self.passes = 0
        self.gates = torch.zeros(model.depth, 2, dtype=torch.float64, device=device)
        self.kept = torch.zeros(len(model.pruning_layers), dtype=torch.float64)

    def update(self, batch: Batch, result: Result) -> None:
        """gates [depth, B, 2]; kept: a [B, k] for each stage."""
        self.images += len(batch.images)
        self.passes += result.gates.shape[1]
        self.gates += result.gates.double().sum(dim=1)
        for stage, kept in enumerate(result.kept):
            self.kept[stage] += kept.numel()

    def compute(self, distributed: Distributed) -> dict[str, Any]:
        images, passes = distributed.all_reduce_sum([self.images, self.passes]).tolist()
        gates, kept = (distributed.all_reduce_sum(part) for part in (self.gates, self.kept))
        return {
            "keep": (kept / passes / self.num_patches).tolist(),
            "gates": (gates / passes).tolist(),
            "passes": passes / images,
        }
