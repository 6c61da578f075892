"""Fair timing: rivals in turn, medians; samples are redone while other processes are busy."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

QUIET = 0.1  # share of the machine that other processes may use during a sample
_STAT = Path("/proc/stat")


def _busy_seconds() -> float:
    """Processor time that all processes together have used since the start of the machine."""
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, _STAT.read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def sample(call: Callable[[], object], device: str) -> tuple[float, float, float]:
    """One call: (seconds, processor seconds, share of the machine that other processes used; 0
    where unknown).

    Processor seconds hardly depend on what else runs, but with several threads they include waiting
    at barriers.
    """
    watch = device == "cpu" and _STAT.exists()
    before, own_before = _busy_seconds() if watch else 0.0, time.process_time()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, own = time.perf_counter() - start, time.process_time() - own_before
    if not watch:
        return seconds, own, 0.0
    all_processes = _busy_seconds() - before
    # the counters tick every 10 ms or so: shorter differences say nothing
    disturbance = max(0.0, all_processes - own - 0.01 * os.cpu_count()) / (seconds * os.cpu_count())
    return seconds, own, disturbance


def interleaved(
    calls: dict[str, Callable[[], object]],
    device: str,
    rounds: int,
    retries: int,
    long: float = 1.0,
) -> dict[str, dict]:
    """Times of all calls, in turn: {name: {"ms", "cpu_ms", "samples", "disturbed"}}, medians over
    `rounds`.

    A call that takes more than `long` processor seconds is sampled three times. A sample that other
    processes disturb is redone; after `retries` of these over the run of one call the disturbed
    ones count too, and are counted in "disturbed".
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    disturbed, left = dict.fromkeys(calls, 0), dict.fromkeys(calls, retries)
    for _ in range(rounds):
        for name, call in calls.items():
            if len(taken[name]) >= 3 and statistics.median(own for _, own in taken[name]) > long:
                continue
            seconds, own, share = sample(call, device)
            while share > QUIET and left[name] > 0:
                left[name] -= 1
                time.sleep(0.2)
                seconds, own, share = sample(call, device)
            taken[name].append((seconds, own))
            disturbed[name] += share > QUIET
    return {
        name: {
            "ms": statistics.median(seconds for seconds, _ in times) * 1e3,
            "cpu_ms": statistics.median(own for _, own in times) * 1e3,
            "samples": len(times),
            "disturbed": disturbed[name],
        }
        for name, times in taken.items()
    }
