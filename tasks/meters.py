"""What an evaluation pass counts: meters, and sums that are equal for any number of processes."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from loading.images import ImageSet
from loading.loaders import Batch
from models import Result, VisionMamba
from models.flops import Flops, decoder_operations, flops_per_image, token_operations
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
    scan runs. Of a model whose images keep different numbers also `flops`, the mean of a pass,
    `counts`, how often each number of patches was left by each stage, `cost`, the operations
    (`token_operations`) as a share of those with fixed numbers, and `cost_error`, its standard
    error; None of one image.
    """

    def __init__(self, model: VisionMamba, device: torch.device):
        self.model, self.num_patches = model, model.num_patches
        self.images = self.passes = 0
        self.gates = torch.zeros(model.depth, 2, dtype=torch.float64, device=device)
        stages = len(model.pruning_layers)
        self.kept = torch.zeros(stages, dtype=torch.float64, device=device)
        self.flops = torch.zeros(2, dtype=torch.float64)
        self.counts = torch.zeros(stages, self.num_patches + 1, dtype=torch.float64)
        # Own cost and that with fixed numbers: sums, sums of squares, sum of products.
        self.costs = torch.zeros(5, dtype=torch.float64)

    def update(self, batch: Batch, result: Result) -> None:
        """gates [depth, B, 2]; kept: a [B, k] for each stage."""
        self.images += len(batch.images)
        self.passes += result.gates.shape[1]
        self.gates += result.gates.double().sum(dim=1)
        for stage, kept in enumerate(result.kept):
            self.kept[stage] += (kept >= 0).sum()
        if self.model.reduction.thresholds:
            flops = flops_per_image(self.model, result.gates, result.counts)
            self.flops += torch.stack([exact_sum(part) for part in flops])
            own = (flops.exact - decoder_operations(self.model)) / self._unit
            fixed = token_operations(self.model, result.gates) / self._unit
            products = own, fixed, own.square(), fixed.square(), own * fixed
            self.costs += torch.stack([exact_sum(part) for part in products])
            for total, stage in zip(self.counts, result.counts, strict=True):
                total += torch.bincount(stage.cpu(), minlength=len(total))

    @cached_property
    def _unit(self) -> float:
        """The cost with all gates open and fixed numbers: costs are summed as shares of it."""
        return token_operations(self.model, torch.ones(self.model.depth, 1, 2)).item()

    def compute(self, distributed: Distributed) -> dict[str, Any]:
        images, passes = distributed.all_reduce_sum([self.images, self.passes]).tolist()
        gates, kept = (distributed.all_reduce_sum(part) for part in (self.gates, self.kept))
        own = {}
        if self.model.reduction.thresholds:
            flops = distributed.all_reduce_sum(self.flops) / passes
            own = {"flops": Flops(*flops.tolist())}
            own["counts"] = distributed.all_reduce_sum(self.counts.flatten()).view_as(self.counts)
            costs = (distributed.all_reduce_sum(self.costs) / passes).tolist()
            own["cost"], own["cost_error"] = _ratio(*costs, images)
        return own | {
            "keep": (kept / passes / self.num_patches).tolist(),
            "gates": (gates / passes).tolist(),
            "passes": passes / images,
        }


def _ratio(
    own: float, fixed: float, own2: float, fixed2: float, product: float, images: float
) -> tuple[float, float | None]:
    """A ratio of means and its standard error, from means of squares and of products.

    images: a number of independent ones; passes of the same image are not.
    """
    share = own / fixed
    if images < 2:
        return share, None
    variance = max(own2 - 2 * share * product + share**2 * fixed2, 0) * images / (images - 1)
    return share, math.sqrt(variance / images) / fixed


LEAST_OF_OBJECT = 0.49  # of the object's mass for each patch: one with less is not on it
FINEST = 64  # pixels of a side that are enough to cut out what a model sees

Region = tuple[float, float, float, float]


class ObjectMeter:
    """What is kept of the object that decides about the label, where a data set knows that.

    `object`: for each stage the share of kept patches that lie on the object and the share of the
    object's mass in kept patches, both in percent, and `chance`, the share of all patches that lie
    on it. Where patches are merged, the kept ones are those that stand for the others.

    region: (width, height) of an image -> the part that the model sees, in pixels.
    """

    def __init__(
        self,
        model: VisionMamba,
        images: ImageSet,
        region: Callable[[tuple[int, int]], Region],
        device: torch.device,
    ):
        self.images, self.region, self.grid = images, region, model.patch_embed.grid
        stages = len(model.pruning_layers)
        # all patches, those on the object; then kept ones, those on the object, mass: per stage
        self.totals = torch.zeros(2 + 3 * stages, dtype=torch.float64, device=device)
        self.count = 0

    def update(self, batch: Batch, result: Result) -> None:
        mass = self.masses(batch.indices)
        on_object = (mass >= LEAST_OF_OBJECT / mass.shape[1]).double()
        sums = [torch.ones_like(mass).sum(), on_object.sum()]
        for kept in result.kept:
            given, kept = (kept >= 0).double(), kept.clamp_min(0)
            chosen = on_object.gather(1, kept) * given
            sums += [given.sum(), chosen.sum(), exact_sum(mass.gather(1, kept) * given)]
        self.totals += torch.stack(sums)
        self.count += len(mass)

    def masses(self, indices: Tensor) -> Tensor:
        """Shares of the objects' mass in the patches of images [B] -> [B, M] float64."""
        mass = torch.stack([self._of_patches(index) for index in indices.tolist()])
        return mass.to(self.totals.device)

    def _of_patches(self, index: int) -> Tensor:
        """Each patch's share [M] of the object's mass, float64."""
        mass = torch.from_numpy(self.images.object_mass(index).astype("float64"))
        times = -(-FINEST // min(mass.shape))
        left, top, right, bottom = (round(times * x) for x in self.region(mass.shape[::-1]))
        mass = mass.repeat_interleave(times, 0).repeat_interleave(times, 1)
        patches = F.adaptive_avg_pool2d(mass[None, top:bottom, left:right], self.grid).flatten()
        return patches / patches.sum().clamp_min(torch.finfo(torch.float64).tiny)

    def compute(self, distributed: Distributed) -> dict[str, Any]:
        images, *totals = distributed.all_reduce_sum(
            torch.cat([self.totals.new_tensor([self.count]), self.totals])
        ).tolist()
        patches, on_object, *stages = totals
        kept, on, mass = stages[::3], stages[1::3], stages[2::3]
        return {
            "object": {
                "share": [100 * part / max(total, 1) for part, total in zip(on, kept, strict=True)],
                "mass": [100 * part / images for part in mass],
                "chance": 100 * on_object / patches,
            }
        }
