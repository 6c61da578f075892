"""The output folder of a training: one run at a time in it, and nothing of another one.

A folder that holds a run's results is not trained into again, unless that run is continued or
`--overwrite` is given. On several processes rank 0 looks and locks, and every rank is told.
"""

import argparse
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from .checkpoint import BEST, NEWEST, PREVIOUS
from .distributed import Distributed
from .errors import UsageError, UserError

NONFINITE = "nonfinite.pth"  # state of a run that cannot continue, for inspection
CALIBRATED = "calibrated_checkpoint.pth"  # of --eval --calibrate
LOG, LOCK = "log.txt", ".lock"
GRACE = 3.0  # seconds
EVAL_BAD_IMAGES = "eval_bad_images_rank{}.txt"  # of --eval; bad_images_rank*.txt is the training's
# What cannot be had again without computing it again.
RESULTS = (NEWEST, PREVIOUS, BEST, CALIBRATED, LOG, "eval.json", "sweep.json")
# What else a run and its evaluations leave, as patterns.
LEFT = (
    NONFINITE,
    "args.json",
    "environment.json",
    "events.out.tfevents.*",
    "bad_images_rank*.txt",
    EVAL_BAD_IMAGES.format("*"),
    "sweep.csv",
    "sweep_flops.png",
    "sweep_speed.png",
    "report.html",
)
# The last evaluation's pictures and tables. By name: a folder may hold what is not ours.
PICTURES = (
    "kept_patches.png",
    *(
        f"{folder}/{name}.{ending}"
        for folder in ("decisions", "segmentation")
        for name in (
            "gates",
            "gates_per_class",
            "costs",
            "keep_maps",
            "iou_per_class",
            "confusion",
            "sample?",
        )
        for ending in ("csv", "png", "gif")
    ),
)
# How often a launcher has started these processes again: torchrun, SLURM.
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")

_logger = logging.getLogger(__name__)
_held: set[int] = set()  # descriptors of the locks of this process


def _let_go() -> None:
    """In a forked worker: a lock must not outlive the run that took it."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _lock(file: IO) -> bool:
    """Whether the file could be locked within the time that a killed run's processes may take to
    end.
    """
    end = time.monotonic() + GRACE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
        time.sleep(0.05)


@contextmanager
def locked(folder: Path, user: str = "run") -> Iterator[int]:
    """Keep a second `user` out of the folder; -> the lock's descriptor.

    The lock ends with the process, however it ends; a process that is given the descriptor keeps
    it too. What a killed run has started may outlive it by moments: those are waited for.

    Raises UserError if the folder is in use.
    """
    with open(folder / LOCK, "a") as file:
        try:
            free = _lock(file)
        except OSError as error:
            free = True
            _logger.warning(
                "%s cannot be locked (%s): start no second %s in it", folder, error.strerror, user
            )
        if not free:
            raise UserError(
                f"{folder} is in use by another {user}; wait for it, or choose another --output_dir"
            )
        _held.add(file.fileno())
        try:
            yield file.fileno()
        finally:
            _held.discard(file.fileno())


@contextmanager
def claimed(args: argparse.Namespace, distributed: Distributed) -> Iterator[None]:
    """Hold the output folder of a training.

    Raises on every rank UserError if it is in use, and UsageError if the training would overwrite
    another run's results.
    """
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(locked(Path(args.output_dir)))
            _refuse_overwriting(args)

        distributed.on_main(lock)
        yield


def check(args: argparse.Namespace, distributed: Distributed) -> None:
    """As `claimed`, but without holding the folder or making it: for before the data are read."""

    def look() -> None:
        if (Path(args.output_dir) / LOCK).exists():
            with locked(Path(args.output_dir)):
                pass
        _refuse_overwriting(args)

    distributed.on_main(look)


def _refuse_overwriting(args: argparse.Namespace) -> None:
    folder, wanted = Path(args.output_dir), wanted_checkpoint(args)
    inside = wanted not in (None, "auto") and Path(wanted).resolve().parent == folder.resolve()
    if inside and args.overwrite:
        raise UsageError(
            f"--overwrite would remove {wanted}, which --resume names; leave one of them out"
        )
    if inside or args.overwrite or (wanted == "auto" and _resumable(folder)):
        return
    lost = results_in(folder)
    if wanted == "auto":  # a run that was killed before its first checkpoint may have a log
        lost = [name for name in lost if name != LOG]
    if not lost:
        return
    if wanted == "auto" and BEST in lost:
        raise UsageError(
            f"--resume auto: {folder} holds {_names(folder, lost)} and no {NEWEST} to resume from; "
            f"a new run would overwrite that. Continue with --resume {folder / BEST}, choose "
            "another --output_dir, or start anew over it with --overwrite"
        )
    how = "--resume auto continues it" if _resumable(folder) else ""
    if wanted not in (None, "auto"):
        how = f"--resume {wanted} is of another folder, and would mix two runs"
    raise UsageError(
        f"--output_dir {folder} already holds {_names(folder, lost)}, which would be overwritten"
        f"{': ' if how else ''}{how}; choose another --output_dir, or remove the earlier run and "
        "start anew with --overwrite"
    )


def wanted_checkpoint(args: argparse.Namespace) -> str | None:
    """`--resume`; or `auto` where a launcher has started the run again, which must not lose what it
    has saved.
    """
    restarted = any(os.environ.get(name, "0") not in ("", "0") for name in RESTARTS)
    return "auto" if restarted and _resumable(Path(args.output_dir)) else args.resume


def results_in(folder: Path) -> list[str]:
    """Names of a run's results in its folder; a log without an epoch is none."""
    return [
        name
        for name in RESULTS
        if (folder / name).exists() and (name != LOG or (folder / name).stat().st_size)
    ]


def _resumable(folder: Path) -> bool:
    return any((folder / name).exists() for name in (NEWEST, PREVIOUS))


def _names(folder: Path, names: list[str]) -> str:
    """The names; the log's with its number of epochs."""
    shown = list(names)
    if LOG in shown:
        with suppress(OSError):
            epochs = (folder / LOG).read_bytes().count(b"\n")
            shown[shown.index(LOG)] = f"{LOG} of {epochs} {'epoch' if epochs == 1 else 'epochs'}"
    return "an earlier run's " + ", ".join(shown)


def clear(folder: Path) -> None:
    """Remove whatever a run and its evaluations left: a new run begins."""
    removed = results_in(folder)
    if removed:
        _logger.warning("starting anew: removed %s from %s", _names(folder, removed), folder)
    _remove(folder, (*RESULTS, *LEFT, *PICTURES))


def clear_pictures(folder: Path) -> None:
    """Remove the pictures and tables of an earlier evaluation."""
    _remove(folder, PICTURES)


def _remove(folder: Path, patterns: Sequence[str]) -> None:
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        try:
            path.unlink()
        except OSError as error:
            raise UserError(f"{path} cannot be removed: {error.strerror}") from None
