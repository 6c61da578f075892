"""Thresholds at which a model keeps, on average, what it should keep.

Of gates: the share of its scans that it was trained to keep.

In training a gate is drawn: it is open with probability p = sigmoid(logit), and the budget holds
for the mean of the draws. The paper then evaluates with p > 0.5, which keeps more (0.888 where 0.80
was trained). Here one threshold for all gates is chosen on training images, transformed as in
evaluation. It opens the gates with the highest probabilities and is stored in the checkpoint. Gates
change what later routers read, so the quantile is taken again until the share is met.

Of tokens (`--token-budget image`): in the mean of all images as many as the budget of every one. A
stage reads what the one before it has kept, so that they are chosen one after the other.

Source of the routers: "Dynamic Vision Mamba" (arXiv 2504.04787), section 3; the calibration is this
project's own.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from models import VisionMamba
from models.build import sigmoid
from models.reduction.selection import log_odds
from tasks import Experiment
from utils.errors import UserError
from utils.logging import Progress
from utils.precision import autocast

PASSES = 8
CLOSE_ENOUGH = 0.002
GIVE_UP = 0.1  # further than this from the target, the paper's threshold is used

_logger = logging.getLogger(__name__)


def calibrate(models: Mapping[str, VisionMamba | None], experiment: Experiment) -> dict[str, float]:
    """Choose and set the threshold of each model that routes; -> logits by name, to be stored.

    Every rank must call it. models: "model", and "ema" or None.
    """
    thresholds: dict[str, float] = {}
    for name, model in models.items():
        if model is None or not model.route_blocks:
            continue
        if experiment.data.calibration_loader is None:
            _logger.warning(
                "the gate threshold is not calibrated: %s is read as a stream",
                experiment.args.data_set,
            )
            return {}
        target = experiment.args.block_keep_ratio
        thresholds[name], kept = calibrate_model(model, target, experiment)
        _logger.info(
            "gate threshold of the %s: %.4f keeps %.2f %% of the scans of training images (target "
            "%.2f %%)",
            name,
            sigmoid(thresholds[name]),
            100 * kept,
            100 * target,
        )
        if not abs(kept - target) <= 0.01:
            _logger.warning(
                "no threshold comes closer: the routers hardly tell images and layers apart"
            )
    return thresholds


def calibrate_model(
    model: VisionMamba, target: float, experiment: Experiment
) -> tuple[float, float]:
    """Set the threshold that keeps a share of scans nearest to `target`; -> its logit, share."""
    distributed, threshold = experiment.distributed, 0.0
    low, high, tried = -math.inf, math.inf, {}
    for _ in range(PASSES):
        model.set_gate_threshold(threshold)
        logits = router_logits(model, experiment)
        kept = (logits > threshold).double().mean().item() if distributed.is_main else 0.0
        following = quantile_above(logits, target) if distributed.is_main else 0.0
        kept, following = distributed.all_reduce_sum([kept, following]).tolist()
        tried[threshold] = kept
        if abs(kept - target) <= CLOSE_ENOUGH:
            break
        low, high = (max(low, threshold), high) if kept > target else (low, min(high, threshold))
        # A quantile outside of these bounds would repeat earlier thresholds.
        threshold = following if low < following < high else (low + high) / 2
        if not math.isfinite(threshold) or threshold in tried:
            break
    threshold = min(tried, key=lambda value: abs(tried[value] - target))
    if not abs(tried[threshold] - target) <= GIVE_UP:  # NaN too
        threshold = 0.0
    model.set_gate_threshold(threshold)
    return threshold, tried[threshold]


def router_logits(model: VisionMamba, experiment: Experiment) -> Tensor:
    """Logits of all gates on the calibration images of all ranks, flat, on rank 0; else empty."""
    routers = [layer.mixer.block_head for layer in model.layers]
    return observed_at(routers, lambda _inputs, logits: logits.float(), model, experiment)


@torch.no_grad()
def observed_at(
    modules: Sequence[nn.Module],
    of: Callable[[tuple[Any, ...], Tensor], Tensor],
    model: VisionMamba,
    experiment: Experiment,
) -> Tensor:
    """What `of` reads from each call of the modules, on the calibration images of all ranks: flat,
    on rank 0; else empty. Raises UserError where no image can be read.

    of: a call's arguments and result -> numbers.
    """
    distributed, recorded = experiment.distributed, []

    def record(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        recorded.append(of(inputs, output).flatten().cpu())

    model.eval()
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(record).remove)
        loader = experiment.data.calibration_loader
        for batch in Progress(
            loader.batches(), "calibration", total=len(loader), shown=distributed.is_main
        ):
            with autocast(distributed.device, experiment.args.amp):
                experiment.task.predict(model, batch.images.to(distributed.device))
    own = torch.cat(recorded) if recorded else torch.empty(0)
    if not distributed.all_reduce_sum([len(own)]).item():
        raise UserError(
            "thresholds are chosen on training images, and none of those at --data-path can be read"
        )
    return torch.cat(distributed.gather_objects(own) or [torch.empty(0)])


def calibrate_tokens(
    models: Mapping[str, VisionMamba | None], experiment: Experiment
) -> dict[str, list[float]]:
    """Choose and set the thresholds at which the images of each model keep as many tokens after
    each stage, on average, as `token_keep` says of every one; -> log-odds of the stages by name.

    Every rank must call it. models: "model", and "ema" or None.
    """
    return {
        name: _calibrate_stages(model, name, experiment)
        for name, model in models.items()
        if model is not None
    }


def _calibrate_stages(model: VisionMamba, name: str, experiment: Experiment) -> list[float]:
    distributed, found = experiment.distributed, []
    entering = float(model.num_patches)

    def alive_odds(inputs: tuple[Any, ...], scores: Tensor) -> Tensor:
        _, policy = inputs
        return log_odds(scores)[policy > 0.5]

    stages = zip(model.score_predictors, model.kept_counts(), strict=True)
    for stage, (predictor, leaving) in enumerate(stages):
        everything = [-math.inf] * (len(model.pruning_layers) - stage)
        model.set_token_thresholds([*found, *everything])
        odds = observed_at([predictor], alive_odds, model, experiment)
        threshold = kept = 0.0
        if distributed.is_main:
            threshold = nearest_threshold(odds, leaving / entering)
            kept = (odds > threshold).double().mean().item() * entering
        threshold, kept = distributed.all_reduce_sum([threshold, kept]).tolist()
        found.append(threshold)
        _logger.info(
            "stage %d of the %s: probability %.4f keeps %.2f of %d patches of training images "
            "(target %d)",
            stage + 1,
            name,
            sigmoid(threshold),
            kept,
            model.num_patches,
            leaving,
        )
        if not abs(kept - leaving) <= 0.01 * leaving:
            _logger.warning("no threshold comes closer: many patches have equal scores")
        entering = kept
    model.set_token_thresholds(found)
    return found


def nearest_threshold(values: Tensor, share: float) -> float:
    """A number that is exceeded by as nearly a `share` of the values as can be, by some at least;
    equal ones go together.
    """
    levels, counts = values.double().unique(return_counts=True)  # ascending
    above = counts.flip(0).cumsum(0).flip(0)  # so many are as high as each level
    chosen = int((above - share * len(values)).abs().argmin())
    return (levels[chosen - 1] if chosen else levels[0] - 1).item()


def quantile_above(values: Tensor, share: float) -> float:
    """A number that a `share` of the values exceeds, half-way between its neighbours."""
    ordered = values.double().sort(descending=True).values
    count = min(max(round(share * len(ordered)), 1), len(ordered) - 1)
    return ordered[count - 1 : count + 1].mean().item()
