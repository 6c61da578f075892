"""Mean IoU and accuracies against a loop over pixels, in any order and partition of the images."""

import json
import math
import warnings
from functools import reduce

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tasks import segmentation_measures
from tasks.segmentation_measures import ConfusionMeter, class_counts, count_pairs
from utils.distributed import Distributed
from utils.errors import UserError

ALONE = Distributed(torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def naive_confusion(predicted, labels, num_classes):
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for prediction, label in zip(predicted.flatten(), labels.flatten(), strict=True):
        if label != 255:
            confusion[label, prediction] += 1
    return confusion


def naive_measures(confusion):
    """Class by class, with the quotients that exist."""
    iou, accuracy = [], []
    for c in range(len(confusion)):
        right, labelled, predicted = confusion[c, c], confusion[c].sum(), confusion[:, c].sum()
        union = labelled + predicted - right
        iou.append(100 * right / union if union else None)
        accuracy.append(100 * right / labelled if labelled else None)
    means = [[value for value in values if value is not None] for values in (iou, accuracy)]
    return iou, accuracy, *(sum(values) / len(values) for values in means)


def maps(images, height, width, num_classes, seed=0, ignored=0.2):
    random = np.random.RandomState(seed)
    labels = random.randint(0, num_classes, (images, height, width)).astype(np.uint8)
    predicted = np.where(
        random.rand(*labels.shape) < 0.5, labels, random.randint(0, num_classes, labels.shape)
    )
    labels[random.rand(*labels.shape) < ignored] = 255
    return torch.from_numpy(predicted), torch.from_numpy(labels)


def meter_of(*pairs, num_classes):
    meter = ConfusionMeter(num_classes, "cpu")
    for predicted, labels in pairs:
        meter.update_labels(predicted, labels)
    return meter


@pytest.mark.parametrize("num_classes", [1, 2, 7, 150])
@pytest.mark.parametrize("size", [(1, 1), (17, 1), (1, 63), (31, 24)])
def test_against_a_loop(num_classes, size):
    predicted, labels = maps(3, *size, num_classes, ignored=0.2 if size != (1, 1) else 0)
    confusion = naive_confusion(predicted.numpy(), labels.numpy(), num_classes)
    iou, accuracy, miou, macc = naive_measures(confusion)
    result = meter_of((predicted, labels), num_classes=num_classes).compute(ALONE)
    assert result["confusion"] == confusion.tolist()
    for mine, expected in zip(
        result["iou_per_class"] + result["accuracy_per_class"], iou + accuracy, strict=True
    ):
        assert mine is None if expected is None else mine == pytest.approx(expected, rel=1e-12)
    assert result["miou"] == pytest.approx(miou, rel=1e-12)
    assert result["macc"] == pytest.approx(macc, rel=1e-12)
    right = 100 * confusion.trace() / confusion.sum()
    assert result["aacc"] == pytest.approx(right, rel=1e-12)
    json.dumps(result, allow_nan=False)


def test_what_has_no_quotient():
    """Class 1 is predicted alone, 2 labelled alone, 3 neither."""
    predicted, labels = torch.tensor([[[0, 1, 0, 0]]]), torch.tensor([[[0, 0, 2, 255]]])
    result = meter_of((predicted, labels), num_classes=4).compute(ALONE)
    assert result["iou_per_class"] == pytest.approx([100 / 3, 0, 0, None])
    assert result["accuracy_per_class"] == [50, None, 0, None]
    assert (result["miou"], result["macc"]) == pytest.approx((100 / 9, 25))
    assert result["aacc"] == pytest.approx(100 / 3)


def test_nothing_labelled():
    labels = torch.full((2, 3, 3), 255, dtype=torch.uint8)
    result = meter_of((torch.zeros(2, 3, 3), labels), num_classes=3).compute(ALONE)
    assert all(math.isnan(result[name]) for name in ("miou", "macc", "aacc"))
    assert result["iou_per_class"] == result["accuracy_per_class"] == [None] * 3
    assert np.sum(result["confusion"]) == 0


def test_order_and_partition_change_nothing():
    predicted, labels = maps(6, 9, 11, 5)
    whole = meter_of((predicted, labels), num_classes=5).counts
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    parts = zip(predicted[order].split([1, 3, 2]), labels[order].split([1, 3, 2]), strict=True)
    assert torch.equal(meter_of(*parts, num_classes=5).counts, whole)
    single = zip(predicted, labels, strict=True)  # [H, W]
    assert torch.equal(meter_of(*single, num_classes=5).counts, whole)
    across = (predicted.transpose(1, 2), labels.transpose(1, 2))  # not contiguous
    assert torch.equal(meter_of(across, num_classes=5).counts, whole)


def test_parts_of_a_large_map(monkeypatch):
    predicted, labels = maps(2, 9, 11, 5)
    whole = count_pairs(predicted, labels, 5)
    monkeypatch.setattr(segmentation_measures, "CHUNK", 7)
    assert torch.equal(count_pairs(predicted, labels, 5), whole)


def test_integer_types_count_alike():
    predicted, labels = maps(2, 9, 11, 5)
    counts = [
        count_pairs(predicted.to(dtype), labels.to(dtype), 5)
        for dtype in (torch.uint8, torch.int16, torch.int64)
    ]
    assert all(torch.equal(counts[0], other) for other in counts)


@pytest.mark.parametrize("wrong", [4, 254, -1, 256])
def test_other_labels_are_refused(wrong):
    labels = torch.tensor([[[0, wrong, 3, 255]]])
    meter = meter_of((torch.zeros_like(labels), labels), num_classes=4)
    assert meter.counts[:-2].sum() == 2
    with pytest.raises(UserError, match="1 pixels have a label .* 0 to 3 nor 255"):
        meter.compute(ALONE)


@pytest.mark.parametrize("wrong", [4, 255, -1])
def test_other_predictions_are_refused(wrong):
    """But not where nothing is labelled."""
    predicted = torch.tensor([[[0, wrong, 3, wrong]]])
    labels = torch.tensor([[[0, 1, 2, 255]]])
    meter = meter_of((predicted, labels), num_classes=4)
    with pytest.raises(UserError, match="1 pixels have a prediction"):
        meter.compute(ALONE)


def test_wrong_calls():
    with pytest.raises(ValueError, match="differ in shape"):
        meter_of((torch.zeros(1, 2, 3), torch.zeros(1, 3, 2)), num_classes=2)
    for num_classes in (0, 256):
        with pytest.raises(ValueError, match="classes"):
            ConfusionMeter(num_classes, "cpu")


def test_counts_of_classes():
    predicted, labels = maps(1, 9, 11, 5)
    counts = class_counts(count_pairs(predicted, labels, 5)[:-2].reshape(5, 5))
    valid = labels != 255
    for c in range(5):
        assert counts.intersection[c] == ((predicted == c) & (labels == c)).sum()
        assert counts.predicted[c] == ((predicted == c) & valid).sum()
        assert counts.labelled[c] == (labels == c).sum()
        assert counts.union[c] == (((predicted == c) | (labels == c)) & valid).sum()


class Ranks:
    """`all_reduce_sum` over meters in this process, in float64 as the real one."""

    def __init__(self, meters):
        self.meters = meters

    def all_reduce_sum(self, values):
        return reduce(torch.add, (meter.counts.double() for meter in self.meters))


def test_sum_over_ranks_is_exact():
    """Counts far beyond what float32 could hold."""
    meters = [meter_of(maps(2, 9, 11, 5, seed=rank), num_classes=5) for rank in range(3)]
    for meter in meters:
        meter.counts[0] += 2**48 + 1
    expected = sum(meter.counts for meter in meters)[:-2].reshape(5, 5)
    result = meters[0].compute(Ranks(meters))
    assert result["confusion"] == expected.tolist()


def test_host_does_not_wait():
    """Fake tensors of a GPU have no values that a host could wait for."""
    with FakeTensorMode():
        meter = ConfusionMeter(7, "cuda")
        labels = torch.zeros(2, 5, 6, device="cuda", dtype=torch.uint8)
        meter.update_labels(labels.long(), labels)
        assert meter.counts.device.type == "cuda"
