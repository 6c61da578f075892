"""Runs of main.py in the process of the tests, of seconds on a CPU."""

import json
from pathlib import Path

import main

from .flags import tiny

SMALL = tiny(
    *("--lr", "2e-3", "--unscale-lr", "--model-ema-decay", "0.9", "--throughput-seconds", "0.1"),
    epochs=2,
)


def run(output: Path, *arguments) -> dict:
    """main.main in this process; -> eval.json."""
    assert main.main([*SMALL, "--output_dir", str(output), *map(str, arguments)]) == 0
    return json.loads((output / "eval.json").read_text())
