"""CUDA graphs for evaluation: the whole forward pass of a batch, recorded once and replayed.

At small batches a GPU waits for the host that launches its kernels; a graph launches them all at
once. The models' forward passes never wait for the device and their shapes depend on the flags
alone, so that a graph holds all of one.
"""

import dataclasses
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from utils.errors import first_line

from .kept import Reads, recorded_reads

_logger = logging.getLogger(__name__)

Forward = Callable[[Tensor], Any]  # gives a tensor or a dataclass of tensors


class Replay:
    """A recorded forward pass. Each call overwrites the tensors that the one before returned."""

    def __init__(self, graph: torch.cuda.CUDAGraph, given: Tensor, result: Any, reads: Reads):
        self._graph, self._given, self._result, self._reads = graph, given, result, reads

    def __call__(self, images: Tensor) -> Any:
        self._given.copy_(images, non_blocking=True)
        self._graph.replay()
        result = self._result
        return dataclasses.replace(result) if dataclasses.is_dataclass(result) else result

    def is_current(self) -> bool:
        """Whether the weights are those that it was recorded with, as far as something was made of
        them at evaluation (ops/kept.py); all others are read where they stand.
        """
        return self._reads.are_current()


def capture(forward: Forward, images: Tensor) -> Replay:
    """Record `forward` on the shape of `images` [B, 3, H, W].

    `forward` must have run on this shape before, since kernels cannot be compiled while a graph is
    recorded, and must enter autocast itself: weights that an outer context has cast are no part of
    the graph.
    """
    given = images.clone()
    graph = torch.cuda.CUDAGraph()
    with ExitStack() as around:
        reads = around.enter_context(recorded_reads())
        around.enter_context(torch.cuda.device(images.device))
        # A capture that fails leaves its own stream behind as the current one; this puts it back.
        around.enter_context(torch.cuda.stream(torch.cuda.current_stream()))
        around.enter_context(
            # thread_local: the data loader's thread that pins memory calls CUDA too.
            torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local")
        )
        result = forward(given)
    return Replay(graph, given, result, reads)


class GraphedForward:
    """A forward pass that is captured the second time it sees a shape of batch.

    The first time runs as ever, and compiles what is not compiled yet; a last batch that comes once
    is not worth more. So does the first time after a change of weights. When capture fails, one
    line says so and every batch runs without a graph.
    """

    def __init__(self, forward: Forward):
        self.forward = forward
        self.enabled = True
        self._seen: set[torch.Size] = set()
        self._replays: dict[torch.Size, Replay] = {}

    def __call__(self, images: Tensor) -> Any:
        """images [B, 3, H, W] -> Result, valid until the next call."""
        shape = images.shape
        replay = self._replays.get(shape)
        if replay is not None and not replay.is_current():
            del self._replays[shape], replay  # with the memory of its graph
            return self.forward(images)
        if self.enabled and shape in self._seen and replay is None:
            try:
                replay = self._replays[shape] = capture(self.forward, images)
            except Exception as error:  # a fault of the forward pass itself is raised again below
                self.enabled = False
                _logger.warning(
                    "evaluation goes on without a CUDA graph, capturing one failed: %s",
                    first_line(error.__context__ or error),  # the end of a capture hides the cause
                )
        self._seen.add(shape)
        return (replay or self.forward)(images)


def graphed(forward: Forward, device: torch.device, wanted: bool = True) -> Forward:
    """`forward` with a graph per shape where that is `wanted` (`--cuda-graph`) and the device is a
    GPU.
    """
    return GraphedForward(forward) if wanted and device.type == "cuda" else forward
