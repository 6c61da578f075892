"""Parity with recorded counts, measures and window positions of the published implementation."""

import numpy as np
import pytest
import torch
from helpers import golden

from tasks.segmentation_measures import ConfusionMeter, class_counts, count_pairs
from tasks.sliding_window import coverage, windows
from utils.distributed import Distributed

pytestmark = pytest.mark.skipif(
    not golden.GOLDEN_DIR.is_dir(), reason=f"no recorded cases at {golden.GOLDEN_DIR}"
)
COUNTS = {
    "intersect": "intersection",
    "union": "union",
    "predicted": "predicted",
    "label": "labelled",
}


def without_zero(labels):
    """0 is ignored, 1 becomes class 0, 255 stays ignored."""
    return torch.where(labels == 0, 255, torch.where(labels == 255, 255, labels.long() - 1))


def number(value):
    return float("nan") if value is None else value


@pytest.mark.parametrize("name", golden.names("seg_miou"))
def test_measures(name):
    for info, t in golden.subcases(golden.load(name)):
        num_classes, what = info["num_classes"], f"{name} {info['name']}"
        predicted, labels = t["in.predicted"], t["in.label"]
        if info["reduce_zero_label"]:
            labels = without_zero(labels)
        for image in range(info["images"]):
            pairs = count_pairs(predicted[image], labels[image], num_classes)
            counts = class_counts(pairs[:-2].reshape(num_classes, num_classes))
            for key, ours in COUNTS.items():
                assert torch.equal(getattr(counts, ours), t[f"out.{key}"][image]), f"{what} {key}"

        meter = ConfusionMeter(num_classes, "cpu")
        meter.update_labels(predicted, labels)
        result = meter.compute(Distributed(torch.device("cpu")))
        for key, ours in {"iou": "iou_per_class", "acc": "accuracy_per_class"}.items():
            mine = torch.tensor([number(value) for value in result[ours]])
            torch.testing.assert_close(
                mine, 100 * t[f"out.{key}"], atol=1e-4, rtol=0, equal_nan=True
            )
        for key in ("mIoU", "mAcc", "aAcc"):
            value, expected = result[key.lower()], number(info[key])
            assert value == pytest.approx(expected, abs=1e-4, nan_ok=True), f"{what} {key}"
            rounded = number(info["rounded"][key])
            assert np.round(value, 2) == pytest.approx(rounded, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("name", golden.names("seg_slide"))
def test_windows(name):
    case = golden.load(name)
    size = case.tensors["input.image"].shape[-2:]
    crop, stride = case.info["crop"], case.info["stride"]
    places = windows(size, crop, stride)
    assert places == [tuple(place) for place in case.info["windows_top_left"]]
    for kept in case.group("mid.keep_origin.").values():
        assert len(kept) == len(places)
    if "mid.count" in case.tensors:
        count = case.tensors["mid.count"][0, 0]
        assert torch.equal(coverage(size, crop, stride), count.float())
