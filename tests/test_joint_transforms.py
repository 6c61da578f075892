"""The transforms of an image with its label map: sizes, geometry, limits, colours."""

import colorsys
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Mask

from loading import joint_transforms
from loading.joint_transforms import (
    BalancedCrop,
    PadTo,
    PhotometricDistortion,
    ResizeToFit,
    SegmentationAugmentation,
    change_colours,
    fitted_size,
    segmentation_eval_transform,
    segmentation_train_transform,
)
from utils.images import MEAN, STD
from utils.seeding import random_state

GEOMETRY = SegmentationAugmentation(crop=(48, 64), photometric=False)


def blocks(height: int, width: int, side: int = 16, ignored: bool = True, seed: int = 0):
    """An image of squares of one colour, and their classes 0 ... 9, or 255 in the last column.

    The red channel is 20 times the class; the image of ignored pixels is white.
    """
    classes = np.random.RandomState(seed).randint(0, 10, (-(-height // side), -(-width // side)))
    if ignored:
        classes[:, -1] = 255
    labels = np.kron(classes, np.ones((side, side), int))[:height, :width].astype(np.uint8)
    image = np.stack([np.where(labels == 255, 255, labels * 20)] * 3, axis=-1).astype(np.uint8)
    return Image.fromarray(image), Mask(torch.from_numpy(labels))


def denormalised(image: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (image * std + mean) * 255


def inside(labels: torch.Tensor) -> torch.Tensor:
    """Where all pixels up to 3 away have one class: bilinear resizing mixes no others there."""
    around = torch.nn.functional.pad(labels[None, None].float(), (3, 3, 3, 3), value=-1)
    windows = around.unfold(2, 7, 1).unfold(3, 7, 1).flatten(4)[0, 0]
    return windows.amin(-1) == windows.amax(-1)


@pytest.mark.parametrize("shape", [(60, 90), (48, 64), (33, 200), (20, 20), (200, 33)])
def test_image_and_label_map_stay_together(shape):
    transform = segmentation_train_transform(GEOMETRY)
    compared = 0
    for seed in range(30):
        with random_state(seed):
            image, labels = transform(*blocks(*shape, seed=seed))
        assert type(image) is type(labels) is torch.Tensor
        assert (image.shape, image.dtype) == ((3, 48, 64), torch.float32)
        assert (labels.shape, labels.dtype) == ((48, 64), torch.int64)
        assert set(labels.unique().tolist()) <= {*range(10), 255}
        sure = inside(labels) & (labels != 255)
        colours = denormalised(image)[0]
        assert torch.allclose(colours[sure], 20.0 * labels[sure], atol=1)
        compared += int(sure.sum())
    assert compared > 1000


def test_padding_is_zero_right_and_below_and_ignored():
    augmentation = SegmentationAugmentation(64, (0.5, 0.5), photometric=False)
    image, labels = segmentation_train_transform(augmentation)(*blocks(60, 90, ignored=False))
    assert fitted_size((60, 90), 128, 32) == (32, 48)
    assert (labels[:32, :48] < 10).all()
    for rows, columns in ((slice(32, None), slice(None)), (slice(None), slice(48, None))):
        assert (labels[rows, columns] == 255).all() and (image[:, rows, columns] == 0).all()
    assert not (image[:, :32, :48] == 0).all(dim=0).any()


def test_padding_alone():
    image, mask = PadTo((5, 4))(
        F.to_image(Image.new("RGB", (6, 2), "white")), Mask(torch.ones(2, 6))
    )
    assert image.shape == (3, 5, 6) and mask.shape == (5, 6)
    assert (mask[2:] == 255).all() and (mask[:2] == 1).all() and (image[:, 2:] == 0).all()


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (1, 100), (3, 2), (257, 131)])
def test_odd_and_tiny_shapes(shape):
    image = Image.new("RGB", shape[::-1], "red")
    for seed in range(10):
        with random_state(seed):
            results = segmentation_train_transform(SegmentationAugmentation((24, 40)))(
                image, Mask(torch.zeros(shape, dtype=torch.uint8))
            )
        assert [tuple(result.shape) for result in results] == [(3, 24, 40), (24, 40)]
        assert (results[1] == 0).any()
    results = segmentation_eval_transform(32)(image, Mask(torch.zeros(shape, dtype=torch.uint8)))
    assert results[0].shape[1:] == fitted_size(shape, 128, 32) and results[1].shape == shape


@pytest.mark.parametrize(
    "size, expected",
    [
        ((512, 683), (512, 683)),
        ((256, 341), (512, 682)),
        ((683, 512), (683, 512)),
        ((375, 500), (512, 683)),  # 500 * 512 / 375 = 682.67
        ((512, 2048), (512, 2048)),
        ((300, 2400), (256, 2048)),  # more than 4 to 1: the long side limits
        ((1, 100), (20, 2048)),
        ((1333, 1999), (512, 768)),
    ],
)
def test_sizes_at_evaluation(size, expected):
    assert fitted_size(size, 2048, 512) == expected
    factor = min(2048 / max(size), 512 / min(size))
    assert expected == tuple(int(side * factor + 0.5) for side in size)


def test_evaluation_keeps_the_label_map_and_takes_an_image_alone():
    image, mask = blocks(30, 50)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    seen, labels = segmentation_eval_transform()(image, mask)
    assert type(seen) is type(labels) is torch.Tensor and labels.dtype == torch.int64
    assert torch.equal(labels, mask.long()) and seen.dtype == torch.float32
    assert torch.allclose(denormalised(seen), pixels.float(), atol=1e-3)
    seen, labels = segmentation_eval_transform(60)(image, mask)
    assert seen.shape == (3, 60, 100) and torch.equal(labels, mask.long())
    assert torch.equal(segmentation_eval_transform(60)(image), seen)
    black, _ = segmentation_eval_transform()(Image.new("RGB", (2, 2)), mask[:2, :2])
    expected = [-123.675 / 58.395, -116.28 / 57.12, -103.53 / 57.375]
    assert black[:, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_scale_is_uniform_within_its_bounds():
    """Both sides get one factor; for an image of the base size it is the drawn number."""
    image, mask = blocks(100, 150)
    resize = ResizeToFit(100, (0.5, 2.0))
    heights = []
    for seed in range(400):
        torch.manual_seed(seed)
        height, width = resize.make_params([mask])["size"]
        assert abs(width - 1.5 * height) <= 0.76
        heights.append(height)
    assert 50 <= min(heights) < 53 and 197 < max(heights) < 200
    quarters = np.histogram(heights, bins=np.linspace(50, 200, 5))[0]
    assert quarters.min() > 75
    torch.manual_seed(0)
    resized, labels = resize(F.to_image(image), mask)
    assert resized.shape[1:] == labels.shape == (heights[0], resized.shape[2])


def test_resizing_follows_the_formulas():
    """Bilinear between the centres of pixels; the label of the pixel whose centre is nearest."""
    image = np.random.RandomState(0).randint(0, 256, (5, 7, 3), dtype=np.uint8)
    labels = np.random.RandomState(1).randint(0, 9, (5, 7), dtype=np.uint8)
    resized, nearest = ResizeToFit(3)(F.to_image(image), Mask(torch.from_numpy(labels)))
    assert resized.shape == (3, 3, 4) and isinstance(nearest, Mask)
    y, x = ((np.arange(n) + 0.5) * size / n - 0.5 for n, size in ((3, 5), (4, 7)))
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    down, right = (y - top)[:, None, None], (x - left)[None, :, None]
    rows = image[top] * (1 - down) + image[top + 1] * down
    expected = rows[:, left] * (1 - right) + rows[:, left + 1] * right
    assert np.abs(resized.permute(1, 2, 0).numpy() - expected).max() <= 1
    assert np.array_equal(
        nearest.numpy(), labels[np.rint(y).astype(int)][:, np.rint(x).astype(int)]
    )


def stripe(share: float) -> Mask:
    """64 x 64: class 3 in the left `share` of the columns, class 5 in the others."""
    labels = torch.full((64, 64), 5, dtype=torch.uint8)
    labels[:, : int(64 * share)] = 3
    return Mask(labels)


def largest_shares(mask: Mask, limit: float, seeds: int = 40) -> list[float]:
    crop, shares = BalancedCrop((32, 32), limit), []
    for seed in range(seeds):
        torch.manual_seed(seed)
        counts = torch.bincount(crop(mask).flatten(), minlength=256)[:255]
        shares.append(float(counts.max() / counts.sum()))
    return shares


def test_one_class_is_limited():
    free, limited = (largest_shares(stripe(0.5), limit) for limit in (1.0, 0.75))
    assert max(free) == 1 and sum(share < 0.75 for share in free) < 30
    assert sum(share >= 0.75 for share in limited) <= 1  # (1/2)^11: all eleven draws


def test_ignored_pixels_do_not_count_in_the_limit():
    """Class 3 and ignored pixels alone: one class, so no draw is good enough."""
    mask = stripe(0.5)
    mask[mask == 5] = 255
    crop = BalancedCrop((32, 32), 0.75)
    assert not crop._is_balanced(mask)
    mask[:8, 40:] = 5  # 2048 pixels of class 3 and 192 of class 5
    assert not crop._is_balanced(mask)
    mask[:, :20] = 255  # 768 and 192: .8 of the labelled pixels, .19 of all
    assert not crop._is_balanced(mask)
    mask[:, :24] = 255  # 512 and 192: .73
    assert crop._is_balanced(mask)
    assert not crop._is_balanced(Mask(torch.full((4, 4), 255, dtype=torch.uint8)))
    three_quarters = Mask(torch.tensor([[1, 1], [1, 2]], dtype=torch.uint8))
    assert not crop._is_balanced(three_quarters)  # less than .75, not .75 itself


def test_a_crop_is_drawn_eleven_times_at_most(monkeypatch):
    draws = []
    draw = BalancedCrop._draw

    def counted(self, mask):
        draws.append(draw(self, mask))
        return draws[-1]

    monkeypatch.setattr(BalancedCrop, "_draw", counted)
    uniform = Mask(torch.zeros(64, 64, dtype=torch.uint8))
    params = BalancedCrop((32, 32), 0.75).make_params([uniform])
    assert len(draws) == 11 and params == draws[-1]
    BalancedCrop((32, 32), 1.0).make_params([uniform])
    assert len(draws) == 12


def test_crops_reach_every_border():
    mask = Mask(torch.arange(20, dtype=torch.uint8)[:, None] * 10 + torch.arange(10).byte())
    corners = set()
    for seed in range(400):
        torch.manual_seed(seed)
        crop = BalancedCrop((18, 12), 1.0)(mask)
        assert crop.shape == (18, 10)
        corners.add(int(crop[0, 0]))
    assert corners == {0, 10, 20}


def test_the_flip_is_a_fair_coin_and_can_be_left_out():
    image, mask = blocks(48, 64, ignored=False)
    for flip, expected in ((0.0, {0}), (1.0, {100}), (0.5, range(30, 71))):
        augmentation = SegmentationAugmentation((48, 64), (1.0, 1.0), 1.0, flip, False)
        transform = segmentation_train_transform(augmentation)
        flipped = 0
        for seed in range(100):
            torch.manual_seed(seed)
            labels = transform(image, mask)[1]
            same = torch.equal(labels, mask.long())
            assert same or torch.equal(labels, mask.long().flip(1))
            flipped += not same
        assert flipped in expected


def test_the_same_seed_gives_the_same_result_also_in_another_process():
    transform = segmentation_train_transform(SegmentationAugmentation(48))
    copy = pickle.loads(pickle.dumps(transform))
    images = set()
    for seed in range(20):
        with random_state(seed):
            image, labels = transform(*blocks(60, 90))
        torch.manual_seed(seed)  # torch's generator alone decides
        again, same_labels = copy(*blocks(60, 90))
        assert torch.equal(image, again) and torch.equal(labels, same_labels)
        images.add(image.numpy().tobytes())
    assert len(images) == 20


def every_colour() -> torch.Tensor:
    levels = torch.tensor([0, 1, 50, 127, 128, 200, 254, 255], dtype=torch.uint8)
    return torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).reshape(3, 8, 64)


@pytest.mark.parametrize(
    "saturation, hue", [(1.0, 0), (0.5, 0), (1.5, 0), (1.0, 34), (1.0, -36), (1.3, 20)]
)
def test_saturation_and_hue_follow_their_definition(saturation, hue):
    pixels = every_colour()
    changed = change_colours(pixels, saturation, hue)
    assert changed.dtype == torch.uint8
    for colour, found in zip(
        pixels.flatten(1).T.tolist(), changed.flatten(1).T.tolist(), strict=True
    ):
        h, s, v = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
        expected = colorsys.hsv_to_rgb((h + hue / 360) % 1, min(s * saturation, 1), v)
        assert found == pytest.approx([255 * channel for channel in expected], abs=0.51)


def test_photometric_distortion_stays_in_its_ranges(monkeypatch):
    image, mask = blocks(8, 8)
    image = F.to_image(image)
    drawn = []
    for seed in range(400):
        torch.manual_seed(seed)
        drawn.append(PhotometricDistortion().make_params([image]))
    for name, low, high, neutral in (
        ("brightness", -32, 32, 0),
        ("contrast", 0.5, 1.5, 1),
        ("saturation", 0.5, 1.5, 1),
        ("hue", -36, 34, 0),
    ):
        values = np.array([params[name] for params in drawn])
        changed = values[values != neutral]
        assert 160 < len(changed) < 240 and low <= changed.min() and changed.max() <= high
        assert changed.min() < low + (high - low) / 20 and changed.max() > high - (high - low) / 20
    assert {params["hue"] for params in drawn} == set(range(-36, 35, 2))
    assert 160 < sum(params["contrast_last"] for params in drawn) < 240

    same = PhotometricDistortion()(image, mask)[1]
    assert same is mask
    distortion = PhotometricDistortion()
    neutral = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0}
    for change, expected in (
        ({}, [0, 100, 250]),
        ({"brightness": 10.7}, [10, 110, 255]),
        ({"brightness": -10.5}, [0, 89, 239]),
        ({"contrast": 1.25}, [0, 125, 255]),
        ({"contrast": 0.5, "brightness": 20.0}, [10, 60, 127]),
        ({"contrast": 0.5, "saturation": 1.5}, [0, 50, 125]),
    ):
        grey = F.to_image(np.array([[[0] * 3, [100] * 3, [250] * 3]], dtype=np.uint8))
        for last in (False, True):
            found = distortion.transform(grey, {**neutral, "contrast_last": last, **change})
            assert found[0, 0].tolist() == found[2, 0].tolist() == expected, (change, last)


def test_the_defaults_are_the_recipe_of_ade20k():
    assert SegmentationAugmentation() == SegmentationAugmentation(512, (0.5, 2.0), 0.75, 0.5, True)
    assert (joint_transforms.ASPECT * 512, joint_transforms.CROP_ATTEMPTS) == (2048, 10)
