"""Image sets of videos: a folder for each class, and lists as VideoMamba's.

A video is a file, or a folder of image files, one for each frame.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError, printable

from .folders import folder_in
from .images import BadImageError, Example, ImageSet
from .video import VIDEO_EXTENSIONS, FrameFolder, Video, VideoFile

NAMES = "classes.txt"


class Videos(ImageSet):
    """Videos below `root`, each with a class; `paths` are relative to it.

    As in `FileImages` the paths are one array of bytes, which workers share.
    """

    def __init__(self, root: str, paths: Sequence[str], labels, classes: Sequence[str]):
        super().__init__(labels, classes)
        self.root = os.fsencode(root)
        self.paths = np.array([os.fsencode(path) for path in paths])

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self.root, self.paths[index]))

    def load(self, index: int) -> Example:
        return Example(open_video(self.path(index)), int(self.labels[index]))

    def describe(self, index: int) -> str:
        return printable(self.path(index))


def open_video(path: str) -> Video:
    """The video in a file or in a folder of frames. Raises `BadImageError` for an empty folder."""
    if not os.path.isdir(path):
        return VideoFile(path)
    names = [name for name in os.listdir(path) if name.lower().endswith(IMG_EXTENSIONS)]
    if not names:
        raise BadImageError("a folder without images")
    return FrameFolder([os.path.join(path, name) for name in sorted(names, key=_by_number)])


def _by_number(name: str) -> list:
    """A key that sorts 2.jpg before 10.jpg."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if part.isdecimal() else part for part in parts]


def is_video(path: str) -> bool:
    """Whether a path is that of a video file, by its name, or of a folder of frames."""
    return path.lower().endswith(VIDEO_EXTENSIONS) or (
        os.path.isdir(path)
        and any(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in os.scandir(path))
    )


def video_folders(path: Path, split: str) -> Videos:
    """One folder per split and class, and in it videos. Raises UserError if one has none."""
    root = folder_in(path, split)
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise UserError(f"{printable(str(root))}: no class folders in it")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(entry.name for entry in os.scandir(root / name) if is_video(entry.path))
        if not found:
            raise UserError(f"{printable(str(root / name))}: no videos in it")
        paths += [os.path.join(name, file) for file in found]
        labels += [label] * len(found)
    return Videos(str(root), paths, labels, classes)


def video_list(path: Path, split: str) -> Videos:
    """`train.csv` and `val.csv` in a folder: path and label, or path, number of frames and label,
    separated by commas or blanks. Paths are relative to the folder, labels count from 0; a
    `classes.txt` names them, one on a line.

    Raises:
        UserError: a line that is no such entry; a first video that is not there.
    """
    file = path / f"{split}.csv"
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"{printable(str(file))}: cannot be read ({error.strerror})") from None
    entries = [
        _entry(line, f"{printable(str(file))}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not entries:
        raise UserError(f"{printable(str(file))}: it lists no videos")
    paths, labels = zip(*entries, strict=True)
    first = path / paths[0]
    if not first.exists():
        raise UserError(
            f"{printable(str(file))}: its first video {printable(paths[0])} is not in "
            f"{printable(str(path))}; paths are relative to that folder"
        )
    return Videos(str(path), paths, labels, _class_names(path, max(labels), file))


def _entry(line: str, where: str) -> tuple[str, int]:
    """(path, label) of a line."""
    separator = "," if "," in line else None
    words = [word.strip() for word in line.rsplit(separator, 2)]
    if len(words) == 3 and not words[1].isdecimal():  # a separator in the path
        words = [word.strip() for word in line.rsplit(separator, 1)]
    if len(words) < 2 or not words[0]:
        raise UserError(
            f"{where}: {printable(line.strip())!r} is no path and label, separated by a comma or a "
            "blank"
        )
    if not words[-1].isdecimal():
        raise UserError(f"{where}: the label {printable(words[-1])!r} is no integer from 0 on")
    return words[0], int(words[-1])


def find_videos(paths: Sequence[str]) -> Videos:
    """The named videos, and all video files below the named folders; a folder that holds images is
    a video itself.

    Raises UserError for a folder without videos.
    """
    found: list[str] = []
    for path in paths:
        inside = [path]
        if os.path.isdir(path) and not is_video(path):
            inside = sorted(
                os.path.join(folder, name)
                for folder, folders, names in os.walk(path)
                for name in (*folders, *names)
                if is_video(os.path.join(folder, name))
            )
            if not inside:
                raise UserError(f"{printable(path)}: no videos in this folder")
        found += inside
    return Videos("", found, np.zeros(len(found)), [])


def _class_names(path: Path, largest: int, file: Path) -> list[str]:
    """From classes.txt, or numbers up to the largest label of the training list."""
    names = path / NAMES
    if not names.is_file():
        return [str(label) for label in range(_largest_label(path, largest) + 1)]
    try:
        classes = [name for name in names.read_text(encoding="utf-8").splitlines() if name.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{printable(str(names))}: not a text file in UTF-8") from None
    if largest >= len(classes):
        raise UserError(
            f"{printable(str(file))}: label {largest} is beyond the {len(classes)} names in {NAMES}"
        )
    return classes


def _largest_label(path: Path, own: int) -> int:
    """Of both lists, so that both splits have the same classes."""
    labels = [own]
    for split in ("train", "val"):
        file = path / f"{split}.csv"
        if file.is_file():
            lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            words = (line.replace(",", " ").split() for line in lines if line.strip())
            labels += [int(word[-1]) for word in words if word[-1].isdecimal()]
    return max(labels)
