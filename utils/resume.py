"""Resuming: what a checkpoint and the run that continues it must agree on."""

import argparse
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from . import preemption
from .checkpoint import CheckpointWriter, load_checkpoint, load_newest, save_checkpoint
from .distributed import Distributed
from .errors import UserError
from .files import sha256_of
from .logging import Averages
from .nonfinite import NonFiniteError

# Flags about where, how fast and how long; they do not alter the final weights of a run.
HARMLESS = {
    "output_dir",
    "device",
    "num_workers",
    "pin_mem",
    "resume",
    "resume_override",
    "save_minutes",
    "throughput_seconds",
    "cuda_graph",
    "data_path",
    "prefix",
    "eval_segments",
    "eval_crops",
    "model_path",
    "dense_path",
    "eval",
    "bad_images",
    "gate_threshold",
    "calibrate",
}
# Entries that checkpoints of earlier versions lack, and that follow from their flags.
RECORDED_LATER = {"task"}
NONFINITE = "nonfinite.pth"  # state of a run that cannot continue, for inspection

_logger = logging.getLogger(__name__)


def find_checkpoint(resume: str | None, output_dir: str) -> tuple[dict[str, Any], Path] | None:
    """The checkpoint that `--resume` refers to, and its file; None for a fresh start."""
    if resume is None:
        return None
    if resume != "auto":
        return load_checkpoint(resume), Path(resume)
    return load_newest(output_dir)


def teacher_checksum(args: argparse.Namespace) -> str | None:
    """SHA-256 of the dense weights that a run starts from."""
    return sha256_of(args.model_path) if args.model_path else None


class Resumable(Protocol):
    """The part of a training that checkpoints use: its state and its progress."""

    epoch: int
    step: int

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def identity(
    args: argparse.Namespace,
    world_size: int,
    class_names: Sequence[str],
    steps_per_epoch: int,
    family: str,
    task: str,
) -> dict[str, Any]:
    """What a checkpoint records of its run besides its state."""
    return {
        "args": vars(args),
        "world_size": world_size,
        "class_names": list(class_names),
        "steps_per_epoch": steps_per_epoch,
        "family": family,
        "task": task,
        "teacher_sha256": teacher_checksum(args),
    }


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Differences of two `identity` records that alter the run, as `flag: recorded -> now`."""
    changes = flag_differences(recorded["args"], current["args"])
    if recorded["world_size"] != current["world_size"]:
        changes.append(f"number of processes: {recorded['world_size']} -> {current['world_size']}")
    if recorded["teacher_sha256"] != current["teacher_sha256"]:
        changes.append(
            "--model-path: the file's content is another one than when the run began "
            f"({str(recorded['teacher_sha256'])[:12]} -> {str(current['teacher_sha256'])[:12]})"
        )
    if recorded["class_names"] != current["class_names"]:
        changes.append("the classes of the data set")
    if recorded["steps_per_epoch"] != current["steps_per_epoch"]:
        changes.append(
            f"batches an epoch: {recorded['steps_per_epoch']} -> {current['steps_per_epoch']}"
        )
    return changes


def flag_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Flags whose values would alter a run, as `flag: before -> now`."""
    return [
        f"--{name.replace('_', '-')}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if name not in HARMLESS
        and not (name == "bit_depth" and now.get(name) == "auto")  # determined from the data
        and _plain(before.get(name, _unrecorded(name, before))) != _plain(now.get(name))
    ]


def _unrecorded(name: str, flags: Mapping[str, Any]) -> Any:
    """What a flag stands for in runs of earlier versions, which did not have it."""
    if name == "poly_power":  # timm's power, where the run had such a schedule
        return 0.1 if flags.get("sched") == "poly" else 1.0
    return {"crop_area": [0.08, 1.0], "eval_shuffle_frames": False, "bit_depth": "auto"}.get(name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_agreement(
    checkpoint: Mapping[str, Any], source: Path, current: Mapping[str, Any], override: bool
) -> bool:
    """Whether a checkpoint is of this very run.

    Raises UserError if it is not; with `override`, it only warns.
    """
    needed = [key for key in ("optimizer", "epoch", "step", *current) if key not in RECORDED_LATER]
    lacking = [key for key in needed if key not in checkpoint]
    if lacking:
        raise UserError(
            f"{source} cannot be resumed: it holds no {', '.join(lacking)}; start from its weights "
            "with --model-path instead"
        )
    changes = differences(checkpoint, current)
    if changes and not override:
        raise UserError(
            f"{source} is of a run with other settings ({'; '.join(changes)}); repeat its flags, "
            "or accept the change with --resume-override"
        )
    for difference in changes:
        _logger.warning("resumed in spite of a difference: %s", difference)
    return not changes


class Saver:
    """Writes the run's checkpoints; every rank calls it, rank 0 writes.

    before_save: called on every rank before each save within or after an epoch.
    """

    def __init__(
        self,
        training: Resumable,
        record: dict[str, Any],
        args: argparse.Namespace,
        distributed: Distributed,
        before_save: Callable[[], None] = lambda: None,
    ):
        self.training, self.record, self.args = training, record, args
        self.distributed, self.before_save = distributed, before_save
        self.minutes = args.save_minutes
        self.saved_at = time.monotonic()
        self.writer = CheckpointWriter(args.output_dir) if distributed.is_main else None

    def save(self, averages: Averages, best: bool = False) -> None:
        """Save all that the run needs to resume, in an envelope that other programs can load."""
        self.before_save()
        parts = self.distributed.gather_objects(averages.state_dict())
        if self.writer is not None:
            self.writer.save(self._state(parts), best)
        self.saved_at = time.monotonic()

    def _state(self, averages: list[dict[str, list]]) -> dict[str, Any]:
        return {**self.training.state_dict(), **self.record, "averages": averages}

    def save_for_inspection(self, averages: Averages, error: NonFiniteError) -> UserError:
        """Save the state before the non-finite step and its image names; -> the error to report."""
        parts = self.distributed.gather_objects(averages.state_dict())
        if self.writer is None:
            return error
        self.close()
        path = Path(self.args.output_dir) / NONFINITE
        save_checkpoint({**self._state(parts), "images": error.batches}, path)
        return UserError(
            f"{error}. {path} has the weights before that step, and the names (images, by rank)"
        )

    def after_step(self, averages: Averages) -> bool:
        """Save when it is due; save and return True on preemption."""
        if self.writer is not None:
            self.writer.check()
        leaving = self.distributed.agree_any(preemption.requested())
        due = self.minutes > 0 and time.monotonic() - self.saved_at > 60 * self.minutes
        if leaving or self.distributed.agree_any(due and self.distributed.is_main):
            self.save(averages)
        return leaving

    def close(self) -> None:
        """Wait until the last save is on the disk."""
        if self.writer is not None:
            self.writer.close()


def start_or_resume(
    training: Resumable, record: dict[str, Any], args: argparse.Namespace, distributed: Distributed
) -> Averages:
    """Load the checkpoint to resume into a new training, if any; -> averages of the epoch begun."""
    averages = Averages()
    resumed = find_checkpoint(args.resume, args.output_dir)
    if resumed is None:
        return averages
    checkpoint, source = resumed
    same = check_agreement(checkpoint, source, record, args.resume_override)
    training.load_state_dict(checkpoint)
    if same:
        averages.load_state_dict(checkpoint["averages"][distributed.rank])
    else:
        # Batches and the ranks' shares may differ now: the epoch starts again.
        training.step = 0
    _logger.info("resumed from %s at epoch %d, step %d", source, training.epoch + 1, training.step)
    return averages
