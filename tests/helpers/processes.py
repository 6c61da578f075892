"""Starting several processes that find each other as under torchrun."""

import multiprocessing
import os
import runpy
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver, reduction
from pathlib import Path
from unittest import mock

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


class Program:
    """A Python program as `subprocess.Popen` starts it, but without the seconds of its imports: it
    runs in a fork of a process that has imported main.py and computed nothing.

    arguments: those of the interpreter: `-c CODE`, `-m MODULE ...` or `SCRIPT ...`; it runs in the
    repository's root with exactly the given environment.
    """

    def __init__(self, arguments: list, environment: dict[str, str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["main", "sklearn.datasets"])
        with mock.patch.dict(os.environ, clean_environment(), clear=True):
            forkserver.ensure_running()
        pipes = [os.pipe(), os.pipe()]
        ends = [_SentDescriptor(write) for _, write in pipes]
        self._process = context.Process(
            target=_run, args=([str(word) for word in arguments], environment, *ends)
        )
        self._process.start()
        for _, write in pipes:
            os.close(write)
        self.stdout, self.stderr = (os.fdopen(read, encoding="utf-8") for read, _ in pipes)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; minus the number of the signal that ended it."""
        self._process.join(timeout)
        assert self.returncode is not None, f"it still runs after {timeout} s"
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What is left of standard output and standard error, when the program has ended; it is
        killed after `timeout` seconds.
        """
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        with ThreadPoolExecutor(2) as pool:
            outputs = tuple(pool.map(lambda pipe: pipe.read(), (self.stdout, self.stderr)))
        self.wait(timeout)
        timer.cancel()
        return outputs


class _SentDescriptor:
    """An open file that a process started by multiprocessing inherits."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __reduce__(self):
        return _SentDescriptor._receive, (reduction.DupFd(self.descriptor),)

    @staticmethod
    def _receive(sent) -> int:
        return sent.detach()


def _run(arguments: list[str], environment: dict[str, str], stdout: int, stderr: int) -> None:
    os.dup2(stdout, 1), os.dup2(stderr, 2)
    os.close(stdout), os.close(stderr)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    kind, *rest = arguments
    try:
        if kind == "-c":
            code, *words = rest
            sys.argv = [kind, *words]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(kind, run_name="__main__")
    finally:
        sys.stdout.flush()


def start(processes: int, arguments: list) -> list[Program]:
    """Start a Python program in several processes in the repository's root; by rank."""
    port, children = str(free_port()), []
    for rank in map(str, range(processes)):
        environment = clean_environment(
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        children.append(Program(arguments, environment))
    return children


def torchrun(*arguments) -> Program:
    """`torchrun --standalone --nproc_per_node 2 ARGUMENTS`; its workers are fresh processes."""
    options = ["--standalone", "--nproc-per-node", "2"]
    return Program(["-m", "torch.distributed.run", *options, *arguments], clean_environment())


def finish(children: list[Program], timeout: int = 180) -> list[tuple[int, str, str]]:
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
