"""What happens to a video between its file and the model: frames are chosen, read, and treated
alike.

In training a video becomes one or several augmented clips [3, T, H, W] of the same frames, in
evaluation V views [V, 3, T, H, W]. T frames; H, W pixels. Source: VideoMamba's recipes (arXiv
2403.06977).
"""

import copy
import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from utils.errors import UsageError
from utils.images import MEAN, STD

from .frames import Parts, Sampling, centre, crop_starts, short_side
from .images import BadImageError
from .video import FrameFolder, Video

_MAGNITUDES = 31  # of torchvision; 10 in the names of policies
_GREY = 128


class RandomOperations(v2.Transform):
    """RandAugment with one draw for all frames, from timm's name of a policy.

    `rand-m7-n4-mstd0.5`: four operations of a magnitude of 7 out of 10, with a deviation of 0.5,
    each applied with a probability of one half, as timm does. The operations are torchvision's,
    bilinear. Raises UsageError for another kind of policy.
    """

    def __init__(self, policy: str):
        super().__init__()
        kind, *settings = policy.split("-")
        values = dict(
            match.groups()
            for word in settings
            if (match := re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", word))
        )
        if kind != "rand" or len(values) != len(settings) or values.keys() - _SETTINGS:
            raise UsageError(f"--aa {policy!r}: of clips only rand-mM-nN-mstdS-inc1 is known")
        self.magnitude, self.deviation = float(values.get("m", 10)), float(values.get("mstd", 0))
        self.operations = [
            v2.RandAugment(1, step, _MAGNITUDES, InterpolationMode.BILINEAR, fill=_GREY)
            for step in range(_MAGNITUDES)
        ]
        self.count = int(float(values.get("n", 2)))

    def forward(self, clip: Any) -> Any:
        for _ in range(self.count):
            if random.random() > 0.5:
                continue
            magnitude = min(max(random.gauss(self.magnitude, self.deviation), 0.0), 10.0)
            clip = self.operations[round(magnitude / 10 * (_MAGNITUDES - 1))](clip)
        return clip


_SETTINGS = {"m", "n", "mstd", "inc"}


def clip_augmentation(
    size: int, policy: str | None, hflip: float, erasing: float, area: Sequence[float] = (0.08, 1.0)
) -> v2.Transform:
    """Augmentation of a clip [T, 3, H, W] uint8 -> [T, 3, size, size], normalised.

    policy: see `RandomOperations`; None for none. hflip, erasing: probabilities. area: of the crop.
    """
    steps = [] if policy is None else [RandomOperations(policy)]
    return v2.Compose(
        [
            *steps,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomResizedCrop(size, tuple(area), (0.75, 4 / 3), antialias=False),
            v2.RandomHorizontalFlip(hflip),
            v2.RandomErasing(erasing, value="random"),
        ]
    )


class TrainClips:
    """A video -> `repeats` augmented clips [3, T, H, W] of the same frames, and the target of each.

    Each clip is an example of its own in the batch; the video is decoded once.
    """

    def __init__(
        self, sampling: Sampling, frames: int, augment: Callable[[Any], Tensor], repeats: int = 1
    ):
        self.sampling, self.frames, self.augment = sampling, frames, augment
        self.repeats = repeats

    def __call__(self, video: Video, target: Any) -> tuple[list[Tensor], list[Any]]:
        wanted = self.sampling.train(len(video), self.frames, random.randint)
        clip = tv_tensors.Video(_channels_second(video.read(wanted)))
        clips = [self.augment(clip).transpose(0, 1) for _ in range(self.repeats)]
        return clips, [target] * self.repeats


class EvalViews:
    """A video -> its views [V, 3, T, side, side], or a single one [3, T, side, side].

    They are in the order of the segments, and in each of the crops.

    One segment and one crop are those of a validation: the middle of the video and of its frames.
    All frames are read at once.

    Args:
        resized: short side that frames are resized to.
        side: of the crops.
        shuffled: put the frames of each clip in a random order, which its pixels decide.
    """

    def __init__(
        self,
        sampling: Sampling,
        frames: int,
        side: int,
        resized: int | None = None,
        segments: int = 1,
        crops: int = 1,
        shuffled: bool = False,
    ):
        self.sampling, self.frames, self.side = sampling, frames, side
        self.resized = side if resized is None else resized
        self.segments, self.crops, self.shuffled = segments, crops, shuffled

    def several(self, segments: int, crops: int) -> "EvalViews":
        """The same with other numbers of views."""
        views = copy.copy(self)
        views.segments, views.crops = segments, crops
        return views

    def chosen(self, video: Video) -> list[list[int]]:
        """The frame numbers of each segment."""
        sampling, frames = self.sampling, len(video)
        if isinstance(sampling, Parts):
            sampling = Parts(folders=isinstance(video, FrameFolder))
        if self.segments == 1:
            return [sampling.middle(frames, self.frames)]
        return [
            sampling.view(frames, self.frames, segment, self.segments)
            for segment in range(self.segments)
        ]

    def __call__(self, video: Video, target: Any) -> tuple[Tensor, Any]:
        wanted = [index for segment in self.chosen(video) for index in segment]
        frames = _channels_second(video.read(wanted))
        height, width = short_side(*frames.shape[-2:], self.resized)
        if max(height, width) > 100 * self.resized:
            raise BadImageError(f"too narrow: {frames.shape[-1]} x {frames.shape[-2]} pixels")
        frames = F.resize(frames, [height, width], antialias=False)
        starts = (
            [centre(height, width, self.side)]
            if self.crops == 1
            else crop_starts(height, width, self.side, self.crops)
        )
        clips = frames.unflatten(0, (self.segments, self.frames))
        if self.shuffled:
            clips = torch.stack([clip[_order_of(clip)] for clip in clips])
        views = torch.stack(
            [
                clips[:, :, :, top : top + self.side, left : left + self.side]
                for top, left in starts
            ],
            dim=1,
        )
        views = F.normalize(F.to_dtype(views.flatten(0, 1), torch.float32, scale=True), MEAN, STD)
        views = views.transpose(1, 2)
        return views[0] if len(views) == 1 else views, target


def _order_of(clip: Tensor) -> Tensor:
    """A random order of the frames [T, ...] of a clip, the same whenever it is read."""
    generator = torch.Generator().manual_seed(zlib.crc32(clip.numpy().tobytes()))
    return torch.randperm(len(clip), generator=generator)


def _channels_second(frames) -> Tensor:
    """[T, H, W, 3] -> [T, 3, H, W]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2)
