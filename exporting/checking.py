"""Whether an exported model answers as the checkpoint's does.

B images, C classes.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models import VisionMamba
from utils.errors import UserError

from .program import example_images

_logger = logging.getLogger(__name__)

CANDIDATES, CHECKED = 12, 4  # images of noise; the comparison takes steady ones of them
NUDGES, NUDGE = 6, 1e-6  # changes of all weights, relative; a steady image answers the same
STEADY = 1e-3  # change of a logit, relative to the largest one
LARGEST_ERROR = 1e-4  # the same, between exported and own model


class Agreement(NamedTuple):
    """On some images: the largest difference of a logit, relative to the largest one; and the share
    of answers (images, or their pixels) of the same top-1.
    """

    images: int
    error: float
    same: float
    steady: bool = True  # whether the answers do not depend on rounding

    def __str__(self) -> str:
        if not self.images:
            return "NOT COMPARED: all its answers to noise depend on rounding (is it trained?)"
        depending = "" if self.steady else ", all of whose answers depend on rounding"
        return (
            f"logits differ by {self.error:.1e} of the largest, {100 * self.same:.4g} % of the "
            f"top-1 are the same ({self.images} inputs of noise{depending})"
        )


def relative(one: Tensor, other: Tensor) -> Tensor:
    """Of each image's logits the largest difference [B], relative to the largest of all."""
    return (one - other).flatten(1).abs().amax(1) / other.abs().max()


def _nudged(model: VisionMamba) -> Iterator[VisionMamba]:
    """Copies whose weights differ in what other libraries may round otherwise."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUDGES):
        nudged = copy.deepcopy(model)
        for weight in nudged.parameters():
            weight.mul_(1 + NUDGE * torch.randn(weight.shape, generator=generator))
        yield nudged


@torch.no_grad()
def compare(
    model: VisionMamba,
    answer: Callable[[Tensor], Tensor],
    images: Tensor | None = None,
    always: bool = False,
) -> Agreement:
    """A model and a function images -> logits on noise, one image and then several at once.

    Only on images whose answers do not depend on rounding: two scores that are nearly equal decide
    about a token one way here and the other way there, and neither is wrong.

    Of no image at all if all of them do; `always`: then of the first ones. Raises UserError for
    answers of another shape, or that are not finite.
    """
    images = example_images(model, CANDIDATES) if images is None else images
    expected = model(images).logits
    if not expected.isfinite().all():
        raise UserError(
            "the checkpoint's answers to noise are not finite (NaN); look at its weights"
        )
    steady = torch.ones(len(images), dtype=torch.bool)
    for nudged in _nudged(model):
        steady &= relative(nudged(images).logits, expected) < STEADY
    found = bool(steady.any())
    if found:
        images, expected = images[steady], expected[steady]
    elif not always:
        return Agreement(0, math.nan, math.nan)
    images, expected = images[:CHECKED], expected[:CHECKED]
    rest = [answer(images[1:])] if len(images) > 1 else []
    actual = torch.cat([answer(images[:1]), *rest])
    if actual.shape != expected.shape:
        raise UserError(
            f"the exported model answers {list(actual.shape)} where the checkpoint answers "
            f"{list(expected.shape)}"
        )
    if not actual.isfinite().all():
        raise UserError("the exported model's answers are not finite (NaN); nothing was written")
    error = relative(actual, expected).max()
    same = (actual.argmax(1) == expected.argmax(1)).double().mean()
    return Agreement(len(images), error.item(), same.item(), found)


def require_agreement(found: Agreement) -> None:
    """Raise UserError unless all logits that were compared agree; warn if none were."""
    if not found.images:
        _logger.warning("the exported model was %s", found)
    if found.images and not found.error <= LARGEST_ERROR:
        raise UserError(f"the exported model is not the checkpoint's: {found}; nothing was written")
