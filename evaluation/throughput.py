"""Images per second of several models, measured in turn on the same batch.

On a shared machine an absolute time says little; models timed in alternation see the same noise, so
that their ratio can be trusted.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

WARM_UP = 2
MIN_ROUNDS = 5


def measure(
    models: Mapping[str, Callable[[Tensor], object]], images: Tensor, seconds: float
) -> dict[str, float]:
    """Median images/s of each model on `images` [B, 3, H, W], over as many alternating rounds as
    fit in `seconds`.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            for _ in range(WARM_UP):
                model(images)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < MIN_ROUNDS:
            for name, model in models.items():
                times[name].append(_seconds(model, images))
    return {name: len(images) / statistics.median(samples) for name, samples in times.items()}


def _seconds(model: Callable[[Tensor], object], images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
