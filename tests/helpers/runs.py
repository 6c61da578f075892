"""Runs of main.py in the process of the tests, of seconds on a CPU."""

import json
from pathlib import Path

import torch

import main
import options
from models.build import build_model, recorded_arguments, restore
from tasks import Experiment
from utils.checkpoint import load_checkpoint
from utils.distributed import Distributed

from .flags import tiny

SMALL = tiny(
    *("--lr", "2e-3", "--unscale-lr", "--model-ema-decay", "0.9", "--throughput-seconds", "0.1"),
    epochs=2,
)
HERE = ["--num-workers", "0", "--device", "cpu"]


def run(output: Path, *arguments) -> dict:
    """main.main in this process; -> eval.json."""
    assert main.main([*SMALL, "--output_dir", str(output), *map(str, arguments)]) == 0
    return json.loads((output / "eval.json").read_text())


def loaded(path: Path, *flags: str):
    """-> what --eval makes of a checkpoint and flags, the model."""
    checkpoint = load_checkpoint(path)
    argv = ["--eval", "--model-path", str(path), *HERE, *flags]
    args = options.parse(argv, recorded_arguments(checkpoint))
    experiment = Experiment.prepare(args, Distributed(torch.device("cpu")))
    model = build_model(experiment.spec, 10)
    return experiment, restore(model, checkpoint, str(path), threshold=args.gate_threshold)


def evaluated(path: Path, output: Path, *flags: str) -> dict:
    """--eval of a checkpoint; -> the dynamic model's column of eval.json."""
    words = ["--eval", "--model-path", str(path), "--output_dir", str(output), *HERE]
    assert main.main([*words, "--throughput-seconds", "0", *flags]) == 0
    return json.loads((output / "eval.json").read_text())["dynamic"]
