"""Lists of videos, as VideoMamba's: `train.csv` and `val.csv` in a folder, an entry on each line,
without a header, separated by commas or blanks.

Labels count from 0; a `classes.txt` beside the lists names them, one on a line.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError, printable

from .class_names import read_names
from .depth import Depth
from .frames import parts_of
from .images import BadImageError, Example, ImageSet
from .video import VideoFile, VideoPart
from .video_sets import Videos

NAMES = "classes.txt"
MAX_CLASSES = 100_000  # of lists without names
MAX_SECONDS = 1e6


class Entry(NamedTuple):
    """A line of a list; `seconds` is the length of the video where the list tells it."""

    path: str
    label: int
    seconds: float = 0.0


class VideoParts(ImageSet):
    """Parts of long videos, each an example of its own.

    Args:
        videos: the whole ones.
        owners: [P] the video that each part is of.
        spans: [P, 2] its start and end in seconds.
    """

    def __init__(self, videos: Videos, owners: Sequence[int], spans):
        super().__init__(videos.labels[owners], videos.classes)
        self.videos = videos
        self.owners, self.spans = np.asarray(owners), np.asarray(spans, dtype=np.float64)

    def set_depth(self, depth: Depth | None) -> None:
        self.videos.set_depth(depth)

    def load(self, index: int) -> Example:
        video, label = self.videos.load(self.owners[index])
        if not isinstance(video, VideoFile):
            raise BadImageError("a folder of frames does not say when each of them is shown")
        return Example(VideoPart(video, *self.spans[index].tolist()), label)

    def describe(self, index: int) -> str:
        start, end = self.spans[index]
        return f"{self.videos.describe(self.owners[index])}, {start:g} to {end:g} s"


def video_list(path: Path, split: str, prefix: Path | None = None) -> Videos:
    """Lists of path and label, or path, number of frames and label, which is not needed.

    prefix: the folder that paths are relative to; None: that of the lists.

    Raises:
        UserError: a line that is no such entry; a first video that is not there.
    """
    return _videos(path, split, prefix, _read(path / f"{split}.csv", timed=False))


def long_video_list(
    path: Path,
    split: str,
    prefix: Path | None = None,
    part_seconds: float = 60.0,
    part_stride: float = 16.0,
) -> VideoParts:
    """Lists of path, label and length in seconds; the videos are cut into parts.

    Args:
        part_seconds, part_stride: length and distance of the parts, see `frames.parts_of`.

    Raises:
        UserError: as in `video_list`.
    """
    entries = _read(path / f"{split}.csv", timed=True)
    parts = [
        (number, span)
        for number, entry in enumerate(entries)
        for span in parts_of(entry.seconds, part_seconds, part_stride)
    ]
    owners, spans = zip(*parts, strict=True)
    return VideoParts(_videos(path, split, prefix, entries), list(owners), spans)


def listed_classes(path: Path) -> list[str] | None:
    """The names in a folder's classes.txt, one on a line; None without one. Raises UserError."""
    file = path / NAMES
    if not file.is_file():
        return None
    return read_names(file)


def _videos(path: Path, split: str, prefix: Path | None, entries: Sequence[Entry]) -> Videos:
    root, file = path if prefix is None else prefix, printable(str(path / f"{split}.csv"))
    first = entries[0].path
    if not (root / first).exists():
        raise UserError(
            f"{file}: its first video {printable(first)} is not in {printable(str(root))}; paths "
            "are relative to that folder, and --prefix names another one"
        )
    labels = [entry.label for entry in entries]
    largest, classes = max(labels), listed_classes(path)
    if classes is None:
        classes = _numbers(path, split, largest, timed=entries[0].seconds > 0)
    elif largest >= len(classes):
        raise UserError(
            f"{file}: label {largest} is beyond the {len(classes)} names in {NAMES}; labels count "
            "from 0"
        )
    return Videos(str(root), [entry.path for entry in entries], labels, classes)


def _numbers(path: Path, split: str, largest: int, timed: bool) -> list[str]:
    """The labels from 0 to the largest one of both lists, which have the same classes."""
    file, other = (path / f"{name}.csv" for name in (split, "val" if split == "train" else "train"))
    if other.is_file():
        largest = max(largest, *(entry.label for entry in _read(other, timed)))
    if largest >= MAX_CLASSES:
        raise UserError(
            f"{printable(str(file))}: the lists have the label {largest}, which can hardly be the "
            f"number of a class; if it is, name all of them in {NAMES}"
        )
    return [str(label) for label in range(largest + 1)]


def _read(file: Path, timed: bool) -> list[Entry]:
    """The entries of a list; timed: with the length of each video. Raises UserError."""
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"{printable(str(file))}: cannot be read ({error.strerror})") from None
    parse = _timed_entry if timed else _entry
    entries = [
        parse(line.strip(), f"{printable(str(file))}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not entries:
        raise UserError(f"{printable(str(file))}: it lists no videos")
    return entries


def _words(line: str, splits: int) -> list[str]:
    """A line, split from its end: a path may hold the separator."""
    return [word.strip() for word in line.rsplit("," if "," in line else None, splits)]


def _entry(line: str, where: str) -> Entry:
    words = _words(line, 2)
    if len(words) == 3 and not words[1].isdecimal():
        words = _words(line, 1)
    if len(words) < 2 or not words[0]:
        raise UserError(
            f"{where}: {printable(line)!r} is no path and label, separated by a comma or a blank"
        )
    return Entry(words[0], _label(words[-1], where))


def _timed_entry(line: str, where: str) -> Entry:
    words = _words(line, 2)
    if len(words) < 3 or not words[0]:
        raise UserError(
            f"{where}: {printable(line)!r} is no path, label and length in seconds, separated by "
            "commas or blanks"
        )
    try:
        seconds = float(words[2])
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < MAX_SECONDS:
        raise UserError(f"{where}: the length {printable(words[2])!r} is no number of seconds")
    return Entry(words[0], _label(words[1], where), seconds)


def _label(word: str, where: str) -> int:
    if not word.isdecimal() or len(word) > 18:
        raise UserError(f"{where}: the label {printable(word)!r} is no integer from 0 on")
    return int(word)
