"""Starting several processes that find each other as under torchrun."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_STEP_NUM_TASKS",
)


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without a launcher's and without GPUs, plus `extra` variables."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return (
        kept
        | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_CPP_LOG_LEVEL": "FATAL",
        }
        | extra
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(processes: int, arguments: list) -> list[subprocess.Popen]:
    """Start a Python program in several processes in the repository's root; by rank, outputs in
    pipes.
    """
    port, children = str(free_port()), []
    for rank in map(str, range(processes)):
        environment = clean_environment(
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        children.append(
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return children


def finish(children: list[subprocess.Popen], timeout: int = 180) -> list[tuple[int, str, str]]:
    """Wait for all; -> (exit code, standard output, standard error) by rank."""
    try:
        outputs = [child.communicate(timeout=timeout) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *output) for child, output in zip(children, outputs, strict=True)]


def launch(processes: int, arguments: list) -> list[str]:
    """Run a Python program to its good end in several processes; -> standard outputs by rank."""
    ends = finish(start(processes, arguments))
    assert all(code == 0 for code, _, _ in ends), "\n".join(stderr for _, _, stderr in ends)
    return [stdout for _, stdout, _ in ends]


def wait_until(happened: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(0.02)
