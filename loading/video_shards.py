"""Videos in WebDataset shards: tar files in which KEY.mp4 (or another container) and KEY.cls, its
label, belong together.

The shards are read in place. Their headers are read once, and of a video FFmpeg reads what it needs
from the middle of the shard: any order, every video exactly once, resume to the step.
"""

import os
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
    shards = sorted(folder.glob("*.tar") if folder.is_dir() else path.glob(f"*{split}*.tar"))
    if not shards:
        raise UserError(
            f"{printable(str(path))}: no shards of {split} in it, neither {split}/*.tar nor "
            f"*{split}*.tar"
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
                    f"{len(classes)} names in {NAMES}"
                )
            keys.append(key)
            spans.append((number, start, end))
            labels.append(label)
    return ShardedVideos([str(shard) for shard in shards], keys, spans, labels, classes)


def _entries(shard: Path) -> list[tuple[str, int, int, int]]:
    """(name, first byte, end, label) of the videos of a shard."""
    videos: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                key, dot, ending = base.partition(".")
                key, ending = os.path.join(folder, key), (dot + ending).lower()
                if not member.isreg():
                    continue
                if ending in VIDEO_EXTENSIONS:
                    start = member.offset_data
                    videos[key] = member.name, start, start + member.size
                elif ending == LABEL:
                    text = tar.extractfile(member).read(_LONGEST_LABEL).decode("latin-1").strip()
                    if not (text.isascii() and text.isdigit()):
                        raise UserError(
                            f"{printable(str(shard))}: {printable(member.name)} holds "
                            f"{printable(text)!r}, no label from 0 on"
                        )
                    labels[key] = int(text)
    except tarfile.TarError as error:
        raise UserError(
            f"{printable(str(shard))}: not an uncompressed tar file ({printable(str(error))})"
        ) from None
    except OSError as error:
        raise UserError(
            f"{printable(str(shard))}: cannot be read ({error.strerror or error})"
        ) from None
    if not videos:
        raise UserError(f"{printable(str(shard))}: no videos in it")
    alone = next((key for key in videos if key not in labels), None)
    if alone is not None:
        raise UserError(
            f"{printable(str(shard))}: {printable(videos[alone][0])} has no label; it needs "
            f"{printable(alone)}{LABEL} in the same shard"
        )
    return [(*video, labels[key]) for key, video in videos.items()]
