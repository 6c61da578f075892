"""Image files of more than 8 bits a channel: which of their values is white.

A file does not tell: 16 bits may hold 12 of an X-ray, reflectances up to 10,000, or 8 that a
program has saved so; fractions may end at 1. A stretch of each image by its own values would change
the images against each other. So one depth holds for a whole data set: it is given, or determined
once from the values of a sample of its files (`settle_depth`), and recorded with the weights.

N pixels.
"""

import argparse
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np

from utils.errors import UserError

AUTO = "auto"
UNIT = "unit"  # fractions from 0 to 1
Depth = int | str  # bits that are used, `UNIT`, or `AUTO`: undetermined, as no such file was seen
SAMPLE = 128  # files that are looked at
MOST = 0.999  # share of the pixels that a depth must show
_DARK = 8  # the largest value below white / 8 leaves 5 of 8 bits

_logger = logging.getLogger(__name__)


def bit_depth(text: str) -> Depth:
    """Parse `auto`, `unit` or a number of bits from 1 to 32."""
    if text in (AUTO, UNIT):
        return text
    if not text.isdecimal() or not 1 <= int(text) <= 32:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither `auto`, nor `unit`, nor a number of bits from 1 to 32"
        )
    return int(text)


def white(depth: Depth) -> float:
    """The value that is white, and so are all above."""
    return 1.0 if depth == UNIT else float(2**depth - 1)


class UnknownDepth(Exception):
    """Pixels whose range is not defined; the reason."""


def to_8_bits(values: np.ndarray, depth: Depth | None) -> np.ndarray:
    """Pixels of any type -> uint8, in the same shape.

    depth: None for a single file, of which 16-bit integers keep their upper 8 bits.

    Raises UnknownDepth where that is not defined.
    """
    fractions = values.dtype.kind == "f"
    if fractions and not np.isfinite(values).all():
        raise UnknownDepth("pixels that are not finite")
    if values.min() < 0:
        raise UnknownDepth("negative pixels, whose range is not defined; let them begin at 0")
    largest = values.max()
    if depth in (None, AUTO):
        kind = "floating-point" if fractions else "32-bit"
        if fractions or largest > 0xFFFF:
            raise UnknownDepth(f"{kind} pixels, whose range is not defined; give --bit-depth")
        if depth == AUTO and 0 < largest <= 0x7FFF:
            raise UnknownDepth(
                f"16-bit pixels up to {largest} only, and no file with 16 bits was among those "
                f"looked at; give --bit-depth {max(8, int(largest).bit_length())}, or 16"
            )
        depth = 16
    if depth == UNIT or fractions or depth < 8:
        scaled = values.astype(np.float64) * (255 / white(depth))
        return np.minimum(np.rint(scaled), 255).astype(np.uint8)
    return np.minimum(values >> (depth - 8), 255).astype(np.uint8)


class Range(NamedTuple):
    """What the values of a file tell: the largest one, and the one that most pixels do not pass.

    drawn: whether its drawing is in its alpha channel alone; `largest` is 0 for 8 bits.
    """

    fractions: bool
    largest: float
    most: float
    drawn: bool = False


def range_of(values: np.ndarray) -> Range | None:
    """Of the pixels [N, ...] of a file; None if they are not finite, or negative."""
    fractions = values.dtype.kind == "f"
    if (fractions and not np.isfinite(values).all()) or values.min() < 0:
        return None  # refused when it is loaded
    flat = values.ravel()
    place = min(len(flat) - 1, int(MOST * len(flat)))
    return Range(fractions, float(flat.max()), float(np.partition(flat, place)[place]))


class Stored(Protocol):
    """The part of an ImageSet that is looked at."""

    def set_depth(self, depth: Depth | None) -> None: ...

    def deep_candidates(self) -> np.ndarray: ...

    def range(self, index: int) -> Range | None: ...


def settle_depth(sets: Sequence[Stored], given: Depth, unusable: type[Exception]) -> Depth:
    """Determine one depth for image sets, set it, and log how once.

    Args:
        given: `AUTO`, or a depth to keep; then what speaks against it is logged.
        unusable: what a set raises for a file that cannot be read, and that is passed over here.

    Returns:
        The depth; `AUTO` if it was given and the files looked at have 8 bits.

    Raises:
        UserError: fractions beside integers, which no one depth fits.
    """
    looked, found = 0, []
    for images in sets:
        candidates = images.deep_candidates()
        count = min(SAMPLE, len(candidates))
        for place in range(count):
            index = int(candidates[(2 * place + 1) * len(candidates) // (2 * count)])
            with suppress(unusable):
                entry = images.range(index)
                looked += 1
                if entry is not None:
                    found.append(entry)
    drawn = sum(entry.drawn for entry in found)
    if drawn:
        _logger.info(
            "%d of %d images looked at are drawn in their alpha channel alone: they are shown on "
            "white, light ones on black",
            drawn,
            looked,
        )
    deep = [entry for entry in found if entry.largest > 0]
    depth = given
    if deep:
        depth = _determined(deep, looked) if given == AUTO else given
        if given != AUTO:
            _doubt(deep, given)
    for images in sets:
        images.set_depth(depth)
    return depth


def _determined(deep: Sequence[Range], looked: int) -> Depth:
    largest = max(entry.largest for entry in deep)
    small = [entry.fractions and entry.largest <= 1 for entry in deep]
    if any(small) and largest > 1 and not all(entry.fractions for entry in deep):
        raise UserError(
            "of the images looked at, some hold fractions up to 1 and others integers up to "
            f"{largest:.0f}, which no one --bit-depth fits; convert them alike"
        )
    depth = UNIT if all(entry.fractions for entry in deep) and largest <= 1 else _bits(largest)
    most = max(entry.most for entry in deep)
    hint = ""
    if depth != UNIT and _bits(most) < depth - 1:
        hint = (
            f"; {MOST:.1%} of the pixels of each are below {most:.0f}: --bit-depth {_bits(most)} "
            "would show these brighter and the others white"
        )
    log = _logger.info if depth == 16 and not hint else _logger.warning
    log(
        "%d of %d images looked at have more than 8 bits a channel, with values up to %g: "
        "--bit-depth %s is taken, so that %g and all above is white%s",
        len(deep),
        looked,
        largest,
        depth,
        white(depth),
        hint,
    )
    return depth


def _bits(largest: float) -> int:
    return max(8, math.ceil(math.log2(math.floor(largest) + 1)))


def _doubt(deep: Sequence[Range], depth: Depth) -> None:
    """Warn of a depth at which the images looked at are black or white."""
    largest, most = (max(getattr(entry, name) for entry in deep) for name in ("largest", "most"))
    if largest * _DARK <= white(depth):
        what, value = "nearly black", f"the largest value is {largest:g}"
    elif min(entry.most for entry in deep) > white(depth):
        what, value = "partly white", f"values reach {most:g}"
    else:
        return
    _logger.warning(
        "at --bit-depth %s, given or recorded with the weights, images of more than 8 bits are %s: "
        "%s, and %g is white",
        depth,
        what,
        value,
        white(depth),
    )
