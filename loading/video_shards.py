"""Videos in WebDataset shards: tar files in which KEY.mp4 (or another container) and KEY.cls, its
label, belong together.

The shards are read in place. Their headers are read once, and of a video FFmpeg reads what it needs
from the middle of the shard: any order, every video exactly once, resume to the step.
"""

import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError, printable

from .images import Example, ImageSet
from .video import VIDEO_EXTENSIONS, VideoFile
from .video_lists import NAMES, listed_classes

LABEL = ".cls"
_LONGEST_LABEL = 20  # bytes


class ShardedVideos(ImageSet):
    """Videos in uncompressed tar files.

    Args:
        shards: paths of the files.
        spans: [N, 3] shard, first byte and end of each video.
    """

    def __init__(
        self, shards: Sequence[str], keys: Sequence[str], spans, labels, classes: Sequence[str]
    ):
        super().__init__(labels, classes)
        self.shards, self.spans = shards, np.asarray(spans, np.int64)
        self.keys = np.array([os.fsencode(key) for key in keys])

    def load(self, index: int) -> Example:
        shard, start, end = self.spans[index].tolist()
        return Example(VideoFile(self.shards[shard], (start, end)), int(self.labels[index]))

    def describe(self, index: int) -> str:
        shard, key = self.shards[self.spans[index][0]], os.fsdecode(self.keys[index])
        return printable(f"{shard}: {key}")


def video_shards(path: Path, split: str) -> ShardedVideos:
    """The shards of a split: `train/*.tar`, or all tar files with `train` in their name; and
    `classes.txt`, the classes' names by label.

    Raises UserError for a split without shards, for a shard that is no tar file, and for a video
    without label.
    """
    folder = path / split
    shards = sorted(folder.glob("*.tar")) if folder.is_dir() else _named(path, split)
    if not shards:
        raise UserError(
            f"{printable(str(path))}: no shards of {split} in it, neither {split}/*.tar nor tar "
            f"files with {split} in their names"
        )
    classes = listed_classes(path)
    if classes is None:
        raise UserError(
            f"{printable(str(path / NAMES))}: no such file; shards need it, the names of the "
            "classes by label, one on a line"
        )
    keys, spans, labels = [], [], []
    for number, shard in enumerate(shards):
        for key, start, end, label in _entries(shard):
            if label >= len(classes):
                raise UserError(
                    f"{printable(str(shard))}: {printable(key)} has the label {label}, beyond the "
                    f"{len(classes)} names in {NAMES}; labels count from 0"
                )
            keys.append(key)
            spans.append((number, start, end))
            labels.append(label)
    return ShardedVideos([str(shard) for shard in shards], keys, spans, labels, classes)


def _named(path: Path, split: str) -> list[Path]:
    """The shards of a folder whose names have the split as a word. Raises UserError for one that
    has both splits.
    """
    found = []
    for shard in sorted(path.glob("*.tar")):
        words = re.split(r"[^a-z]+", shard.name.lower())
        if {"train", "val"} <= {*words}:
            raise UserError(f"{printable(str(shard))}: its name has both train and val")
        if split in words:
            found.append(shard)
    return found


def _entries(shard: Path) -> list[tuple[str, int, int, int]]:
    """(name, first byte, end, label) of the videos of a shard."""
    source = printable(str(shard))
    videos: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                start, end = member.offset_data, member.offset_data + member.size
                key, ending = _split_name(member.name)
                if not member.isreg() or not ending.endswith((*VIDEO_EXTENSIONS, LABEL)):
                    continue
                found = labels if ending == LABEL else videos
                if ending != LABEL and ending not in VIDEO_EXTENSIONS:
                    raise UserError(
                        f"{source}: {printable(member.name)} has a dot in its key, which would end "
                        "there"
                    )
                if key in found:
                    what = "label" if found is labels else "video"
                    raise UserError(
                        f"{source}: {printable(member.name)} is a second {what} of its key"
                    )
                if found is videos:
                    videos[key] = member.name, start, end
                else:
                    labels[key] = _label(
                        tar.extractfile(member).read(_LONGEST_LABEL), member, source
                    )
        _check_end(shard, end)
    except tarfile.TarError as error:
        raise UserError(
            f"{source}: not an uncompressed tar file ({printable(str(error))})"
        ) from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None
    if not videos:
        raise UserError(f"{source}: no videos in it")
    for key in videos.keys() ^ labels.keys():
        if key in videos:
            raise UserError(
                f"{source}: {printable(videos[key][0])} has no label; it needs "
                f"{printable(key)}{LABEL} in the same shard"
            )
        raise UserError(f"{source}: {printable(key)}{LABEL} has no video of a known kind beside it")
    return [(*video, labels[key]) for key, video in videos.items()]


def _split_name(name: str) -> tuple[str, str]:
    """Key, up to the first dot behind the folders, and ending of a member's name."""
    folder, base = os.path.split(name)
    key, dot, ending = base.partition(".")
    return os.path.join(folder, key), (dot + ending).lower()


def _label(content: bytes, member: tarfile.TarInfo, source: str) -> int:
    text = content.decode("latin-1").strip()
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            f"{source}: {printable(member.name)} holds {printable(text)!r}, no label from 0 on"
        )
    return int(text)


def _check_end(shard: Path, end: int) -> None:
    """Raise UserError if more than padding follows the last member, or its end is missing.

    Python's tarfile stops at a damaged header as if the shard ended there.
    """
    padded = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    length = 0
    with shard.open("rb") as file:
        file.seek(padded)
        while part := file.read(1 << 20):
            length += len(part)
            if part.strip(b"\0"):
                raise UserError(f"{printable(str(shard))}: damaged at or behind byte {padded:,}")
    if length < tarfile.BLOCKSIZE:
        raise UserError(f"{printable(str(shard))}: cut off; it has no end-of-archive mark")
