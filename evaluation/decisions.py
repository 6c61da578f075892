"""What a model decided over a whole data set, gathered in the evaluation pass: gates, costs, maps
of kept patches.

C classes, B images, M patches, S stages, N images of the data set.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from drawing import plots
from loading.loaders import Batch
from models import Result, VisionMamba
from models.flops import exact_per_image
from utils.distributed import Distributed
from utils.files import write_csv

DIRECTIONS = ("forward", "backward")


@dataclass
class DecisionTotals:
    """The decisions of a pass, over all ranks; parts that the model does not have are None."""

    class_names: list[str]
    images_per_class: np.ndarray  # [C]
    gates_per_class: np.ndarray | None  # [C, depth, 2] means, NaN for a class without images
    gates: np.ndarray | None  # [depth, 2] means
    costs: np.ndarray  # [N] int64, `exact` operations of each image
    keep: np.ndarray  # [S, M] fraction of the images that keep a patch
    pruning_layers: tuple[int, ...]

    def write(self, folder: Path) -> None:
        """The numbers as CSV and their plots as PNG."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.gates is not None:
            stage = {layer: number for number, layer in enumerate(self.pruning_layers, start=1)}
            write_csv(
                folder / "gates.csv",
                ("layer", *DIRECTIONS, "stage_before"),
                (
                    (layer, *map(_short, gate), stage.get(layer, 0))
                    for layer, gate in enumerate(self.gates)
                ),
            )
            columns = [
                f"layer{layer}_{name}" for layer in range(len(self.gates)) for name in DIRECTIONS
            ]
            write_csv(
                folder / "gates_per_class.csv",
                ("class", "images", *columns),
                (
                    (name, count, *map(_short, gate.ravel()))
                    for name, count, gate in zip(
                        self.class_names, self.images_per_class, self.gates_per_class, strict=True
                    )
                ),
            )
            plots.save(plots.gates(self.gates, self.pruning_layers), folder / "gates.png")
            plots.save(
                plots.gates_per_class(self.gates_per_class, self.class_names),
                folder / "gates_per_class.png",
            )
            write_csv(folder / "costs.csv", ("exact_flops",), ([cost] for cost in self.costs))
            plots.save(plots.costs(self.costs), folder / "costs.png")
        if len(self.keep):
            write_csv(
                folder / "keep_maps.csv",
                ("patch", *(f"stage{s + 1}" for s in range(len(self.keep)))),
                ((patch, *map(_short, column)) for patch, column in enumerate(self.keep.T)),
            )
            plots.save(plots.keep_maps(self.keep), folder / "keep_maps.png")


def _short(value: float) -> str:
    return f"{value:.6g}"


class DecisionCounter:
    """Sums up the decisions of one evaluation pass; `add` is its observer."""

    def __init__(self, model: VisionMamba, class_names: list[str]):
        self.model, self.class_names = model, class_names
        self.routed = getattr(model, "route_blocks", False)
        self.stages = len(getattr(model, "pruning_layers", ()))
        self.counts = torch.zeros(len(class_names), dtype=torch.float64)
        self.gates = torch.zeros(len(class_names), model.depth, 2, dtype=torch.float64)
        self.kept = torch.zeros(self.stages, model.num_patches, dtype=torch.float64)
        self.costs: list[np.ndarray] = []

    @property
    def anything(self) -> bool:
        """Whether the model decides anything; a dense one does not."""
        return self.routed or self.stages > 0

    def add(self, batch: Batch, result: Result) -> None:
        """Count a batch: targets [B], gates [depth, B, 2], kept S x [B, k]."""
        gates = result.gates.double().cpu()
        self.counts.index_add_(
            0, batch.targets.cpu(), torch.ones(len(batch.targets), dtype=torch.float64)
        )
        self.gates.index_add_(0, batch.targets.cpu(), gates.transpose(0, 1))
        for total, stage in zip(self.kept, result.kept, strict=True):
            total += torch.bincount(stage.flatten().cpu(), minlength=self.model.num_patches)
        self.costs.append(exact_per_image(self.model, gates).round().long().numpy())

    def totals(self, distributed: Distributed) -> DecisionTotals | None:
        """Over all ranks, on rank 0; every rank must call it."""
        sums = (self.counts, self.gates, self.kept)
        counts, gates, kept = (distributed.all_reduce_sum(part).numpy() for part in sums)
        costs = distributed.gather_objects(
            np.concatenate(self.costs) if self.costs else np.zeros(0, np.int64)
        )
        if costs is None:
            return None
        with np.errstate(invalid="ignore"):
            per_class = gates / counts[:, None, None]
        images = counts.sum()
        return DecisionTotals(
            self.class_names,
            counts.astype(int),
            per_class if self.routed else None,
            gates.sum(axis=0) / images if self.routed else None,
            np.concatenate(costs),
            kept / images,
            tuple(getattr(self.model, "pruning_layers", ())),
        )
