"""A fingerprint of a data set's images, which tells whether a result is of the same ones."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data import Data
from .images import BadImageError, ImageSet, spread_choice

# Of more files than these, a fixed, evenly spread choice is looked at.
SIZED = 10_000  # size in bytes
READ = 64  # content, of each at most so many bytes
BYTES = 1 << 20


def fingerprints(data: Data, path: str | None) -> dict[str, str]:
    """{split: SHA-256}; `path`: --data-path, whose files stand for images that are streamed.

    It covers names relative to the data set's folder, labels, classes, sizes and contents, but not
    where the folder lies or when it was written: a copy has the same. A split that was not read is
    left out.
    """
    splits = {"train": (data.train, data.train_loader), "val": (data.val, data.val_loader)}
    return {
        split: _of_stream(path) if images is None else _of_images(images)
        for split, (images, loader) in splits.items()
        if loader is not None
    }


def _of_images(images: ImageSet) -> str:
    digest = hashlib.sha256()
    if not _add_set(digest, images):  # behind a reader
        for index in _some(len(images), READ):
            try:
                digest.update(np.asarray(images.load(int(index)).image).tobytes())
            except BadImageError as error:
                digest.update(str(error).encode())
    return digest.hexdigest()


def _add_set(digest: Any, images: ImageSet) -> bool:
    """Add what a set keeps: its arrays, sets within it, files; -> whether that covers them."""
    covered = False
    digest.update(repr((type(images).__name__, images.classes)).encode())
    for name, value in sorted(vars(images).items()):
        if isinstance(value, ImageSet):
            covered |= _add_set(digest, value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            digest.update(f"{name} {value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
            if value.dtype.kind == "S" and hasattr(images, "root"):
                _add_files(digest, value, images.root)
                covered = True
            covered |= name == "pixels"
    if hasattr(images, "shards"):
        _add_files(digest, list(map(os.fsencode, images.shards)))
        covered = True
    return covered


def _of_stream(path: str | None) -> str:
    """That of the files in the folder that a stream is read from."""
    digest = hashlib.sha256()
    if path is not None and os.path.isdir(path):
        files = sorted(entry for entry in Path(path).iterdir() if entry.is_file())
        digest.update(repr([os.fsencode(file.name) for file in files]).encode())
        _add_files(digest, list(map(os.fsencode, files)))
    return digest.hexdigest()


def _add_files(digest: Any, files: Sequence[bytes], root: bytes = b"") -> None:
    for index in _some(len(files), SIZED):
        digest.update(str(_size(os.path.join(root, files[index]))).encode() + b",")
    for index in _some(len(files), READ):
        try:
            with open(os.path.join(root, files[index]), "rb") as file:
                digest.update(file.read(BYTES))
        except OSError as error:  # a folder of frames; one that is gone is reported when it is read
            digest.update(str(error.errno).encode())


def _size(file: bytes) -> int | list[tuple[bytes, int]]:
    """Bytes of a file; of a folder's files, for a video by its frames; -1: it cannot be read."""
    try:
        if os.path.isdir(file):
            return sorted((entry.name, entry.stat().st_size) for entry in os.scandir(file))
        return os.stat(file).st_size
    except OSError:
        return -1


def _some(total: int, count: int) -> np.ndarray:
    return np.arange(total) if total <= count else spread_choice(total, count)
