"""Correctness of whole models, before any speed: a backend against the definition.

A rounding difference can flip a decision that is nearly a tie, and then everything after it
differs. The outputs of routers and score predictors are therefore recorded in one run and
substituted in the other, so that both decide alike; their own outputs are compared too.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from models import VisionMamba
from utils.errors import UserError

CHECKED = 2  # images compared with the definition
STEP_BIAS = -2.0  # steps near 0.13: the slowest state remembers about 8 tokens


@torch.no_grad()
def set_telling_weights(model: VisionMamba) -> None:
    """Give a model random weights with which the scans' state influences the logits.

    In a new model the state is so small compared to the skip D u that a scan without recurrence
    gives almost the same logits. Here every matrix is N(0, 1 / fan-in), so that nothing grows or
    fades on the way, and what the layers add to the residual stays as large as their input. The
    speed does not depend on it.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    for layer in model.layers:
        layer.mixer.out_proj.weight.div_(math.sqrt(model.depth))
        for dt_proj in (layer.mixer.dt_proj, layer.mixer.dt_proj_b):
            nn.init.constant_(dt_proj.bias, STEP_BIAS)


def deciders(model: VisionMamba) -> dict[str, nn.Module]:
    """The modules whose outputs decide: score predictors and block routers, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith("block_head")
        or (name.startswith("score_predictors.") and name.count(".") == 1)
    }


@contextmanager
def _hooked(
    model: VisionMamba, hook: Callable[[str, nn.Module, tuple[Tensor], Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `hook` after every decider with its name; what it returns replaces the output."""
    handles = [
        module.register_forward_hook(partial(hook, name))
        for name, module in deciders(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def decisions_recorded(model: VisionMamba) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of the model's deciders in a forward pass."""
    outputs: dict[str, Tensor] = {}

    def record(name, module, inputs, output):
        outputs[name] = output.detach()

    with _hooked(model, record):
        yield outputs


@contextmanager
def decisions_replayed(
    model: VisionMamba, recorded: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Give the deciders' outputs the recorded values, with gradients of their own.

    Yields the deciders' own outputs.
    """
    outputs: dict[str, Tensor] = {}

    def replace(name, module, inputs, output):
        outputs[name] = output.detach()
        return recorded[name] + (output - output.detach()).to(recorded[name].dtype)

    with _hooked(model, replace):
        yield outputs


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run selective scans on a backend by name; None: on the fastest that fits."""
    before = os.environ.pop("DYVM_BACKEND", None)
    if name is not None:
        os.environ["DYVM_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("DYVM_BACKEND", None)
        if before is not None:
            os.environ["DYVM_BACKEND"] = before


def require_correct(wrong: Sequence[str], tolerance: float) -> None:
    """Raise UserError where a contender is wrong, by the names of those that are."""
    if wrong:
        raise UserError(f"no speed without correctness: {', '.join(wrong)} beyond {tolerance}")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest entry; infinite for NaN."""
    error = ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def logits_error(
    model: VisionMamba, images: Tensor, chosen: str | None, precision: AbstractContextManager
) -> float:
    """Worst `relative_error` of a backend's logits, routers and score predictors.

    The reference is the float32 definition. Routers count together: the two logits of one may
    nearly cancel, and are then as wrong as their inputs. The backend runs all `images` [B, 3, H,
    W]; the definition, which is slow, the first `CHECKED` of them, with the backend's decisions.
    """
    model.eval()
    with torch.no_grad():
        with backend(chosen), decisions_recorded(model) as decided, precision:
            logits = model(images).logits[:CHECKED]
        decided = {name: output[:CHECKED].float() for name, output in decided.items()}
        with backend("reference"), decisions_replayed(model, decided) as own:
            expected = model(images[:CHECKED]).logits
    errors = [relative_error(logits, expected)]
    for kind in ("block_head", "score_predictors"):
        names = [name for name in decided if kind in name]
        if names:
            errors.append(
                relative_error(
                    *(
                        torch.cat([outputs[name].flatten() for name in names])
                        for outputs in (decided, own)
                    )
                )
            )
    return max(errors)
