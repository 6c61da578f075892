"""Fair timing: rivals in turn, medians, and samples redone while other processes are busy.

On a shared machine an absolute time says little; what is timed in alternation sees the same noise,
so that ratios can be trusted.
"""

import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch

QUIET = 0.1  # share of the machine that other processes may use during a sample
_STAT = Path("/proc/stat")

Call = Callable[[], object]


def seconds_of(call: Call, device: str) -> float:
    """Seconds of one call, with all that it queues on a GPU; device: "cpu" or "cuda"."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _busy_seconds() -> float | None:
    """Processor time that all processes together have used since the start of the machine; None
    where the system does not tell.
    """
    try:
        numbers = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:])
        user, nice, system, _, _, irq, softirq, *_ = numbers
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def sample(call: Call, device: str) -> tuple[float, float, float]:
    """One call: (seconds, processor seconds, share of the machine that other processes used; 0
    where unknown).

    Processor seconds hardly depend on what else runs, but with several threads they include waiting
    at barriers.
    """
    busy_before = _busy_seconds() if device == "cpu" else None
    own_before = time.process_time()
    seconds = seconds_of(call, device)
    own = time.process_time() - own_before
    busy = None if busy_before is None else _busy_seconds()
    if busy is None:
        return seconds, own, 0.0
    # the counters tick every 10 ms or so: shorter differences say nothing
    others = max(0.0, busy - busy_before - own - 0.01 * os.cpu_count())
    return seconds, own, others / (seconds * os.cpu_count())


def interleaved(
    calls: Mapping[Hashable, Call],
    device: str,
    rounds: int,
    seconds: float = 0.0,
    retries: int = 0,
    long: float = float("inf"),
) -> dict[Hashable, dict[str, Any]]:
    """Times of all calls, in turn: {name: {"ms", "cpu_ms", "samples", "disturbed"}}, medians over
    the rounds: `rounds` of them, and more until `seconds` are over.

    A call that takes more than `long` processor seconds is sampled three times. A sample that other
    processes disturb is redone; after `retries` of these over the run of one call the disturbed
    ones count too, and are counted in "disturbed".
    """
    taken: dict[Hashable, list[tuple[float, float]]] = {name: [] for name in calls}
    disturbed, left = dict.fromkeys(calls, 0), dict.fromkeys(calls, retries)
    end, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < end:
        done += 1
        for name, call in calls.items():
            if len(taken[name]) >= 3 and statistics.median(own for _, own in taken[name]) > long:
                continue
            elapsed, own, share = sample(call, device)
            while share > QUIET and left[name] > 0:
                left[name] -= 1
                time.sleep(0.2)
                elapsed, own, share = sample(call, device)
            taken[name].append((elapsed, own))
            disturbed[name] += share > QUIET
    return {
        name: {
            "ms": statistics.median(elapsed for elapsed, _ in times) * 1e3,
            "cpu_ms": statistics.median(own for _, own in times) * 1e3,
            "samples": len(times),
            "disturbed": disturbed[name],
        }
        for name, times in taken.items()
    }
