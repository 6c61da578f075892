"""How the scan is laid out on a GPU: a rule, and no measurement while a program runs.

Tuning by measurement would choose for whatever batch comes first, cost seconds in the middle of an
evaluation, and could not happen while a CUDA graph is captured. What must be chosen follows from
few numbers: a step takes ALONE cycles where nothing else runs on its scheduler, and BUSY cycles of
the whole processor where many do. Both are computed from the machine code
(benchmarks/gpu_static/), not measured; benchmarks/gpu_plan.py measures the choice on a GPU.

B images, L tokens, E inner channels, G directions (1 or 2).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch

STEPS = 4  # of a turn of the scan
CHANNELS = 32  # of a warp: one a thread
_PROCESSORS = 132  # of an H100: what the interpreter plans for

# Cycles of a processor (SM).
_ALONE, _BUSY = 470, 47  # a step of a warp, scan_forward
_ALONE_ENDS, _BUSY_ENDS = 530, 36  # the same of piece_ends
_ALONE_PIECES, _BUSY_PIECES = 600, 43  # the same of scan_pieces
_ENTER = 130  # what one piece takes in from another
_LAUNCH = 4400  # of one more kernel, in a CUDA graph: 2.2 us
_BYTES = 1500  # to and from memory, of all processors: 3 TB/s

_MOST_PIECES = 64


class Plan(NamedTuple):
    block: int  # channels of a program
    warps: int  # of a program
    pieces: int  # of time; 0: one program walks both directions from end to end
    width: int  # steps of a piece


def plan(device: torch.device, images: int, channels: int, tokens: int, directions: int) -> Plan:
    """For a batch of B images [L, E] that is scanned in G directions."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        processors, architecture = properties.multi_processor_count, properties.major * 10
        architecture += properties.minor
    else:
        processors, architecture = _PROCESSORS, 90
    # These take 16 and 24 programs on a processor: too few of one warp to fill it.
    warps = 2 if architecture in (86, 87, 89, 120, 121) else 1
    pieces = best_pieces(images, channels, tokens, directions, processors)
    width = tokens
    if pieces > 1:
        width = STEPS * math.ceil(tokens / (STEPS * pieces))
        pieces = math.ceil(tokens / width)
    return Plan(CHANNELS * warps, warps, pieces, width)


@lru_cache(maxsize=None)
def best_pieces(images: int, channels: int, tokens: int, directions: int, processors: int) -> int:
    """The number of pieces that the scan is fastest in, by `cycles`."""
    most = min(_MOST_PIECES, tokens // (2 * STEPS))
    choices = [0] + [2**power for power in range(max(most, 1).bit_length())]
    return min(
        choices, key=lambda pieces: cycles(pieces, images, channels, tokens, directions, processors)
    )


def cycles(
    pieces: int, images: int, channels: int, tokens: int, directions: int, processors: int
) -> float:
    """Of a layer's scans, computed."""
    warps = images * math.ceil(channels / CHANNELS)

    def steps(count: float, warps: int, alone: int, busy: int) -> float:
        return count * max(alone, busy * math.ceil(warps / processors))

    if pieces == 0:
        return steps(directions * tokens, warps, _ALONE, _BUSY)
    width, warps = tokens / pieces, warps * directions
    total = steps(width, warps * pieces, _ALONE_PIECES, _BUSY_PIECES) + _LAUNCH
    total += 2 * 4 * directions * images * tokens * channels / _BYTES  # float32 parts
    if pieces > 1:
        total += steps(width, warps * (pieces - 1), _ALONE_ENDS, _BUSY_ENDS) + _LAUNCH
        total += pieces * _ENTER
    return total
