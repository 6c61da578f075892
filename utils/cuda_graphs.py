"""CUDA graphs for evaluation: the whole forward pass of a batch, recorded once and replayed.

At small batches a GPU waits for the host that launches its kernels; a graph launches them all at
once. The models' forward passes never wait for the device and their shapes depend on the flags
alone, so that a graph holds all of one.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import first_line

_logger = logging.getLogger(__name__)

Forward = Callable[[Tensor], Any]  # gives a tensor or a dataclass of tensors


def capture(forward: Forward, images: Tensor) -> Forward:
    """Record `forward` on the shape of `images` [B, 3, H, W] and return its replay.

    A replay overwrites the tensors that it returned before. The graph reads the weights, and what
    was made of them at evaluation (ops/kept.py), where they stand: they must not change. `forward`
    must have run on this shape before, since kernels cannot be compiled while a graph is recorded,
    and must enter autocast itself: weights that an outer context has cast are no part of the graph.
    """
    given = images.clone()
    graph = torch.cuda.CUDAGraph()
    # thread_local: the data loader's thread that pins memory calls CUDA too.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = forward(given)

    def replay(images: Tensor) -> Any:
        given.copy_(images, non_blocking=True)
        graph.replay()
        return dataclasses.replace(result) if dataclasses.is_dataclass(result) else result

    return replay


class GraphedForward:
    """A forward pass that is captured the second time it sees a shape of batch.

    The first time runs as ever, and compiles what is not compiled yet; a last batch that comes once
    is not worth more. When capture fails, one line says so and every batch runs without a graph.
    """

    def __init__(self, forward: Forward):
        self.forward = forward
        self.enabled = True
        self._seen: set[torch.Size] = set()
        self._replays: dict[torch.Size, Forward] = {}

    def __call__(self, images: Tensor) -> Any:
        """images [B, 3, H, W] -> Result, valid until the next call."""
        shape = images.shape
        if self.enabled and shape in self._seen and shape not in self._replays:
            try:
                self._replays[shape] = capture(self.forward, images)
            except Exception as error:  # a fault of the forward pass itself is raised again below
                self.enabled = False
                _logger.warning(
                    "evaluation goes on without a CUDA graph, capturing one failed: %s",
                    first_line(error),
                )
        self._seen.add(shape)
        return self._replays.get(shape, self.forward)(images)


def graphed(forward: Forward, device: torch.device, wanted: bool = True) -> Forward:
    """`forward` with a graph per shape where that is `wanted` (`--cuda-graph`) and the device is a
    GPU.
    """
    return GraphedForward(forward) if wanted and device.type == "cuda" else forward
