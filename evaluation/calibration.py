"""Thresholds at which a model keeps, on average, what it should keep.

Of gates: the share of its scans that it was trained to keep.

In training a gate is drawn: it is open with probability p = sigmoid(logit), and the budget holds
for the mean of the draws. The paper then evaluates with p > 0.5, which keeps more (0.888 where 0.80
was trained). Here one threshold for all gates is chosen on training images, transformed as in
evaluation. It opens the gates with the highest probabilities and is stored in the checkpoint. Gates
change what later routers read, so the quantile is taken again until the share is met.

Of tokens (`--token-budget image`): so many that the mean image costs what it does with the fixed
numbers. A stage reads what the one before it has kept, so that they are chosen one after the other.
Images that keep more tokens may open more gates for them, and cost more than the mean numbers say;
all stages' numbers are then scaled until the cost is met.

Source of the routers: "Dynamic Vision Mamba" (arXiv 2504.04787), section 3; the calibration is this
project's own.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import Result, VisionMamba
from models.build import sigmoid
from models.flops import token_operations
from models.reduction.selection import log_odds
from tasks import Experiment
from utils.errors import UserError
from utils.logging import Progress
from utils.precision import autocast

PASSES = 8
CLOSE_ENOUGH = 0.002
GIVE_UP = 0.1  # further than this from the target, the paper's threshold is used
# The same of tokens, where the mean cost is what is to be met.
COST_PASSES = 4
CLOSE_IN_COST = 0.001

# A call's arguments and result -> numbers.
Observer = Callable[[tuple[Any, ...], Any], Tensor]

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
            "gate threshold of the %s: %.4f keeps %.2f %% of the scans on training data (target "
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
    observers = [(router, lambda _inputs, logits: logits.float()) for router in routers]
    return torch.cat(observed(observers, model, experiment))


@torch.no_grad()
def observed(
    observers: Sequence[tuple[nn.Module, Observer]], model: VisionMamba, experiment: Experiment
) -> list[Tensor]:
    """What each observer reads from the calls of its module, on the calibration images of all
    ranks: flat, on rank 0; else empty. Raises UserError where no image can be read.
    """
    distributed = experiment.distributed
    recorded: list[list[Tensor]] = [[] for _ in observers]
    model.eval()
    with ExitStack() as hooks:
        for (module, of), record in zip(observers, recorded, strict=True):
            hooks.callback(module.register_forward_hook(partial(_record, of, record)).remove)
        loader = experiment.data.calibration_loader
        for batch in Progress(
            loader.batches(), "calibration", total=len(loader), shown=distributed.is_main
        ):
            with autocast(distributed.device, experiment.args.amp):
                experiment.task.predict(model, batch.images.to(distributed.device))
    own = [torch.cat(record) if record else torch.empty(0) for record in recorded]
    if not distributed.all_reduce_sum([sum(map(len, own))]).item():
        raise UserError(
            "thresholds are chosen on training data, and none of that at --data-path can be read"
        )
    gathered = distributed.gather_objects(own) or [[torch.empty(0)] * len(own)]
    return [torch.cat(parts) for parts in zip(*gathered, strict=True)]


def _record(
    of: Observer, record: list[Tensor], _module: nn.Module, inputs: tuple[Any, ...], output: Any
) -> None:
    record.append(of(inputs, output).flatten().cpu())


def calibrate_tokens(
    models: Mapping[str, VisionMamba | None], experiment: Experiment
) -> dict[str, list[float]]:
    """Choose and set the thresholds at which the images of each model cost, on average, what they
    do where every one keeps what `token_keep` says; -> log-odds of the stages by name.

    Every rank must call it. models: "model", and "ema" or None.
    """
    return {
        name: _calibrate_stages(model, name, experiment)
        for name, model in models.items()
        if model is not None
    }


def _calibrate_stages(model: VisionMamba, name: str, experiment: Experiment) -> list[float]:
    distributed, fixed = experiment.distributed, model.kept_counts()
    thresholds = [-math.inf] * len(fixed)
    for stage, count in enumerate(fixed):
        seen = _Seen.of(model, thresholds, experiment)
        chosen = distributed.on_main(partial(seen.threshold, stage, count))
        thresholds = [*thresholds[:stage], chosen, *thresholds[stage + 1 :]]
    tried: list[tuple[float, float, list[float], list[float]]] = []
    step = slope = 0.0
    for _ in range(COST_PASSES):
        seen = _Seen.of(model, thresholds, experiment)
        share, expected, kept = distributed.on_main(partial(seen.cost, model))
        # What the last step did: a stage also passes on to the next ones what it keeps.
        found = (share - tried[-1][1]) / step if step else 0.0
        slope = found if found > 0 else expected
        tried.append((abs(share - 1), share, thresholds, kept))
        if abs(share - 1) <= CLOSE_IN_COST or not slope > 0:
            break
        step = (1 - share) / slope
        thresholds = distributed.on_main(partial(seen.scaled, 1 + step))
    missed, share, thresholds, kept = min(tried)
    model.set_token_thresholds(thresholds)
    _logger.info(
        "thresholds of the %s's tokens: probabilities %s keep %s of %d patches of training data "
        "(the fixed budget %s) at %.2f %% of its cost",
        name,
        ", ".join(f"{sigmoid(odds):.4f}" for odds in thresholds),
        ", ".join(f"{count:.2f}" for count in kept),
        model.num_patches,
        ", ".join(map(str, fixed)),
        100 * share,
    )
    if not missed <= 0.01:
        _logger.warning("no thresholds of the %s's tokens that come closer were found", name)
    return thresholds


class _Seen(NamedTuple):
    """What the calibration images of all ranks did at some thresholds; known on rank 0."""

    thresholds: Sequence[float]
    odds: list[Tensor]  # of the patches that entered each stage, flat
    counts: Tensor  # [B, stages] patches kept
    gates: Tensor  # [B, depth, 2]

    @classmethod
    def of(cls, model: VisionMamba, thresholds: Sequence[float], experiment: Experiment) -> "_Seen":
        """With these thresholds, which are set."""

        def odds(inputs: tuple[Any, ...], scores: Tensor) -> Tensor:
            _, policy = inputs
            return log_odds(scores)[policy > 0.5]

        def choices(_inputs: tuple[Any, ...], result: Result) -> Tensor:
            counts = torch.stack(result.counts, dim=1)
            return torch.cat([counts, result.gates.transpose(0, 1).flatten(1)], dim=1)

        model.set_token_thresholds(thresholds)
        observers = [*((predictor, odds) for predictor in model.score_predictors), (model, choices)]
        *found, rows = observed(observers, model, experiment)
        rows = rows.view(-1, len(thresholds) + 2 * model.depth).double()
        counts, gates = rows.split([len(thresholds), 2 * model.depth], dim=1)
        return cls(thresholds, found, counts, gates.unflatten(1, (model.depth, 2)))

    def threshold(self, stage: int, count: float) -> float:
        """At which so many patches of an image, of those that entered the stage, exceed it.

        Raises UserError for scores that are no numbers.
        """
        odds = self.odds[stage]
        if odds.isnan().any():
            raise UserError(
                f"stage {stage + 1} scores patches of training data with NaN: no threshold can "
                "be chosen; evaluate another checkpoint of this run"
            )
        return nearest_threshold(odds, count * len(self.counts) / len(odds))

    def scaled(self, factor: float) -> list[float]:
        """Thresholds that so many times as many of the patches that entered each stage exceed."""
        return [
            self.threshold(stage, factor * (odds > threshold).sum().item() / len(self.counts))
            for stage, (odds, threshold) in enumerate(zip(self.odds, self.thresholds, strict=True))
        ]

    def cost(self, model: VisionMamba) -> tuple[float, float, list[float]]:
        """The share of the cost with the fixed numbers of patches at the same gates; by how much it
        grows where all numbers grow, relative to their growth; the mean numbers.
        """
        gates = self.gates.transpose(0, 1)
        numbers = self.counts.unbind(1), (), (1.01 * self.counts).unbind(1)
        own, fixed, with_more = (
            token_operations(model, gates, counts).mean().item() for counts in numbers
        )
        return own / fixed, (with_more - own) / fixed / 0.01, self.counts.mean(dim=0).tolist()


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
