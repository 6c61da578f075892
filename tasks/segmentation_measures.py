"""Mean IoU and accuracies of label maps, from one confusion matrix over all images.

Rules as in mmsegmentation's `mIoU`: pixels labelled 255 are left out, a class's IoU is
intersection / (predicted + labelled - intersection), its accuracy intersection / labelled, and the
means go over the classes whose quotient exists. So a class that is neither predicted nor labelled
counts nowhere, and one that is predicted but never labelled has IoU 0 and no accuracy.

B images, H x W pixels, C classes.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loading.loaders import Batch
from loading.masks import IGNORED
from models import Result
from utils.distributed import Distributed
from utils.errors import UserError

from .sliding_window import labels_of

# Pixels counted at once: the indexes of a huge image would take 8 bytes for each of its pixels.
CHUNK = 1 << 24


class ClassCounts(NamedTuple):
    """Pixels of each class, [C] int64: rightly predicted, predicted, labelled."""

    intersection: Tensor
    predicted: Tensor
    labelled: Tensor

    @property
    def union(self) -> Tensor:
        return self.predicted + self.labelled - self.intersection


def count_pairs(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How often each pair occurs in label maps of any equal shape -> [C C + 2] int64.

    First the confusion matrix, row by row: C predictions of each label. Then the pixels that belong
    nowhere in it: those with a label that is neither a class nor 255, and those with a label that
    is fine and a prediction that is no class. The host does not wait.
    """
    if predicted.shape != labels.shape:
        raise ValueError(
            f"label maps differ in shape: predicted {list(predicted.shape)}, labels "
            f"{list(labels.shape)}"
        )
    pairs = num_classes * num_classes
    counts = torch.zeros(pairs + 3, dtype=torch.int64, device=labels.device)
    for prediction, label in zip(
        predicted.reshape(-1).split(CHUNK), labels.reshape(-1).split(CHUNK), strict=True
    ):
        prediction, label = prediction.long(), label.long()
        index = label * num_classes + prediction
        index = torch.where(_is_class(prediction, num_classes), index, pairs + 1)
        index = torch.where(_is_class(label, num_classes), index, pairs)
        index = torch.where(label == IGNORED, pairs + 2, index)
        # Not torch.bincount: on a GPU it makes the host wait for the largest value.
        counts.scatter_add_(0, index, torch.ones_like(index))
    return counts[:-1]


def _is_class(values: Tensor, num_classes: int) -> Tensor:
    return (values >= 0) & (values < num_classes)


def class_counts(confusion: Tensor) -> ClassCounts:
    """confusion [C, C], labels in rows, predictions in columns."""
    return ClassCounts(confusion.diagonal(), confusion.sum(0), confusion.sum(1))


def measures(confusion: Tensor) -> dict[str, Any]:
    """confusion [C, C] int64, labels in rows -> what a `ConfusionMeter` computes.

    Quotients are taken in float64. Where there is nothing to count, a mean is NaN and a class's
    value None.
    """
    intersection, predicted, labelled = counts = class_counts(confusion)
    iou = intersection.double() / counts.union
    accuracy = intersection.double() / labelled
    return {
        "miou": 100 * iou.nanmean().item(),
        "macc": 100 * accuracy.nanmean().item(),
        "aacc": 100 * (intersection.sum().double() / labelled.sum()).item(),
        "iou_per_class": _percent(iou),
        "accuracy_per_class": _percent(accuracy),
        "confusion": confusion.tolist(),
    }


def _percent(fractions: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else 100 * value for value in fractions.tolist()]


class ConfusionMeter:
    """Counts every pair of label and prediction, exactly, in any order and partition of the images.

    Args:
        num_classes: C, at most 255, since 255 marks pixels that are left out.
    """

    def __init__(self, num_classes: int, device: torch.device | str):
        if not 1 <= num_classes <= IGNORED:
            raise ValueError(f"{num_classes} classes: need 1 to {IGNORED}, since 255 is ignored")
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes**2 + 2, dtype=torch.int64, device=device)

    def update_labels(self, predicted: Tensor, labels: Tensor) -> None:
        """predicted and labels [B, H, W] or [H, W], integers, 255 ignored; the host does not wait.

        Images of different sizes come in one call each.
        """
        self.counts += count_pairs(predicted, labels, self.num_classes)

    def compute(self, distributed: Distributed) -> dict[str, Any]:
        """Over all ranks, which all call it:

        - `miou`, `macc`, `aacc`: mean IoU, mean accuracy and accuracy of all pixels, in percent;
          NaN where no pixel has a label.
        - `iou_per_class`, `accuracy_per_class`: [C] in percent, None where nothing counts.
        - `confusion`: [C][C] pixels, labels in rows, predictions in columns.

        Raises UserError on every rank if values were seen that are neither a class nor ignored.
        """
        counts = distributed.all_reduce_sum(self.counts).long()
        wrong_labels, wrong_predictions = counts[-2:].tolist()
        expected = f"of the classes 0 to {self.num_classes - 1}"
        if wrong_labels:
            raise UserError(
                f"{wrong_labels} pixels have a label that is neither one {expected} nor 255 "
                "(ignored): the label maps belong to other classes, or start at 1"
            )
        if wrong_predictions:
            raise UserError(f"{wrong_predictions} pixels have a prediction that is none {expected}")
        return measures(counts[:-2].reshape(self.num_classes, self.num_classes))


def predicted_labels(result: Result, size: Sequence[int]) -> Tensor:
    """The class of each pixel of an image of `size` (height, width): [B, *size] int64."""
    if result.labels is None:
        return labels_of(result.logits, tuple(size))
    return resized_labels(result.labels, size)


def resized_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """[B, H, W] -> [B, *size] int64, the nearest pixel."""
    if labels.shape[-2:] != tuple(size):
        labels = F.interpolate(labels[:, None].float(), tuple(size), mode="nearest-exact")[:, 0]
    return labels.long()


def frozen_pixels(result: Result, grid: Sequence[int], crop: Sequence[int]) -> Tensor:
    """Which pixels of a window [B, *crop] belong to dropped patches."""
    dropped = (result.owner < 0).unflatten(1, tuple(grid))
    return resized_labels(dropped, crop).bool()


class SegmentationMeter:
    """Mean IoU and accuracies from the confusion matrix of all pixels.

    `frozen_per_class`: what the patches dropped after the last stage show, as the share [C] of each
    class in their labelled pixels; None where nothing is dropped, or an image has several windows.
    """

    def __init__(self, num_classes: int, device: torch.device):
        self.confusion = ConfusionMeter(num_classes, device)
        self.frozen = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.images = self.single = 0  # all, and those of one window

    def update(self, batch: Batch, result: Result) -> None:
        labels = batch.targets
        predicted = predicted_labels(result, labels.shape[-2:]).to(labels.device)
        self.confusion.update_labels(predicted, labels)
        self.images += len(labels)
        if result.frozen is not None:
            self.single += len(labels)
            frozen = resized_labels(result.frozen, labels.shape[-2:]).bool()
            classes = len(self.frozen)
            shown = torch.where(frozen & (labels < classes), labels, classes).flatten()
            counts = self.frozen.new_zeros(classes + 1)
            self.frozen += counts.scatter_add_(0, shown, torch.ones_like(shown))[:classes]

    def compute(self, distributed: Distributed) -> dict[str, Any]:
        frozen = distributed.all_reduce_sum(self.frozen.double())
        images, single = distributed.all_reduce_sum([self.images, self.single]).tolist()
        shares = (frozen / frozen.sum()).tolist() if frozen.any() and images == single else None
        return self.confusion.compute(distributed) | {"frozen_per_class": shares}
