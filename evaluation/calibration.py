"""The gate threshold at which a model keeps the share of its scans that it was trained to keep.

In training a gate is drawn: it is open with probability p = sigmoid(logit), and the budget holds
for the mean of the draws. The paper then evaluates with p > 0.5, which keeps more (0.888 where 0.80
was trained). Here one threshold for all gates is chosen on training images, transformed as in
evaluation. It opens the gates with the highest probabilities and is stored in the checkpoint. Gates
change what later routers read, so the quantile is taken again until the share is met.

Source of the routers: "Dynamic Vision Mamba" (arXiv 2504.04787), section 3; the calibration is this
project's own.
"""

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from models import VisionMamba
from models.build import sigmoid
from tasks import Experiment
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


@torch.no_grad()
def router_logits(model: VisionMamba, experiment: Experiment) -> Tensor:
    """Logits of all gates on the calibration images of all ranks, flat, on rank 0; else empty."""
    distributed, recorded = experiment.distributed, []
    routers = [layer.mixer.block_head for layer in model.layers]
    handles = [
        router.register_forward_hook(
            lambda _module, _inputs, logits: recorded.append(logits.float().cpu())
        )
        for router in routers
    ]
    model.eval()
    try:
        loader = experiment.data.calibration_loader
        for batch in Progress(
            loader.batches(), "calibration", total=len(loader), shown=distributed.is_main
        ):
            with autocast(distributed.device, experiment.args.amp):
                experiment.task.predict(model, batch.images.to(distributed.device))
    finally:
        for handle in handles:
            handle.remove()
    own = torch.cat([logits.flatten() for logits in recorded]) if recorded else torch.empty(0)
    return torch.cat(distributed.gather_objects(own) or [torch.empty(0)])


def quantile_above(values: Tensor, share: float) -> float:
    """A number that a `share` of the values exceeds, half-way between its neighbours."""
    ordered = values.double().sort(descending=True).values
    count = min(max(round(share * len(ordered)), 1), len(ordered) - 1)
    return ordered[count - 1 : count + 1].mean().item()
