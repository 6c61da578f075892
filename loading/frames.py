"""Which frames of a video a clip shows, and which part of them a view shows.

A sampling returns `count` frame numbers, ascending in [0, frames), of a video of that many frames;
a short video repeats some. `train` draws at random, `middle` is the one view of a validation,
`view` one of several, counted from 0. Source: VideoMamba's release (arXiv 2403.06977), its recipes
for Kinetics (`Uniform`) and Something-Something (`Parts`), and its reader of frames at a fixed
distance (`Dense`), whose validation clip lies one length too early; here it is the middle.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

RandInt = Callable[[int, int], int]
"""A random integer between two bounds, both included; `random.randint`."""


class Sampling(Protocol):
    """How the frames of a clip are chosen."""

    def train(self, frames: int, count: int, randint: RandInt) -> list[int]: ...

    def middle(self, frames: int, count: int) -> list[int]: ...

    def view(self, frames: int, count: int, view: int, views: int) -> list[int]: ...


class Uniform:
    """T equal stretches of the whole video, a frame in each. Their ends are rounded half to even
    and belong to both neighbours.
    """

    def train(self, frames: int, count: int, randint: RandInt) -> list[int]:
        step = (frames - 1) / count
        return [randint(round(step * i), round(step * (i + 1))) for i in range(count)]

    def middle(self, frames: int, count: int) -> list[int]:
        return self.view(frames, count, 0, 1)

    def view(self, frames: int, count: int, view: int, views: int) -> list[int]:
        """At (view + 1) / (views + 1) of each stretch."""
        step = (frames - 1) / count
        offset = int(step * (view + 1) / (views + 1))
        return [min(round(step * i) + offset, frames - 1) for i in range(count)]


@dataclass(frozen=True)
class Dense:
    """T frames at a distance of about `rate` frames."""

    rate: int = 4

    def train(self, frames: int, count: int, randint: RandInt) -> list[int]:
        length = count * self.rate
        if frames <= length:
            return self._stretched(frames, count)
        return self._clip(randint(0, frames - 1 - length), count)

    def middle(self, frames: int, count: int) -> list[int]:
        """The clip in the middle, spaced as in training."""
        length = count * self.rate
        if frames <= length:
            return self._stretched(frames, count)
        return self._clip((frames - length) // 2, count)

    def view(self, frames: int, count: int, view: int, views: int) -> list[int]:
        """Starts are spread evenly; a short video repeats its last frame."""
        free = max(frames - count * self.rate, 0)
        start = int(view * free / (views - 1)) if views > 1 else free // 2
        last = start + (frames - 1 - start) // self.rate * self.rate
        return [min(start + self.rate * i, last) for i in range(count)]

    def _clip(self, start: int, count: int) -> list[int]:
        """From `start` to its end, both ends included, so that the distance is a little larger."""
        end = start + count * self.rate
        places = np.linspace(start, end, count)
        return [min(int(place), end - 1) for place in places]

    def _stretched(self, frames: int, count: int) -> list[int]:
        """A video that is too short, from its first frame to its last, which is repeated."""
        found = frames // self.rate
        places = [int(place) for place in np.linspace(0, frames, found)]
        return [min(place, frames - 1) for place in places + [frames] * (count - found)]


@dataclass(frozen=True)
class Parts:
    """T parts of n // T frames, a frame in each. A video of fewer frames begins with its first one
    repeated.

    folders: the validation of VideoMamba's reader of folders of frames, whose parts are whole.
    """

    folders: bool = False

    def train(self, frames: int, count: int, randint: RandInt) -> list[int]:
        part = frames // count
        if not part:
            return self._padded(frames, count)
        return [part * i + randint(0, part - 1) for i in range(count)]

    def middle(self, frames: int, count: int) -> list[int]:
        """The middle of every T-th of the video."""
        if self.folders:
            part = frames // count
            if not part:
                return self._padded(frames, count)
            return [part * i + part // 2 for i in range(count)]
        return [int(frames / count * (i + 0.5)) for i in range(count)]

    def view(self, frames: int, count: int, view: int, views: int) -> list[int]:
        """The views' frames are dealt out in turn, so that all see different ones if there are
        enough.
        """
        pooled = sorted(
            int(frames / count * (i + place / views))
            for i in range(count)
            for place in range(views)
        )
        return pooled[view::views]

    def _padded(self, frames: int, count: int) -> list[int]:
        return [max(i - (count - frames), 0) for i in range(count)]


SAMPLINGS = ("uniform", "dense", "parts")


def make_sampling(name: str, rate: int) -> Sampling:
    """The sampling of `--frame-sampling`; rate: distance of the frames of `dense`."""
    return {"uniform": Uniform(), "dense": Dense(rate), "parts": Parts()}[name]


def centre(height: int, width: int, side: int) -> tuple[int, int]:
    """Top and left of the square in the middle, as a validation sees it."""
    return round((height - side) / 2), round((width - side) / 2)


def short_side(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of frames resized to a short side; the long one is rounded down."""
    if height <= width:
        return side, side * width // height
    return side * height // width, side


def crop_starts(height: int, width: int, side: int, crops: int) -> list[tuple[int, int]]:
    """Top and left of `crops` squares of a side, spread along the longer side from end to end.

    Raises ValueError for frames smaller than the squares.
    """
    if min(height, width) < side:
        raise ValueError(f"frames of {height} x {width} pixels are smaller than a crop of {side}")
    free = max(height, width) - side
    places = [free // 2]
    if crops > 1:
        places = [int(free / (crops - 1) * crop) for crop in range(crops)]
    if height > width:
        return [(place, (width - side) // 2) for place in places]
    return [((height - side) // 2, place) for place in places]


def parts_of(seconds: float, length: float, stride: float) -> list[tuple[float, float]]:
    """(start, end) in seconds of the parts of a long video: one of `length` every `stride`, as long
    as more than half of it lies in the video. A shorter video is one part.
    """
    if seconds < length:
        return [(0.0, seconds)]
    count = max(math.ceil((seconds - length / 2) / stride), 1)
    return [(i * stride, min(i * stride + length, seconds)) for i in range(count)]


def frames_of_part(start: float, end: float, rate: float, frames: int) -> range:
    """The frames from `start` to `end` seconds, both included, of a video with `rate` frames a
    second; at least one.
    """
    first = min(int(start * rate), frames - 1)
    return range(first, max(min(int(end * rate), frames - 1), first) + 1)
