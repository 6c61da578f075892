"""Graceful preemption: SIGTERM and SIGUSR1 request an orderly end after the current step.

    preemption.install()
    ...
    if distributed.agree_any(preemption.requested()):   # every rank stops after the same step
        save, wait for the writer, distributed.shutdown(), return preemption.EXIT_CODE

Schedulers send SIGTERM before they take a node away, and SLURM sends SIGUSR1 ahead of the time
limit on request (`#SBATCH --signal=USR1@120`).
"""

import signal
from types import FrameType

# sysexits.h's EX_TEMPFAIL: a temporary failure, try again. `scripts/slurm.sh` requeues a job that
# ends with it. Like every code but 0 it makes `torchrun --max-restarts` restart the workers.
EXIT_CODE = 75

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: signal.Signals | None = None


def install() -> None:
    """Make SIGTERM and SIGUSR1 set a flag instead of ending the process.

    Call it in the main thread of every rank.
    """
    for number in SIGNALS:
        signal.signal(number, _remember)


def requested() -> bool:
    """Whether this process is to stop; use `Distributed.agree_any` before acting on it."""
    return _received is not None


def received() -> str | None:
    """Name of the last signal received, for the log."""
    return None if _received is None else _received.name


def _remember(number: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)
