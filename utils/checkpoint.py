"""Checkpoints that survive kills, full disks and damaged files.

A checkpoint is written by `torch.save`, an envelope `{'model': state_dict, ...}` that plain
`torch.load(path, weights_only=True)` reads. Its SHA-256 is stored inside the file, in the comment
field that every zip archive has at its end: a checksum in a second file could be separated from the
first by a kill between two renames.
"""

import argparse
import logging
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .contents import HEAD, is_safetensors, kind_of
from .envelopes import UnknownEnvelope, harmless_globals, opened
from .errors import UserError, printable
from .files import atomic_file, hash_stream, remove_temporaries

NEWEST = "checkpoint.pth"
PREVIOUS = "checkpoint_prev.pth"
BEST = "best_checkpoint.pth"

_TAG = b"sha256:"
_COMMENT_BYTES = len(_TAG) + 64
_END_RECORD = b"PK\x05\x06"  # opens the last 22 bytes of a zip archive without a comment
_PLAIN_TYPES = (type(None), bool, int, float, str, bytes)

_logger = logging.getLogger(__name__)


class _Unusable(Exception):
    """Why a file is not a readable checkpoint; whoever catches it adds the file's name."""


def copy_to_host(state: Any) -> Any:
    """A deep copy of nested dicts, lists, tuples and Namespaces, with tensors on the CPU.

    Raises ValueError for anything that `torch.load(weights_only=True)` would refuse later, when it
    is too late.
    """
    copy = _copied(state, "state")
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # the copies from the device were only queued
    return copy


def _copied(value: Any, name: str) -> Any:
    if isinstance(value, Tensor):
        # To pinned memory, without waiting for each tensor in turn; a CPU tensor is just cloned.
        return (
            value.detach().to("cpu", non_blocking=True) if value.is_cuda else value.detach().clone()
        )
    if type(value) in _PLAIN_TYPES:
        return value
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(item, f"{name}[{key!r}]")) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_copied(item, f"{name}[{index}]") for index, item in enumerate(value))
    if type(value) is argparse.Namespace:
        return argparse.Namespace(
            **{key: _copied(item, f"{name}.{key}") for key, item in vars(value).items()}
        )
    raise ValueError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds "
        "tensors, plain Python values, dicts, lists, tuples and argparse.Namespace"
    )


def save_checkpoint(state: dict, path: str | os.PathLike) -> None:
    """Write `state` to `path` atomically, with its checksum.

    Raises UserError if it cannot be written (the older file stays intact) and ValueError for
    content that could not be loaded again.
    """
    _write(copy_to_host(state), Path(path))


def _write(state: dict, path: Path, previous: Path | None = None) -> None:
    with atomic_file(path, previous) as file:
        torch.save(state, file)
        file.seek(-2, os.SEEK_END)  # the archive's last field: the length of its comment
        file.write(struct.pack("<H", _COMMENT_BYTES))
        digest = hash_stream(file)
        file.seek(0, os.SEEK_END)
        file.write(_TAG + digest.encode())


class CheckpointWriter:
    """Writes a folder's newest, previous and best checkpoint in the background.

    `save` returns as soon as the state is copied to host memory; it first waits for the save before
    it. An error of the background thread (UserError: the disk is full, ...) is raised by the next
    `save`, `check`, `wait` or `close`. Only one process of a run may own a writer for a folder.
    """

    def __init__(self, output_dir: str | os.PathLike):
        folder = Path(output_dir)
        self.newest, self.previous, self.best = folder / NEWEST, folder / PREVIOUS, folder / BEST
        for path in (self.newest, self.best):
            remove_temporaries(path)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._write: Future | None = None

    def save(self, state: dict, best: bool = False) -> None:
        """Save as the newest checkpoint and, with `best`, as the best one too."""
        self.wait()
        self._write = self._thread.submit(self._write_all, copy_to_host(state), best)

    def _write_all(self, state: dict, best: bool) -> None:
        # The best one first: a run that is killed between the two evaluates again and saves both.
        if best:
            _write(state, self.best)
        # A file that was damaged since must not replace a good predecessor.
        _write(state, self.newest, previous=self.previous if is_intact(self.newest) else None)

    def writing(self) -> bool:
        """Whether a save is still in progress in the background."""
        return self._write is not None and not self._write.done()

    def check(self) -> None:
        """Raise the error of a background save that has failed; never waits."""
        if self._write is not None and self._write.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is on the disk."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def close(self) -> None:
        """Wait, and end the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except UserError as failed:
            if error is None:
                raise
            _logger.error("%s", failed)  # the error that ended the block is the one to raise


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint to the CPU, of any program, see `envelopes.opened`; also safetensors.

    It is returned as `{'model': state_dict, ...}`. Nothing in the file is executed: apart from
    tensors and plain Python values only `argparse.Namespace`, and NumPy's numbers, paths and other
    kinds of dicts, which become plain values, are allowed. The checksum is verified if the file has
    one.

    Raises UserError, naming the file and the reason, for everything else.
    """
    try:
        return _read(Path(path))
    except _Unusable as reason:
        raise UserError(f"cannot load checkpoint {path}: {reason}") from None


def load_newest(output_dir: str | os.PathLike) -> tuple[dict, Path] | None:
    """The newest good checkpoint of a run and its path, or None if the folder has none.

    A damaged newest file is replaced by its predecessor, with a warning that names it. Raises
    UserError if there are files and none is good.
    """
    damaged = []
    for path in (Path(output_dir) / NEWEST, Path(output_dir) / PREVIOUS):
        if not path.exists():
            continue
        try:
            content = _read(path)
        except _Unusable as reason:
            damaged.append(f"{path}: {reason}")
            continue
        for problem in damaged:
            _logger.warning(
                "damaged checkpoint passed over, continuing from %s (%s)", path, problem
            )
        return content, path
    if damaged:
        best = Path(output_dir) / BEST
        hint = f"; --resume {best} may still work" if best.exists() else ""
        raise UserError(f"no checkpoint to resume from: {'; '.join(damaged)}{hint}")
    return None


def is_intact(path: Path) -> bool:
    """Whether `path` is a checkpoint with a correct checksum."""
    try:
        with open(path, "rb") as file:
            return _verify_checksum(file)
    except (OSError, _Unusable):
        return False


def _read(path: Path) -> dict:
    """The content decides how it is read, not the name."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
            if is_safetensors(head):
                return opened(load_file(path), str(path))
            _verify_checksum(file)
            file.seek(0)
            content = _load_without_code(file, head)
        return opened(content, str(path))
    except UnknownEnvelope as reason:
        raise _Unusable(str(reason)) from None
    except RecursionError:
        raise _Unusable("it is damaged: a part of it contains itself") from None
    except OSError as error:
        raise _Unusable(error.strerror or str(error)) from error
    except SafetensorError as error:
        raise _Unusable(
            f"it is safetensors, and cut off or damaged ({_one_line(error)})"
        ) from error


def _verify_checksum(file: BinaryIO) -> bool:
    """True if the checksum is correct, False if absent. Raises _Unusable for a damaged file."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise _Unusable("it is empty")
    file.seek(max(0, size - _COMMENT_BYTES))
    comment = file.read()
    if comment.startswith(_TAG):
        if hash_stream(file, size - len(comment)) != comment[len(_TAG) :].decode("latin-1"):
            raise _Unusable("its checksum does not match: it was damaged after it was written")
        return True
    file.seek(0)
    is_zip = file.read(2) == b"PK"
    if is_zip and not (comment[-22:].startswith(_END_RECORD) and comment.endswith(b"\0\0")):
        raise _Unusable("it is cut off or damaged")
    return False


def _load_without_code(file: BinaryIO, head: bytes) -> Any:
    try:
        with torch.serialization.safe_globals(harmless_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats: they load or raise an error
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden is None:
            kind = kind_of(head)
            raise _Unusable(
                f"it is {kind}"
                if kind
                else "it is damaged, no PyTorch checkpoint, or holds something other than tensors "
                "and plain values; nothing in it was executed"
            ) from error
        raise _Unusable(
            f"it holds {forbidden[1]}, and only tensors, plain values and argparse.Namespace are "
            "allowed; nothing in it was executed; if you trust it, store its 'model' entry, or the "
            "model's state_dict(), as .safetensors"
        ) from error
    except Exception as error:  # torch raises nearly anything on bytes that are not a checkpoint
        raise _Unusable(_what_else(file, head)) from error


def _what_else(file: BinaryIO, head: bytes) -> str:
    """What a file is that torch cannot read as a checkpoint."""
    if kind := kind_of(head):
        return f"it is {kind}"
    with suppress(OSError, ValueError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
        if "constants.pkl" in names:
            return "it is a TorchScript program; store the model's state_dict() instead"
        if "data.pkl" not in names:
            listed = ", ".join(map(printable, archive.namelist()[:3]))
            return f"it is a zip archive of other files ({listed})"
    return "it is cut off, damaged or no PyTorch checkpoint"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
