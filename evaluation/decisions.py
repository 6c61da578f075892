"""A model's decisions over a whole data set, collected during evaluation: gates, costs, keep maps.

C classes, B images, M patches, S stages, N images of the data set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loading.loaders import Batch
from models import Result, VisionMamba
from models.flops import flops_per_image
from utils.distributed import Distributed
from utils.files import read_csv, write_csv

DIRECTIONS = ("forward", "backward")


@dataclass
class DecisionTotals:
    """The decisions of a pass over all ranks; None for parts that the model does not have."""

    class_names: list[str]
    images_per_class: np.ndarray  # [C]
    gates_per_class: np.ndarray | None  # [C, depth, 2] means, NaN for a class without images
    gates: np.ndarray | None  # [depth, 2] means
    costs: np.ndarray  # [N] int64, `exact` operations of each image
    keep: np.ndarray  # [S, M] fraction of the images that keep a patch
    grid: tuple[int, ...]  # of the M patches, (h, w) or that of clips (s, h, w)
    pruning_layers: tuple[int, ...]

    def write(self, folder: Path) -> None:
        """Write the numbers as CSV and their plots as PNG."""
        from drawing import plots  # here, since importing matplotlib takes a second

        folder.mkdir(parents=True, exist_ok=True)
        if self.gates is not None:
            self._write_gates(folder / "gates.csv")
            plots.save(plots.gates(self.gates, self.pruning_layers), folder / "gates.png")
        if self.gates_per_class is not None:
            self._write_gates_per_class(folder / "gates_per_class.csv")
            figure = plots.gates_per_class(self.gates_per_class, self.class_names)
            plots.save(figure, folder / "gates_per_class.png")
        if self.gates is not None:
            write_csv(folder / "costs.csv", ("exact_flops",), ([cost] for cost in self.costs))
            plots.save(plots.costs(self.costs), folder / "costs.png")
        if len(self.keep):
            self._write_keep_maps(folder / "keep_maps.csv")
            plots.save(plots.keep_maps(self.keep, self.grid), folder / "keep_maps.png")

    def _write_keep_maps(self, path: Path) -> None:
        """A row for each patch; where the grid is no square, with its place in it."""
        names = ("slot", "row", "column")[-len(self.grid) :]
        place = names if len(set(self.grid)) > 1 or len(self.grid) > 2 else ()
        header = ("patch", *(f"stage{s + 1}" for s in range(len(self.keep))), *place)
        rows = (
            (patch, *map(_short, shares), *(np.unravel_index(patch, self.grid) if place else ()))
            for patch, shares in enumerate(self.keep.T)
        )
        write_csv(path, header, rows)

    def _write_gates(self, path: Path) -> None:
        stage = {layer: number for number, layer in enumerate(self.pruning_layers, start=1)}
        rows = (
            (layer, *map(_short, gate), stage.get(layer, 0))
            for layer, gate in enumerate(self.gates)
        )
        write_csv(path, ("layer", *DIRECTIONS, "stage_before"), rows)

    def _write_gates_per_class(self, path: Path) -> None:
        columns = [
            f"layer{layer}_{name}" for layer in range(len(self.gates)) for name in DIRECTIONS
        ]
        rows = (
            (name, count, *map(_short, gate.ravel()))
            for name, count, gate in zip(
                self.class_names, self.images_per_class, self.gates_per_class, strict=True
            )
        )
        write_csv(path, ("class", "images", *columns), rows)


def _short(value: float) -> str:
    return f"{value:.6g}"


class DecisionMeter:
    """Sums up the decisions of one evaluation pass; `compute` returns `decisions` on rank 0.

    labels: the class [B] of each image of a batch, None if images have none.
    """

    def __init__(
        self, model: VisionMamba, class_names: list[str], labels: Callable[[Batch], Tensor | None]
    ):
        self.model, self.class_names, self.labels = model, class_names, labels
        self.passes = 0
        self.counts = torch.zeros(len(class_names), dtype=torch.float64)
        self.class_gates = torch.zeros(len(class_names), model.depth, 2, dtype=torch.float64)
        self.gates = torch.zeros(model.depth, 2, dtype=torch.float64)
        self.kept = torch.zeros(len(model.pruning_layers), model.num_patches, dtype=torch.float64)
        self.costs: list[np.ndarray] = []

    def update(self, batch: Batch, result: Result) -> None:
        """gates [depth, B, 2], kept S x [B, k]; or of several passes of each image, beside each
        other.
        """
        gates = result.gates.double().cpu()
        passes = gates.shape[1] // len(batch.images)
        self.passes += gates.shape[1]
        self.gates += gates.sum(dim=1)
        labels = self.labels(batch) if self.class_names else None
        if labels is not None:
            labels = labels.cpu()
            ones = torch.ones(len(labels), dtype=torch.float64)
            self.counts.index_add_(0, labels, ones)
            of_images = gates.unflatten(1, (-1, passes)).mean(dim=2)
            self.class_gates.index_add_(0, labels, of_images.transpose(0, 1))
        for total, stage in zip(self.kept, result.kept, strict=True):
            total += torch.bincount(stage[stage >= 0].cpu(), minlength=self.model.num_patches)
        costs = flops_per_image(self.model, gates, result.counts).exact
        costs = costs.unflatten(0, (-1, passes)).sum(dim=1)
        self.costs.append(costs.round().long().numpy())

    def compute(self, distributed: Distributed) -> dict[str, DecisionTotals | None]:
        sums = (self.counts, self.class_gates, self.gates, self.kept)
        counts, class_gates, gates, kept = (
            distributed.all_reduce_sum(part).numpy() for part in sums
        )
        passes = distributed.all_reduce_sum([self.passes]).item()
        costs = distributed.gather_objects(
            np.concatenate(self.costs) if self.costs else np.zeros(0, np.int64)
        )
        if costs is None:
            return {"decisions": None}
        with np.errstate(invalid="ignore"):
            per_class = class_gates / counts[:, None, None]
        routed = self.model.route_blocks
        totals = DecisionTotals(
            self.class_names,
            counts.astype(int),
            per_class if routed and counts.any() else None,
            gates / passes if routed else None,
            np.concatenate(costs),
            kept / passes,
            self.model.patch_embed.grid,
            tuple(self.model.pruning_layers),
        )
        return {"decisions": totals}


def read_keep_maps(path: Path) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Read keep_maps.csv; -> shares [S, M], and the grid, None for a square one."""
    table = read_csv(path)[:, 1:].T
    with open(path, encoding="utf-8") as file:
        columns = file.readline().rstrip().split(",")
    if columns[-1] != "column":
        return table, None
    places = 3 if "slot" in columns else 2
    return table[:-places], tuple(int(place.max()) + 1 for place in table[-places:])
