"""What people see of a segmenter: named pixels, scores class by class, truth beside prediction.

H, W pixels, C classes.
"""

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from drawing.pictures import save_picture
from drawing.segmentation import draw_comparison, legend_rows
from loading.data import Data
from loading.images import BadImageError
from loading.transforms import Transform
from models import Result
from utils.files import write_csv

from .measures import Named
from .segmentation_measures import predicted_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = "segmentation"  # the folder in that of the run
COMPARISONS = 4
_SCORES, _CONFUSION = "iou_per_class.csv", "confusion.csv"


def labels_at(result: Result, index: int, size: Sequence[int]) -> np.ndarray:
    """The prediction of an image of a batch at a size: uint8 [H, W]."""
    one = dataclasses.replace(
        result,
        logits=None if result.logits is None else result.logits[index : index + 1],
        labels=None if result.labels is None else result.labels[index : index + 1],
    )
    return predicted_labels(one, size)[0].to(torch.uint8).cpu().numpy()


def name_pixels(
    result: Result, index: int, size: Sequence[int], class_names: Sequence[str], top: int
) -> Named:
    """The classes of an image of a batch, at its size (height, width), the largest first."""
    labels = labels_at(result, index, size)
    rows, _ = legend_rows([labels], class_names, top)
    classes = [{"class": row.label, "name": row.name, "share": row.shares[0]} for row in rows]
    text = ", ".join(f"{row.name} {100 * row.shares[0]:.1f} %" for row in rows)
    return Named({"classes": classes}, text, labels)


def write_class_scores(values: Mapping[str, Any], class_names: Sequence[str], folder: Path) -> None:
    """Tables of what `ConfusionMeter` computed, and their plots."""
    from drawing import plots

    scores = zip(class_names, values["iou_per_class"], values["accuracy_per_class"], strict=True)
    rows = ((label, name, *map(_text, pair)) for label, (name, *pair) in enumerate(scores))
    write_csv(folder / _SCORES, ("class", "name", "iou", "accuracy"), rows)
    counts = zip(class_names, values["confusion"], strict=True)
    header = ("label", *class_names)
    write_csv(folder / _CONFUSION, header, ((name, *row) for name, row in counts))
    for (figure, _), table in zip(read_class_scores(folder), (_SCORES, _CONFUSION), strict=True):
        plots.save(figure, (folder / table).with_suffix(".png"))


def frozen_text(values: Mapping[str, Any], class_names: Sequence[str], count: int = 3) -> str:
    """What the dropped patches of an evaluation show most, beside its share of all pixels."""
    pixels = np.array(values["confusion"]).sum(axis=1)
    everywhere, frozen = pixels / pixels.sum(), np.array(values["frozen_per_class"])
    return ", ".join(
        f"{class_names[label]} {100 * frozen[label]:.1f} % (of all pixels: "
        f"{100 * everywhere[label]:.1f} %)"
        for label in np.argsort(-frozen, kind="stable")[:count]
        if frozen[label]
    )


def _text(percent: float | None) -> str:
    return "" if percent is None else f"{percent:.4f}"


def read_class_scores(folder: Path) -> list[tuple["Figure", str]]:
    """The plots of the tables that `write_class_scores` left, with their alternative texts.

    Raises OSError or ValueError if they cannot be read; without tables there are no plots.
    """
    from drawing.class_plots import confusion_of_worst, iou_bars, worst_classes

    if not (folder / _SCORES).exists():
        return []
    rows = _read(folder / _SCORES)
    names = [row[1] for row in rows]
    iou = np.array([float(row[2] or "nan") for row in rows])
    confusion = np.array([[int(count) for count in row[1:]] for row in _read(folder / _CONFUSION)])
    if confusion.shape != (len(names), len(names)):
        raise ValueError(f"{_CONFUSION}: not {len(names)} x {len(names)} numbers")
    worst = worst_classes(confusion, iou)
    return [
        (iou_bars(iou, names), _iou_alt(iou, names)),
        (
            confusion_of_worst(confusion, iou, names),
            "What the pixels of the classes with the lowest IoU were predicted as: "
            + ", ".join(names[label] for label in worst),
        ),
    ]


def _read(path: Path) -> list[list[str]]:
    """The rows of a table, without its header. Raises ValueError where cells are missing."""
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    if not rows or any(len(row) != len(header) for row in rows):
        raise ValueError(f"{path.name}: rows are missing or cut off")
    return rows


def _iou_alt(iou: np.ndarray, names: Sequence[str]) -> str:
    order = [label for label in np.argsort(-iou) if not np.isnan(iou[label])]
    if not order:
        return "IoU of each class: no pixel has a label"
    best, worst = (f"{names[label]} with {iou[label]:.1f} %" for label in (order[0], order[-1]))
    return f"IoU of {len(order)} classes, from {best} to {worst}, mean {np.nanmean(iou):.1f} %"


def draw_comparisons(
    predict: Callable[[Tensor], Result],
    data: Data,
    transform: Transform,
    folder: Path,
    count: int = COMPARISONS,
) -> None:
    """`sample1.png`, ... of evenly spread validation images: truth, prediction as it was scored,
    and error. None for a stream.
    """
    count = 0 if data.val is None else min(count, len(data.val))
    for number in range(count):
        index = (2 * number + 1) * len(data.val) // (2 * count)
        try:
            image, target = data.val.load(index)
        except BadImageError:  # the evaluation has reported it, or ended there
            continue
        pixels, _ = transform(image, target)
        truth = target.numpy()
        prediction = labels_at(predict(pixels[None]), 0, truth.shape)
        title = f"sample {number + 1}: {Path(data.val.describe(index)).name}"
        picture = draw_comparison(image, truth, prediction, data.class_names, title)
        save_picture(picture, folder / f"sample{number + 1}.png")


def list_comparisons(folder: Path) -> list[tuple[Path, str]]:
    """The pictures of `draw_comparisons`, with their alternative texts."""
    alt = "image, true labels, predicted labels, wrong pixels; legend with shares of the pixels"
    return [(path, f"{path.stem}: {alt}") for path in sorted(folder.glob("sample*.png"))]
