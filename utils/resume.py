"""Resuming: what a checkpoint and the run that continues it must agree on."""

import argparse
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from . import preemption, run_folder
from .checkpoint import BEST, CheckpointWriter, load_checkpoint, load_newest, save_checkpoint
from .distributed import Distributed
from .errors import UserError
from .files import atomic_file, sha256_of
from .logging import Averages
from .nonfinite import NonFiniteError
from .run_folder import NONFINITE

# Flags that do not alter a training, but the evaluation of its checkpoint.
OF_EVALUATION = {"eval_segments", "eval_crops", "gate_threshold"}
# Flags about where, how fast and how long; they do not alter what a step does to the weights.
HARMLESS = {
    "output_dir",
    "device",
    "num_workers",
    "pin_mem",
    "resume",
    "resume_override",
    "overwrite",
    "save_minutes",
    "throughput_seconds",
    "cuda_graph",
    "data_path",
    "prefix",
    "model_path",
    "dense_path",
    "eval",
    "bad_images",
    "patience",
    "calibrate",
    "token_budget",
    *OF_EVALUATION,
}
# Entries that checkpoints of earlier versions lack, and that follow from their flags.
RECORDED_LATER = {"task", "images"}
REPLACED_BEST = f"replaced_{BEST}"

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
    images: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a checkpoint records of its run besides its state.

    images: fingerprints of its splits.
    """
    return {
        "args": vars(args),
        "world_size": world_size,
        "class_names": list(class_names),
        "steps_per_epoch": steps_per_epoch,
        "family": family,
        "task": task,
        "teacher_sha256": teacher_checksum(args),
        "images": None if images is None else dict(images),
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


def flag_differences(
    before: Mapping[str, Any], now: Mapping[str, Any], harmless: Collection[str] = HARMLESS
) -> list[str]:
    """Flags whose values would alter a run, as `flag: before -> now`."""
    return [
        f"--{name.replace('_', '-')}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if name not in harmless
        and not (name == "bit_depth" and now.get(name) == "auto")  # determined from the data
        and _plain(before.get(name, _unrecorded(name, before))) != _plain(now.get(name))
    ]


def _unrecorded(name: str, flags: Mapping[str, Any]) -> Any:
    """What a flag stands for in runs of earlier versions, which did not have it."""
    if name == "poly_power":  # timm's power, where the run had such a schedule
        return 0.1 if flags.get("sched") == "poly" else 1.0
    return {
        "crop_area": [0.08, 1.0],
        "eval_shuffle_frames": False,
        "bit_depth": "auto",
        "reduction": "prune",
        "selector_gradient": "paper",
        "selector_weight": 1.0,
        "importance_every": 1,
        "keep_schedule": "fixed",
        "final_noise": 1.0,
    }.get(name)


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
    """Load the checkpoint to resume into a new training, if any; -> averages of the epoch begun.

    A run that starts anew, or moves here, first removes what an earlier one left in its folder.
    """
    averages = Averages()
    folder, wanted = Path(args.output_dir), run_folder.wanted_checkpoint(args)
    resumed = find_checkpoint(wanted, args.output_dir)
    if resumed is None:
        if wanted == "auto":
            _logger.info("--resume auto: no checkpoint in %s; starting anew at epoch 1", folder)
        distributed.on_main(lambda: run_folder.clear(folder))
        return averages
    if wanted != args.resume:
        _logger.warning("started again by the launcher: the run in %s is continued", folder)
    checkpoint, source = resumed
    same = check_agreement(checkpoint, source, record, args.resume_override)
    training.load_state_dict(checkpoint)
    if same:
        averages.load_state_dict(checkpoint["averages"][distributed.rank])
    else:
        # Batches and the ranks' shares may differ now: the epoch starts again.
        training.step = 0
    distributed.on_main(lambda: _settle_best(source, folder, checkpoint, wanted == "auto"))
    _logger.info("resumed from %s at epoch %d, step %d", source, training.epoch + 1, training.step)
    return averages


def _settle_best(source: Path, folder: Path, checkpoint: Mapping[str, Any], newest: bool) -> None:
    """Make the folder's best checkpoint that of the run of `checkpoint`, which is in `source`.

    Where it is another run's, or of an epoch after `source`, it is set aside. Beside the `newest`
    checkpoint it may be of a later epoch: a run may be killed between the two.
    """
    own, best = folder / BEST, checkpoint["best"]
    if source.parent.resolve() != folder.resolve():
        run_folder.clear(folder)
        there = source.parent / BEST
        if best is not None and _read_best(there).get("best") == best:
            with open(there, "rb") as file, atomic_file(own) as copy:
                shutil.copyfileobj(file, copy)
        elif best is not None:
            _logger.warning(
                "the best epoch so far (%.4g) is not among the files beside %s: until a later one "
                "is at least as good, %s has no %s",
                *(best, source, folder, BEST),
            )
        return
    if source.name == BEST or not own.exists():
        return
    found = _read_best(own)
    if found.get("best") == best:
        return
    if newest and not flag_differences(found.get("args", {}), checkpoint["args"]):
        return
    os.replace(own, folder / REPLACED_BEST)
    _logger.warning(
        "%s is not of the epochs up to %s: it is kept as %s", own, source, REPLACED_BEST
    )


def _read_best(path: Path) -> dict[str, Any]:
    """A best checkpoint; empty if there is none that can be read."""
    try:
        return load_checkpoint(path) if path.exists() else {}
    except UserError:
        return {}
