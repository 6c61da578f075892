"""Image sets of videos in files.

A video is a file, or a folder of image files, one for each frame.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError, printable

from .depth import Depth, Range
from .folders import labelled_folders
from .images import BadImageError, Example, ImageSet
from .video import VIDEO_EXTENSIONS, FrameFolder, Video, VideoFile
from .walking import IMAGE_ENDINGS, LeftOut, by_number, walk


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

    def deep_candidates(self) -> np.ndarray:
        videos = tuple(ending.encode() for ending in VIDEO_EXTENSIONS)
        return np.flatnonzero([not path.lower().endswith(videos) for path in self.paths.tolist()])

    def range(self, index: int) -> Range | None:
        video = open_video(self.path(index))
        return video.range() if isinstance(video, FrameFolder) else None

    def load(self, index: int) -> Example:
        return Example(open_video(self.path(index), self.depth), int(self.labels[index]))

    def describe(self, index: int) -> str:
        return printable(self.path(index))


def open_video(path: str, depth: Depth | None = None) -> Video:
    """The video in a file or in a folder of frames. Raises `BadImageError` for an empty folder.

    depth: of frames with more than 8 bits a channel.
    """
    if not os.path.isdir(path):
        return VideoFile(path)
    names = [name for name in os.listdir(path) if _is_frame(name)]
    if not names:
        raise BadImageError("a folder without images")
    return FrameFolder([os.path.join(path, name) for name in sorted(names, key=by_number)], depth)


def _is_frame(name: str) -> bool:
    # A GIF may be a clip itself.
    return name.lower().endswith(IMAGE_ENDINGS) and name[-4:].lower() != ".gif" and name[0] != "."


def is_video(path: str) -> bool:
    """Whether a path is that of a video file, by its name, or of a folder of frames."""
    if path.lower().endswith(VIDEO_EXTENSIONS):
        return True
    return os.path.isdir(path) and _holds_frames([entry.name for entry in os.scandir(path)])


def _holds_frames(names: Sequence[str]) -> bool:
    """Whether a folder with these files is a video; beside videos, images are thumbnails."""
    return any(map(_is_frame, names)) and not any(
        name.lower().endswith(VIDEO_EXTENSIONS) for name in names
    )


def list_videos(top: str | os.PathLike, left: LeftOut | None = None) -> list[str]:
    """Video files and folders of frames below `top`, sorted."""
    left, found = LeftOut() if left is None else left, []
    for root, folders, names in walk(top, left):
        if root != os.fspath(top) and _holds_frames(names):
            found.append(root)
            folders.clear()
            continue
        for name in names:
            if name.lower().endswith(VIDEO_EXTENSIONS):
                found.append(os.path.join(root, name))
            else:
                left.add_file(root, name)
    return sorted(found)


def video_folders(path: Path, split: str) -> Videos:
    """One folder per split and class, and videos below it. Raises UserError if one has none."""
    return Videos(*labelled_folders(path, split, list_videos, "videos"))


def find_videos(paths: Sequence[str]) -> Videos:
    """The named videos, and all video files below the named folders; a folder that holds images is
    a video itself.

    Raises UserError for a folder without videos.
    """
    found: list[str] = []
    for path in paths:
        inside = [path]
        if os.path.isdir(path) and not is_video(path):
            left = LeftOut()
            inside = list_videos(path, left)
            left.tell(path)
            if not inside:
                raise UserError(f"{printable(path)}: no videos in this folder{left.instead()}")
        found += inside
    return Videos("", found, np.zeros(len(found)), [])
