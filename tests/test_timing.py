"""Timing: in turn, medians, how many samples, and samples redone while others use the machine."""

import pytest

from utils import timing


@pytest.fixture
def samples(monkeypatch):
    """What each call of `sample` says in turn, (seconds, processor seconds, disturbance); the call
    itself is made.
    """
    said = []

    def sample(call, device):
        call()
        return said.pop(0) if said else (1.0, 1.0, 0.0)

    monkeypatch.setattr(timing, "sample", sample)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    return said


def recorder():
    order = []
    return order, {name: lambda name=name: order.append(name) for name in "ab"}


def test_calls_take_turns_and_medians_are_told(samples):
    samples += [(seconds, seconds / 2, 0.0) for seconds in (1, 10, 2, 20, 9, 90)]
    order, calls = recorder()
    times = timing.interleaved(calls, "cpu", rounds=3)
    assert order == list("ababab")
    assert times["a"] == {"ms": 2000, "cpu_ms": 1000, "samples": 3, "disturbed": 0}
    assert times["b"]["ms"] == 20_000


def test_a_disturbed_sample_is_redone_as_often_as_allowed(samples):
    samples += [(1, 1, 0.5), (2, 2, 0.0), (3, 3, 0.5), (4, 4, 0.5)]
    times = timing.interleaved({"a": lambda: None}, "cpu", rounds=2, retries=2)
    assert times["a"] == {"ms": 3000, "cpu_ms": 3000, "samples": 2, "disturbed": 1}


def test_long_calls_are_sampled_three_times(samples):
    samples += [(5, 5, 0.0), (1, 1, 0.0)] * 3
    times = timing.interleaved(recorder()[1], "cpu", rounds=6, long=4.0)
    assert [row["samples"] for row in times.values()] == [3, 6]


def test_rounds_go_on_until_the_time_is_over():
    order, calls = recorder()
    timing.interleaved(calls, "cpu", rounds=2, seconds=0.05)
    assert len(order) > 4 and order == list("ab") * (len(order) // 2)
    order.clear()
    timing.interleaved(calls, "cpu", rounds=2)
    assert order == list("abab")


def test_without_counters_nothing_counts_as_disturbed(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "_STAT", tmp_path / "none")
    seconds, own, share = timing.sample(lambda: sum(range(100_000)), "cpu")
    assert seconds > 0 and own > 0 and share == 0.0
