"""Signals that ask for an orderly end: remembered in the main process, survived by the data workers."""

import os
import signal

import pytest
from torch.utils.data import DataLoader, Dataset

from utils import preemption


class WorkerPids(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.fixture
def handlers(monkeypatch):
    """Puts the handlers of the test run back."""
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    monkeypatch.setattr(preemption, "_received", None)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_signal_is_remembered(handlers, number):
    preemption.install()
    assert not preemption.requested() and preemption.received() is None
    os.kill(os.getpid(), number)
    assert preemption.requested() and preemption.received() == number.name


def test_exit_code_makes_schedulers_restart():
    assert preemption.EXIT_CODE not in (0, 1, 2) and preemption.EXIT_CODE < 126


def test_workers_survive_signals_to_the_whole_job():
    loader = DataLoader(WorkerPids(), num_workers=1, worker_init_fn=lambda worker: preemption.shield_worker())
    pids = set()
    for position, pid in enumerate(loader):
        pids.add(int(pid))
        if position == 0:
            for number in (*preemption.SIGNALS, signal.SIGINT):
                os.kill(int(pid), number)
    assert len(pids) == 1 and position == 39
