"""Going on after an interruption: what a checkpoint must agree on with the run that continues it."""

import argparse
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from engine import Training
from utils import preemption
from utils.checkpoint import CheckpointWriter, load_checkpoint, load_newest
from utils.distributed import Distributed
from utils.errors import UserError
from utils.files import sha256_of
from utils.logging import Averages

# Flags that say where, how fast or for how long, and do not alter the weights that a run ends with.
HARMLESS = {"output_dir", "device", "num_workers", "pin_mem", "resume", "resume_override", "save_minutes",
            "throughput_seconds", "cuda_graph", "data_path", "model_path", "dense_path", "eval", "bad_images"}

_logger = logging.getLogger(__name__)


def find_checkpoint(resume: Optional[str], output_dir: str) -> Optional[tuple[dict[str, Any], Path]]:
    """The checkpoint that `--resume` means and its file; None for a fresh start."""
    if resume is None:
        return None
    if resume != "auto":
        return load_checkpoint(resume), Path(resume)
    return load_newest(output_dir)


def teacher_checksum(args: argparse.Namespace) -> Optional[str]:
    """SHA-256 of the dense weights that a run starts from."""
    return sha256_of(args.model_path) if args.model_path else None


def identity(args: argparse.Namespace, world_size: int, class_names: list[str]) -> dict[str, Any]:
    """What a checkpoint records of its run, beside its state."""
    return {"args": vars(args), "world_size": world_size, "class_names": class_names,
            "teacher_sha256": teacher_checksum(args)}


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Differences between two `identity` records that would alter the run, as `flag: recorded -> now`."""
    before, now = recorded["args"], current["args"]
    found = [f"--{name.replace('_', '-')}: {before.get(name)!r} -> {now.get(name)!r}"
             for name in sorted(before.keys() | now.keys())
             if name not in HARMLESS and _plain(before.get(name)) != _plain(now.get(name))]
    if recorded["world_size"] != current["world_size"]:
        found.append(f"number of processes: {recorded['world_size']} -> {current['world_size']}")
    if recorded["teacher_sha256"] != current["teacher_sha256"]:
        found.append("--model-path: the file's content is another one than when the run began "
                     f"({str(recorded['teacher_sha256'])[:12]} -> {str(current['teacher_sha256'])[:12]})")
    if recorded["class_names"] != current["class_names"]:
        found.append("the classes of the data set")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_agreement(checkpoint: Mapping[str, Any], source: Path, current: Mapping[str, Any], override: bool) -> None:
    """Raise UserError for a checkpoint that this run may not continue; with `override`, warn instead."""
    lacking = [key for key in ("optimizer", "epoch", "step", *current) if key not in checkpoint]
    if lacking:
        raise UserError(f"{source} cannot be resumed: it holds no {', '.join(lacking)}; start from its weights with "
                        "--model-path instead")
    found = differences(checkpoint, current)
    if found and not override:
        raise UserError(f"{source} is of a run with other settings ({'; '.join(found)}); repeat its flags, or accept "
                        "the change with --resume-override")
    for difference in found:
        _logger.warning("resumed in spite of a difference: %s", difference)


class Saver:
    """Writes the run's checkpoints; every rank calls it, rank 0 writes."""

    def __init__(self, run: Training, record: dict[str, Any], args: argparse.Namespace, distributed: Distributed):
        self.run, self.record, self.distributed = run, record, distributed
        self.minutes = args.save_minutes
        self.saved_at = time.monotonic()
        self.writer = CheckpointWriter(args.output_dir) if distributed.is_main else None

    def save(self, averages: Averages, best: bool = False) -> None:
        """Save everything that the run needs to go on, in an envelope that other programs can load too."""
        parts = self.distributed.gather_objects(averages.state_dict())
        if self.writer is not None:
            family = self.run.model.family.name
            self.writer.save({**self.run.state_dict(), **self.record, "family": family, "averages": parts}, best)
        self.saved_at = time.monotonic()

    def after_step(self, averages: Averages) -> bool:
        """Save when it is time; save and say True when the run is told to leave."""
        if self.writer is not None:
            self.writer.check()
        leaving = self.distributed.agree_any(preemption.requested())
        due = self.minutes > 0 and time.monotonic() - self.saved_at > 60 * self.minutes
        if leaving or self.distributed.agree_any(due and self.distributed.is_main):
            self.save(averages)
        return leaving

    def close(self) -> None:
        """Return when the last save is on the disk."""
        if self.writer is not None:
            self.writer.close()


def start_or_resume(run: Training, record: dict[str, Any], args: argparse.Namespace,
                    distributed: Distributed) -> Averages:
    """Bring a fresh run to where its checkpoint was, if there is one; -> averages of the epoch begun."""
    averages = Averages()
    found = find_checkpoint(args.resume, args.output_dir)
    if found is None:
        return averages
    checkpoint, source = found
    check_agreement(checkpoint, source, record, args.resume_override)
    run.load_state_dict(checkpoint)
    if checkpoint["world_size"] == distributed.world_size:
        averages.load_state_dict(checkpoint["averages"][distributed.rank])
    else:
        run.step = 0  # the shares of the ranks are others now: the epoch starts again
    _logger.info("resumed from %s at epoch %d, step %d", source, run.epoch + 1, run.step)
    return averages
