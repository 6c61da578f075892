"""Going on after an interruption: what a checkpoint must agree on with the run that continues it."""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from utils.checkpoint import load_checkpoint, load_newest
from utils.errors import UserError
from utils.files import sha256_of

# Flags that say where, how fast or for how long, and do not alter the weights that a run ends with.
HARMLESS = {"output_dir", "device", "num_workers", "pin_mem", "resume", "resume_override", "save_minutes",
            "throughput_seconds", "data_path", "model_path", "dense_path", "eval", "bad_images"}

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
