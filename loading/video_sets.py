"""Image sets of videos in files.

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
