"""What an exported file says of itself, as text beside the program."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models import VisionMamba
from models.build import IDENTITY, sigmoid
from models.flops import count_flops
from tasks import TASKS, Task
from utils.errors import UsageError, UserError

OWN = "dyvm"  # key of the record that predict.py reads
VERSION = 2  # with a seal
NOT_RECORDED = {"data_path", "prefix"}  # specific to the machine


def refuse_exported(path: str | os.PathLike, program: str, onnx_too: bool = False) -> None:
    """Raise UsageError for a file of export.py by its name, where `program` needs a checkpoint;
    onnx_too: or an ONNX file.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".pt2" or (suffix == ".onnx" and not onnx_too):
        raise UsageError(
            f"{path} is an exported model; {program} needs the checkpoint that it was made from"
            + (", or an ONNX file" if onnx_too else "")
        )


def record_of(
    model: VisionMamba,
    flags: Mapping[str, Any],
    task: Task,
    class_names: Sequence[str] | None,
    shown_names: Sequence[str],
    checkpoint: str,
) -> dict[str, Any]:
    """The flags that a prediction depends on, the classes, and what the model costs.

    flags: those that it was loaded with; class_names: as the checkpoint has them; shown_names: as
    predict.py prints them; checkpoint: SHA-256.
    """
    names = [
        name for name in (*IDENTITY, *task.recorded) if name in flags and name not in NOT_RECORDED
    ]
    recorded = {name: flags[name] for name in names}
    recorded["model_kwargs"] = dict(flags["model_kwargs"])
    return {
        "version": VERSION,
        "task": task.name,
        "args": recorded,
        "class_names": class_names,
        "shown_names": list(shown_names),
        "ema": flags["ema"],
        "int8": flags["int8"],
        "checkpoint": checkpoint,
        "input_size": list(model.patch_embed.img_size),
        "frames": model.num_frames,
        "kept_patches": model.kept_counts(),
        "patches": model.num_patches,
        "gate_threshold": sigmoid(model.gate_threshold) if model.route_blocks else None,
        "exact_flops": count_flops(model).exact,
    }


def readable(
    record: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]
) -> dict[str, str]:
    """The record as keys and texts: that of predict.py, and what users of other programs want."""
    wanted = ("task", "input_size", "frames", "kept_patches", "patches", "gate_threshold")
    wanted += ("exact_flops", "ema", "int8", "checkpoint")
    return {
        OWN: json.dumps(record),
        "class_names": json.dumps(record["shown_names"]),
        **{name: json.dumps(record[name]) for name in wanted},
        "channels": "RGB, 0 to 1, less mean, divided by std",
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
    }


def parse_record(texts: Mapping[str, str], source: str) -> dict[str, Any]:
    """The record among a file's texts. Raises UserError for a file of another program."""
    try:
        record = json.loads(texts[OWN])
        version, known = record["version"], record["task"] in TASKS and record["args"]
    except (KeyError, ValueError, TypeError):
        version = known = None
    if version is not None and version != VERSION:
        raise UserError(
            f"{source} was written by another version of export.py (its record has the number "
            f"{version}, here it is {VERSION}); export it again from its checkpoint"
        )
    if not known:
        raise UserError(
            f"{source} is not a model that export.py has written: it lacks its record; export it "
            "again from its checkpoint"
        )
    return record
