"""Smaller dense models, the points that a way of reducing tokens has to beat.

Each is trained from scratch as the teacher was, by the teacher's recorded flags, for as many steps
as teacher and student together.
"""

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import options
from loading.fingerprint import fingerprints
from models.build import FLAG_OF, ModelSpec
from models.flops import count_flops
from tasks import Experiment
from utils.arguments import given_flags, key_value
from utils.checkpoint import load_checkpoint
from utils.errors import UsageError, first_line
from utils.resume import HARMLESS

from . import runs
from .outcomes import PlannedRun

# Flags that a smaller model has in common with the students: the machine, and the images.
OF_STUDENTS = {
    "device",
    "num_workers",
    "pin_mem",
    "save_minutes",
    "cuda_graph",
    "data_path",
    "bad_images",
    "prefix",
    "part_seconds",
    "part_stride",
    "canvas",
    "whole_images",
    "eval_segments",
    "eval_crops",
    *runs.SHARED,
}
# Recorded flags that are no part of a recipe; the model's are set by other means.
NOT_OF_RECIPE = (HARMLESS | {"seed", "epochs", "sweep", *FLAG_OF.values()}) - {
    "drop_path",
    *OF_STUDENTS,
}


@dataclass(frozen=True)
class SmallerRuns:
    """The trainings of smaller models.

    images: fingerprints of theirs; told: {name of a model: what it was trained for}.
    """

    runs: list[PlannedRun]
    images: Mapping[str, str]
    told: dict[str, str]


@dataclass(frozen=True)
class Smaller:
    """A dense model by its changes of the teacher's --model-kwargs."""

    changes: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name in tables, and its folder."""
        return "dense-" + ",".join(f"{name}={value}" for name, value in self.changes.items())

    def arguments(self, kwargs: Mapping[str, Any]) -> list[str]:
        """The words of --model-kwargs, of which the students have `kwargs`."""
        return [f"{name}={value!r}" for name, value in (dict(kwargs) | self.changes).items()]


def parse_smaller(text: str) -> Smaller:
    """Parse `NAME=VALUE ...`. Raises UsageError."""
    try:
        changes = dict(map(key_value, shlex.split(text)))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UsageError(f"--smaller {text!r}: {first_line(error)}") from None
    smaller = Smaller(changes)
    if not changes or not all(c.isalnum() or c in "_=,.-" for c in smaller.name):
        raise UsageError(
            f'--smaller {text!r}: give changes of --model-kwargs, such as "embed_dim=48 depth=4"; '
            "they become a folder's name"
        )
    return smaller


def recipe(
    parser: argparse.ArgumentParser, teacher: Mapping[str, Any], student: argparse.Namespace
) -> list[str]:
    """Flags that repeat a teacher's recorded training, but for its model, seed and epochs.

    parser: of main.py, with the defaults of its task.
    """
    wanted = {name: value for name, value in teacher.items() if name not in NOT_OF_RECIPE}
    wanted |= {name: getattr(student, name) for name in OF_STUDENTS if hasattr(student, name)}
    words: list[str] = []
    for action in parser._actions:
        value = wanted.get(action.dest)
        if value is None or value == parser.get_default(action.dest):
            continue
        flag = action.option_strings[0]
        if isinstance(value, bool):
            negative = [name for name in action.option_strings if name.startswith("--no-")]
            words += [flag] if value else negative[:1]
        elif action.dest == "input_size" and not isinstance(value, int):
            words += [flag, "x".join(map(str, value))]
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def updates(checkpoint: Mapping[str, Any]) -> int | None:
    """Steps in which a checkpoint's training was to change the weights; None: not recorded, or it
    may have ended before, by --patience.
    """
    args, batches = checkpoint.get("args"), checkpoint.get("steps_per_epoch")
    if not isinstance(args, Mapping) or "epochs" not in args or not batches or args.get("patience"):
        return None
    return args["epochs"] * (batches // args.get("accum_steps", 1))


def plan_smaller(
    args: argparse.Namespace, student: argparse.Namespace, experiment: Experiment
) -> SmallerRuns:
    """Trainings of the models of `--smaller`; args: those of compare.py; student: flags of a run.

    Raises UsageError for a model that is not smaller, and if it is not known how to train it.
    """
    if not args.smaller:
        return SmallerRuns([], {}, {})
    teacher = load_checkpoint(args.dense_path)
    before = updates(teacher)
    own_epochs = "--epochs" in given_flags(args.smaller_flags)
    if before is not None:
        parser = options.build_parser(experiment.task)
        parser.set_defaults(**experiment.task.defaults)
        words = recipe(parser, teacher["args"] | _whole_batch(teacher), student)
    elif own_epochs:
        words = ["--method", "token", *args.common]  # whose flags a dense model then leaves unread
    else:
        raise UsageError(
            f"--smaller: {args.dense_path} does not record how it was trained; give "
            '--smaller-flags "--epochs N ..."'
        )
    words += ["--method", "dense", "--model", student.model.removeprefix("dyvm_")]
    words += ["--resume", "auto", "--throughput-seconds", "0", *args.smaller_flags]

    def parsed(smaller: Smaller, *more: str) -> argparse.Namespace:
        kwargs = ["--model-kwargs", *smaller.arguments(student.model_kwargs)]
        found = runs.parse_flags("--smaller", [*words, *kwargs, *more])
        runs.check_shared("--smaller-flags", found, student, "models")
        return found

    first = parsed(
        args.smaller[0], *([] if own_epochs else ["--epochs", str(teacher["args"]["epochs"])])
    )
    data = Experiment.prepare(first, experiment.distributed).data
    per_epoch = data.steps_per_epoch // first.accum_steps
    after = student.epochs * (experiment.data.steps_per_epoch // student.accum_steps)
    after = after if args.trained else 0
    epochs = first.epochs if own_epochs else max(1, round((before + after) / per_epoch))
    told = training_of(epochs, per_epoch, before, after, teacher)
    limit = _operations(experiment.spec.dense(), experiment)
    planned = []
    for seed in args.seeds[: args.smaller_seeds]:
        for smaller in args.smaller:
            folder = Path(args.output_dir).resolve() / smaller.name / f"seed{seed}"
            own = ["--seed", str(seed), "--output_dir", str(folder), "--epochs", str(epochs)]
            flags = parsed(smaller, *own)
            operations = _operations(ModelSpec.from_args(flags), experiment)
            if operations >= limit:
                raise UsageError(
                    f"--smaller {smaller.name.removeprefix('dense-')}: its {operations / 1e6:.2f} "
                    f"MFLOPs are not fewer than the teacher's {limit / 1e6:.2f}"
                )
            kwargs = ["--model-kwargs", *smaller.arguments(student.model_kwargs)]
            planned.append(PlannedRun(smaller.name, seed, folder, [*words, *kwargs, *own], flags))
    images = fingerprints(data, first.data_path)
    return SmallerRuns(planned, images, {smaller.name: told for smaller in args.smaller})


def _whole_batch(checkpoint: Mapping[str, Any]) -> dict[str, int]:
    """One process has the whole batch of the teacher's several if it joins as many of its own."""
    joined = checkpoint["args"].get("accum_steps", 1)
    return {"accum_steps": joined * checkpoint.get("world_size", 1)}


def _operations(spec: ModelSpec, experiment: Experiment) -> float:
    """`exact` operations of an image."""
    with torch.device("meta"):
        model = experiment.task.model(spec, experiment.data.num_classes)
    return count_flops(model).exact


def training_of(
    epochs: int, per_epoch: int, teacher: int | None, student: int, checkpoint: Mapping[str, Any]
) -> str:
    """What a smaller model was trained for, in words; steps of the teacher and of a student."""
    told = f"from scratch, {epochs} epochs of {per_epoch} steps"
    if teacher is None:
        return f"{told}; how long the teacher was trained is not recorded"
    total = teacher + student
    told += f", {epochs * per_epoch} in all (teacher {teacher} + student {student} = {total})"
    if checkpoint["args"].get("model_path"):
        told += "; what the teacher itself started from is not counted"
    return told
