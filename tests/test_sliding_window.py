"""Sliding windows against a loop in numpy; huge images in bands, with the memory they take."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.shell import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from tasks.sliding_window import (
    coverage,
    label_bands,
    labels_of,
    parts_of,
    sliding_labels,
    sliding_logits,
    windows,
)

# Image, crop, stride: divisible or not, smaller than the crop in one axis or both, one pixel wide.
SIZES = [
    ((24, 24), (8, 8), (4, 4)),
    ((25, 31), (8, 8), (5, 5)),
    ((29, 23), (16, 8), (11, 5)),
    ((17, 40), (16, 16), (16, 16)),
    ((5, 40), (8, 8), (5, 3)),
    ((6, 7), (8, 9), (5, 5)),
    ((1, 33), (8, 8), (5, 5)),
    ((33, 1), (8, 8), (5, 5)),
    ((1, 1), (4, 4), (1, 1)),
    ((8, 8), (8, 8), (8, 8)),
]


def forward(images):
    """Four classes at half the resolution, each window different from its neighbours."""
    pooled = F.avg_pool2d(images, 2, ceil_mode=True)
    mean = images.mean((2, 3), keepdim=True)
    return torch.cat([pooled + mean, (pooled * pooled).sum(1, keepdim=True) - mean[:, :1]], 1)


def naive_windows(size, crop, stride):
    """From the definition: as many as it takes to reach the border, the last one moved back."""
    places = []
    for length, c, s in zip(size, crop, stride, strict=True):
        starts = [0]
        while starts[-1] + c < length:
            starts.append(starts[-1] + s)
        if starts[-1] + c > length:
            starts[-1] = max(length - c, 0)
        places.append(starts)
    return [(top, left) for top in places[0] for left in places[1]]


def naive_logits(image, crop, stride):
    """One window after another, in float64."""
    size = image.shape[-2:]
    total, count = np.zeros((4, *size)), np.zeros(size)
    for top, left in naive_windows(size, crop, stride):
        window = torch.zeros(1, 3, *crop)
        part = image[:, top : top + crop[0], left : left + crop[1]]
        h, w = part.shape[-2:]
        window[0, :, :h, :w] = part
        logits = F.interpolate(forward(window), crop, mode="bilinear", align_corners=False)
        total[:, top : top + h, left : left + w] += logits[0, :, :h, :w].numpy()
        count[top : top + h, left : left + w] += 1
    return total / count, count


def random_images(count, size):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size, crop, stride", SIZES)
def test_positions_and_coverage(size, crop, stride):
    assert windows(size, crop, stride) == naive_windows(size, crop, stride)
    _, count = naive_logits(random_images(1, size)[0], crop, stride)
    assert np.array_equal(coverage(size, crop, stride).numpy(), count)
    assert count.min() >= 1


def test_positions_of_ade20k():
    """Crop 512, stride 341: 683 pixels wide, and one more than two windows reach."""
    assert windows((512, 683), (512, 512), (341, 341)) == [(0, 0), (0, 171)]
    assert windows((512, 854), (512, 512), (341, 341)) == [(0, 0), (0, 341), (0, 342)]


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_must_not_leave_a_gap(stride):
    with pytest.raises(ValueError, match="stride"):
        windows((20, 20), (8, 8), (stride, 4))


@pytest.mark.parametrize("size, crop, stride", SIZES)
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_mean_logits(size, crop, stride, batch):
    images = random_images(2, size)
    seen = []

    def counted(windows):
        seen.append(len(windows))
        assert windows.shape[-2:] == crop
        return forward(windows)

    logits = sliding_logits(counted, images, crop, stride, batch)
    assert logits.shape == (2, 4, *size)
    for image, mine in zip(images, logits, strict=True):
        expected, _ = naive_logits(image, crop, stride)
        np.testing.assert_allclose(mine.numpy(), expected, atol=2e-6, rtol=1e-5)
    assert sum(seen) == 2 * len(windows(size, crop, stride))
    assert max(seen) <= batch and all(number == batch for number in seen[:-1])


@pytest.mark.parametrize("size, crop, stride", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_bands_give_the_same_labels(size, crop, stride, batch):
    image = random_images(1, size)
    expected = labels_of(sliding_logits(forward, image, crop, stride, batch))[0]
    end = 0
    for top, labels in label_bands(forward, parts_of(image[0]), size, crop, stride, batch):
        assert top == end and labels.shape == (len(labels), size[1])
        assert torch.equal(labels, expected[top : top + len(labels)])
        end = top + len(labels)
    assert end == size[0]
    whole = sliding_labels(forward, parts_of(image[0]), size, crop, stride, batch)
    assert whole.dtype == torch.uint8 and torch.equal(whole.long(), expected)


def test_parts_that_are_read_lie_inside():
    size, crop, stride = (29, 23), (16, 8), (11, 5)
    image, asked = random_images(1, size)[0], []

    def read(top, left, height, width):
        asked.append((top, left))
        assert top + height <= size[0] and left + width <= size[1]
        return image[:, top : top + height, left : left + width]

    sliding_labels(forward, read, size, crop, stride)
    assert asked == windows(size, crop, stride)


def test_windows_come_in_order():
    """So that a caller's forward can collect what else the model returns."""
    size, crop, stride = (13, 17), (8, 8), (5, 5)
    image = torch.zeros(1, 3, *size)
    image[0, 0] = torch.arange(size[0])[:, None]
    image[0, 1] = torch.arange(size[1])
    corners = []

    def collecting(windows):
        corners.extend((int(w[0, 0, 0]), int(w[1, 0, 0])) for w in windows)
        return forward(windows)

    sliding_logits(collecting, torch.cat([image, image]), crop, stride, batch=4)
    assert corners == 2 * windows(size, crop, stride)


def test_half_precision_is_summed_in_float32():
    images = random_images(1, (25, 31))
    half = sliding_logits(lambda x: forward(x).bfloat16(), images, (8, 8), (5, 5))
    assert half.dtype == torch.float32


def test_labels_are_resized_before_the_maximum():
    logits = random_images(2, (7, 9))
    resized = F.interpolate(logits, (5, 13), mode="bilinear", align_corners=False)
    assert torch.equal(labels_of(logits, (5, 13)), resized.argmax(1))
    assert torch.equal(labels_of(logits, (7, 9)), logits.argmax(1))
    assert torch.equal(labels_of(logits), logits.argmax(1))


MEMORY = """
import re, sys, torch
from pathlib import Path
from tasks.sliding_window import label_bands, labels_of, sliding_logits
torch.set_num_threads(1)
size, crop, stride, classes = (1536, 2048), (128, 128), (85, 85), 32

def read(top, left, height, width):
    rows, columns = torch.arange(top, top + height), torch.arange(left, left + width)
    return ((rows[:, None] * 7 + columns * 3) % 101).float().expand(3, -1, -1) / 101

def forward(images):
    coarse = images[:, :1, ::4, ::4]
    return coarse * torch.linspace(-1, 1, classes)[:, None, None]

def megabytes():
    # Not getrusage's ru_maxrss: that starts at what the parent process has.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024

for _ in label_bands(forward, read, (150, 150), crop, stride): pass  # what PyTorch loads once
before = megabytes()
if sys.argv[1] == "bands":
    for _ in label_bands(forward, read, size, crop, stride, batch=4): pass
else:
    labels_of(sliding_logits(forward, read(0, 0, *size)[None], crop, stride, batch=4))
print(megabytes() - before)
"""


def test_bands_bound_the_memory():
    """Logits of the whole image take 384 MiB, those of a band 32: measured by the system."""

    def peak(way):
        output = subprocess.run(
            [sys.executable, "-c", MEMORY, way], capture_output=True, text=True, cwd=ROOT
        )
        assert output.returncode == 0, output.stderr
        return float(output.stdout)

    assert peak("whole") > 384, "the measurement sees what it looks for"
    assert peak("bands") < 80


def test_host_does_not_wait():
    """Fake tensors of a GPU have no values that a host could wait for."""
    with FakeTensorMode():
        images = torch.zeros(2, 3, 25, 31, device="cuda")
        logits = sliding_logits(forward, images, (8, 8), (5, 5), batch=4)
        assert labels_of(logits, (20, 20)).device.type == "cuda"
        for _, labels in label_bands(forward, parts_of(images[0]), (25, 31), (8, 8), (5, 5)):
            assert labels.device.type == "cuda"
