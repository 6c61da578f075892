"""What every benchmark tells alike: the head of its record, and in one line why something is left out."""

import datetime
import shlex
import sys
from typing import Any

import torch

from utils.environment import describe_environment


def first_line(error: BaseException) -> str:
    """What an error says, without the trace that compilers put behind it; its type where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def head(script: str, device: str, *packages: str) -> dict[str, Any]:
    """{"command", "date", "device", "threads", "environment"} of this run of `benchmarks/<script>`.

    device: "cpu" or "cuda"; packages: rivals whose versions count too.
    """
    environment = describe_environment(*packages)
    name = (torch.cuda.get_device_name() if device == "cuda" else
            f"{environment['cpu']}, {torch.backends.cpu.get_cpu_capability()}")
    return {"command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": name, "threads": torch.get_num_threads(), "environment": environment}
