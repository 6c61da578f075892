"""The head of a record, the same for every benchmark."""

import datetime
import shlex
import sys
from typing import Any

import torch

from utils.environment import describe_environment, device_name


def head(script: str, device: str, *packages: str) -> dict[str, Any]:
    """{"command", "date", "device", "threads", "environment"} of this run of `benchmarks/<script>`.

    device: "cpu" or "cuda"; packages: rivals whose versions count too.
    """
    environment = describe_environment(*packages)
    name = (
        device_name(torch.device(device))
        if device == "cuda"
        else f"{environment['cpu']}, {torch.backends.cpu.get_cpu_capability()}"
    )
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "threads": torch.get_num_threads(),
        "environment": environment,
    }
