"""Videos as the model sees them: one draw for all frames, views where they belong."""

import random

import numpy as np
import pytest
import torch
from helpers.videos import numbered, numbers_of
from torchvision.transforms import v2

from loading.clip_transforms import EvalViews, RandomOperations, TrainClips, clip_augmentation
from loading.frames import Dense, Parts, Uniform
from loading.images import BadImageError
from loading.loaders import Sample, collate
from loading.video import Video
from utils.errors import UsageError
from utils.images import MEAN, STD


class Frames(Video):
    """A video in memory that notes what is read of it."""

    def __init__(self, frames: np.ndarray):
        self.frames, self.calls = frames, []

    def __len__(self) -> int:
        return len(self.frames)

    def read(self, indices):
        self.calls.append(list(indices))
        return self.frames[list(indices)]


def pixels(clip: torch.Tensor) -> np.ndarray:
    """A normalised clip [3, T, H, W] -> [T, H, W, 3] uint8."""
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (MEAN, STD))
    return ((clip * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    torch.manual_seed(0)


def test_a_validation_sees_the_middle():
    video = Frames(numbered(80, 64, 96))
    views, target = EvalViews(Uniform(), 8, 64)(video, 3)
    assert views.shape == (3, 8, 64, 64) and target == 3
    assert video.calls == [Uniform().middle(80, 8)]
    assert np.array_equal(pixels(views), video.frames[video.calls[0]][:, :, 16:80])


@pytest.mark.parametrize("sampling", [Uniform(), Dense(2), Parts()])
def test_views_are_segments_and_in_them_crops(sampling):
    video = Frames(numbered(80, 64, 96))
    views, _ = EvalViews(sampling, 8, 64, segments=2, crops=3)(video, 0)
    assert views.shape == (6, 3, 8, 64, 64)
    [read] = video.calls
    assert len(read) == 16, "one decode for all views"
    for number, view in enumerate(views):
        segment, crop = divmod(number, 3)
        wanted = sampling.view(80, 8, segment, 2)
        left = (0, 16, 32)[crop]
        assert np.array_equal(pixels(view), video.frames[wanted][:, :, left : left + 64])


@pytest.mark.parametrize(
    "height, width", [(48, 64), (64, 48), (100, 100), (31, 77), (187, 187), (196, 196)]
)
def test_frames_are_resized_by_their_short_side(height, width):
    video = Frames(numbered(10, height, width))
    views, _ = EvalViews(Uniform(), 4, 32, resized=40, segments=3, crops=5)(video, 0)
    assert views.shape == (15, 3, 4, 32, 32)


def test_a_crop_that_exceeds_the_frames():
    with pytest.raises(ValueError, match="smaller than a crop of 48"):
        EvalViews(Uniform(), 4, 48, resized=40, crops=3)(Frames(numbered(5)), 0)


def test_a_strip_of_pixels_is_refused():
    strip = Frames(np.zeros((4, 2, 600, 3), np.uint8))
    with pytest.raises(BadImageError, match="too narrow: 600 x 2"):
        EvalViews(Uniform(), 4, 224)(strip, 0)


def test_all_frames_of_a_clip_are_augmented_alike():
    """A video that stands still stays one, in each version; the versions differ."""
    still = Frames(np.repeat(numbered(7)[-1:], 12, axis=0))
    augment = clip_augmentation(32, "rand-m7-n4-mstd0.5-inc1", 0.5, 1.0)
    clips, targets = TrainClips(Uniform(), 8, augment, repeats=4)(still, 5)
    assert targets == [5] * 4 and len(still.calls) == 1
    for clip in clips:
        assert clip.shape == (3, 8, 32, 32) and clip.dtype == torch.float32
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
    assert not any(torch.equal(clips[0], other) for other in clips[1:])


def test_training_follows_the_generator_alone():
    video, augment = Frames(numbered(60)), clip_augmentation(32, "rand-m9-mstd0.5", 0.5, 0.25)
    results = []
    for _ in range(2):
        random.seed(1)
        torch.manual_seed(1)
        results.append(TrainClips(Uniform(), 4, augment)(video, 0)[0][0])
    assert torch.equal(*results) and video.calls[0] == video.calls[1]


def test_without_augmentation_but_the_crop_colours_stay():
    augment = clip_augmentation(32, None, 0.0, 0.0, area=(1.0, 1.0))
    [clip], _ = TrainClips(Parts(), 4, augment)(Frames(numbered(4, 64, 64)), 0)
    assert numbers_of(pixels(clip)) == [0, 1, 2, 3]


def test_magnitudes_have_the_policys_mean_and_deviation(monkeypatch):
    drawn = []
    monkeypatch.setattr(v2.RandAugment, "forward", lambda self, clip: drawn.append(self.magnitude))
    operations = RandomOperations("rand-m5-n2-mstd0.5-inc1")
    for _ in range(500):
        operations(None)
    assert 450 < len(drawn) < 550, "one half of them"
    assert np.mean(drawn) == pytest.approx(15, abs=0.3) and np.std(drawn) == pytest.approx(
        1.5, abs=0.2
    )


@pytest.mark.parametrize("policy", ["augmix-m3", "rand-m9-x3", "rand-loud", "rand-m1.2.3"])
def test_other_policies_are_refused(policy):
    with pytest.raises(UsageError, match="rand-mM-nN-mstdS-inc1"):
        RandomOperations(policy)


def test_versions_are_examples_of_the_batch():
    samples = [
        Sample([torch.zeros(2), torch.ones(2)], [torch.tensor(4), torch.tensor(4)], 7),
        Sample(None, problems=[("a.mp4", "damaged")]),
        Sample([torch.full((2,), 2.0)], [torch.tensor(5)], 9),
    ]
    batch = collate(samples)
    assert batch.images[:, 0].tolist() == [0, 1, 2] and batch.targets.tolist() == [4, 4, 5]
    assert batch.indices.tolist() == [7, 7, 9] and batch.problems == [("a.mp4", "damaged")]
