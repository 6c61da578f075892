"""Files that are either complete or absent: atomic writing, checksums, the output folder."""

import csv
import errno
import hashlib
import io
import json
import logging
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import UserError, storage_problem

_logger = logging.getLogger(__name__)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: str | os.PathLike, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A binary file, readable and writable, that replaces `path` when the block ends without error.

    A reader of `path` finds the old content or the new one, at any moment and after any kill. With
    `previous`, the old content is kept under that name; then `path` is absent for the instant
    between two renames.

    Raises UserError if the file cannot be written (disk full, read-only folder, ...); the temporary
    file is removed and `path` is left as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        problem = storage_problem(error)
        if problem is None:
            raise
        raise UserError(
            f"cannot write {path}: {problem}; files saved earlier are intact"
        ) from error


def remove_temporaries(path: Path) -> None:
    """Remove the temporary files of killed processes that were writing `path`."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            temporary.unlink()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON, atomically; unknown types (paths, devices) as text.

    Numbers that are not finite, which JSON cannot express, become null, and a warning names them.
    """
    lost: list[str] = []
    content = finite(content, lost)
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        _logger.warning("%s: not finite, written as null: %s%s", path, ", ".join(lost[:5]), more)
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2, default=str) + "\n").encode())


def finite(value: Any, lost: list[str] | None = None, name: str = "") -> Any:
    """`value`, nested dicts and lists, with None for numbers that are not finite.

    lost: the names of these are added to it, such as `dynamic.loss`.
    """
    if isinstance(value, Mapping):
        return {key: finite(item, lost, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item, lost, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        if lost is not None:
            lost.append(name.lstrip("."))
        return None
    return value


def hash_stream(file: BinaryIO, size: int | None = None) -> str:
    """SHA-256 (hexadecimal) of the first `size` bytes of `file`, or of all of it."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(1 << 20))
    left = file.seek(0, os.SEEK_END) if size is None else size
    file.seek(0)
    while left > 0 and (count := file.readinto(block[: min(left, len(block))])):
        digest.update(block[:count])
        left -= count
    return digest.hexdigest()


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 (hexadecimal) of a file, as `sha256sum` prints it. Raises UserError if unreadable."""
    try:
        with open(path, "rb") as file:
            return hash_stream(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def prepare_output_dir(path: str | os.PathLike) -> Path:
    """Create the output folder if necessary and prove that it is writable, before any training.

    Raises UserError otherwise.
    """
    folder = Path(path)
    try:
        str(folder).encode()  # TensorBoard's files have names in UTF-8
    except UnicodeEncodeError:
        raise UserError(
            f"output folder {str(folder)!r}: not all of its name can be read as text; choose "
            "another, or set LC_ALL=C.UTF-8 where the locale is the reason"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{secrets.token_hex(4)}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to the output folder {folder}: {error.strerror}") from error
    return folder


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, atomically."""
    with atomic_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        text.flush()
        text.detach()


def read_csv(path: Path) -> np.ndarray:
    """The numbers of a table that `write_csv` wrote, without its header: [rows, columns]."""
    return np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
