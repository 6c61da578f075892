"""Trains, is killed, resumes, and so on: `python kill_driver.py WHOLE PARTS KILLS FLAGS`

The run WHOLE is not disturbed. Each attempt at PARTS is a fork of this process, which has imported
everything and computed nothing. Prints how many kills hit a save, the start-up, and an evaluation.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import sklearn.datasets  # noqa: F401  (so that each fork finds it imported)
import torch

import main
from utils import resume
from utils.checkpoint import NEWEST, PREVIOUS
from utils.program import run_main


def attempt(flags: list[str], tell: int) -> int:
    """Start training in a fork, which writes an "s" to `tell` when a save begins, "e" when an
    evaluation does.
    """
    child = os.fork()
    if child:
        return child
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    for module, name, letter in ((resume.Saver, "save", b"s"), (main, "validate", b"e")):
        setattr(module, name, telling(getattr(module, name), tell, letter))
    run_main(lambda: main.main(flags))


def telling(function, tell: int, letter: bytes):
    def wrapped(*arguments, **options):
        os.write(tell, letter)
        return function(*arguments, **options)

    return wrapped


def drive(whole: str, parts: Path, kills: int, flags: list[str]) -> None:
    hear, tell = os.pipe()
    child = attempt([*flags, "--output_dir", whole], tell)
    assert os.waitpid(child, 0)[1] == 0
    os.read(hear, 1 << 16)
    generator, met = random.Random(5), {"save": 0, "start-up": 0, "evaluation": 0}
    for kill in range(kills):
        child = attempt([*flags, "--output_dir", str(parts)], tell)
        if kill % 10:  # every tenth kill may hit the start-up
            while not os.read(hear, 1):
                pass
        time.sleep(generator.uniform(0, 0.15))
        done, status = os.waitpid(child, os.WNOHANG)
        assert not done, f"the run ended before kill {kill}, with status {status}"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with contextlib.suppress(
            ProcessLookupError
        ):  # it had no session of its own yet, and no workers
            os.killpg(child, signal.SIGKILL)  # the workers that it left, as a scheduler does
        os.write(tell, b"k")
        said = os.read(hear, 1 << 16)
        met["start-up"] += said == b"k"
        met["evaluation"] += said.endswith(b"ek")
        met["save"] += any(
            path.name.startswith((f".{NEWEST}", ".best")) for path in parts.glob(".*.tmp")
        ) or ((parts / PREVIOUS).exists() and not (parts / NEWEST).exists())
    child = attempt([*flags, "--output_dir", str(parts)], tell)
    assert os.waitpid(child, 0)[1] == 0
    print(*(f"{name}={count}" for name, count in met.items()))


if __name__ == "__main__":
    torch.set_num_threads(1)  # before the forks: a pool of threads would not survive them
    drive(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
