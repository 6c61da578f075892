"""Being told to leave: SIGTERM and SIGUSR1 ask for an orderly end, and the training loop obeys
after its step.

    preemption.install()
    ...
    if distributed.agree_any(preemption.requested()):   # every rank stops after the same step
        save, wait for the writer, distributed.shutdown(), return preemption.EXIT_CODE

Schedulers send SIGTERM before they take a node away, and SLURM sends SIGUSR1 ahead of the time
limit when asked to (`#SBATCH --signal=USR1@120`).
"""

import signal
from types import FrameType

# sysexits.h's EX_TEMPFAIL: it failed for now, try again. `scripts/slurm.sh` requeues a job that
# ends with it. Like every code but 0 it makes `torchrun --max-restarts` start the workers again.
EXIT_CODE = 75

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: signal.Signals | None = None


def install() -> None:
    """Let SIGTERM and SIGUSR1 set a flag instead of ending the process. Call in the main thread of
    every rank.
    """
    for number in SIGNALS:
        signal.signal(number, _remember)


def requested() -> bool:
    """Whether this process was told to leave; ask `Distributed.agree_any` before acting on it."""
    return _received is not None


def received() -> str | None:
    """Name of the signal that came last, for the log."""
    return None if _received is None else _received.name


def _remember(number: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)
