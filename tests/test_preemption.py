"""Signals that ask for an orderly end: remembered in the main process."""

import os
import signal

import pytest

from utils import preemption


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
