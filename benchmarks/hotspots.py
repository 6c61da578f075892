"""Where a call spends its time, by kernel on a GPU and by PyTorch operator on a CPU."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def hotspots(call: Callable[[], object], device: str, count: int = 8) -> list[dict[str, Any]]:
    """The `count` names with the most own time in one call, sorted: [{"name", "ms", "share"}]."""
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, acc_events=True) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type == kind:
            times[event.key] += (
                event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            )
    whole = sum(times.values())
    return [
        {"name": name, "ms": us / 1e3, "share": us / whole}
        for name, us in times.most_common(count)
        if us
    ]


def describe(rows: list[dict[str, Any]]) -> str:
    """One line for each row of `hotspots`."""
    return "\n".join(
        f"  {100 * row['share']:5.1f} % {row['ms']:9.3f} ms  {row['name'][:90]}" for row in rows
    )


def lines(record: Mapping[str, Any]) -> list[str]:
    """What a benchmark's record holds of them, for the screen."""
    found = record.get("hotspots", {})
    return [f"where the time of {name} goes:\n{describe(rows)}" for name, rows in found.items()]
