"""What a training changes besides the learning rate: how much each stage keeps, and the noise.

In the paper both are fixed; changing them is this project's own. S stages, M patches.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models import VisionMamba
from models.flops import count_flops
from utils.errors import UsageError

BEGIN, END = 0.1, 0.6  # of a training: before, selectors know nothing; after, weights settle
MOST_TRIALS = 200
FARTHEST = 2.0  # that the logarithm of a stage's ratio can go in all
DELTA = 0.15  # of that logarithm, up and down, in a trial
LARGEST_DELTA = 4.0
LARGEST_FACTOR = 1e3


def noise_factor(progress: float, final: float) -> float:
    """Factor of the noise in decisions and gates; falls linearly from 1 to `final`.

    progress: of the training, from 0 to 1.
    """
    return 1 + (final - 1) * progress


def fraction_of(count: int, patches: int) -> float:
    """The least fraction of at most six decimals of which so many patches are kept."""
    millionths = math.ceil(count / patches * 1e6)
    while int(millionths / 1e6 * patches) < count:  # 0.29 of 100 are 28.999999999999996
        millionths += 1
    return millionths / 1e6


def check_stages(model: VisionMamba) -> None:
    """Raise UsageError for a model whose stages have nothing to share out."""
    stages = len(model.pruning_layers)
    if stages < 2:
        raise UsageError(
            "--keep-schedule learned shares operations out among stages, of which there is "
            f"{stages}; give --pruning-layers at least two layers"
        )


class KeepSchedule:
    """Learns how much each stage keeps of its tokens, at fixed operations.

    Stage s keeps exp(u_s) of the tokens that enter it, u_s <= 0. A trial measures on one batch, as
    at evaluation, how the loss and the operations change when u_s is a little larger and smaller.
    Adam descends along the loss's gradient without its part along that of the operations; a common
    factor of all u_s then makes the operations what they were, or less by a token.

    That schedules can be learned is DiffRate's idea (arXiv 2305.17997). Differences need no masks:
    all reductions that read keep ratios can be tried, however they are trained.

    Args:
        model: with the schedule to start from.
        steps: of the whole training, counted in changes of the weights.

    Raises:
        UsageError: fewer than two stages, or too few steps.
    """

    def __init__(self, model: VisionMamba, steps: int):
        check_stages(model)
        self.model, self.budget = model, count_flops(model).exact
        self.first, last = round(BEGIN * steps), round(END * steps)
        self.interval = max(2, -(-(last - self.first) // MOST_TRIALS))
        self.trials, self.done = (last - self.first) // self.interval, 0
        if not self.trials:
            raise UsageError(f"--keep-schedule learned: {steps} steps are too few to try it")
        keep = torch.tensor([1.0, *model.token_keep], dtype=torch.float64)
        self.logs = nn.Parameter((keep[1:] / keep[:-1]).log())  # u [S]
        self.optimizer = torch.optim.Adam([self.logs], betas=(0.9, 0.95))

    def is_due(self, step: int) -> bool:
        """Whether there is a trial before this step of the training."""
        since = step - self.first
        in_time = 0 <= since < self.trials * self.interval
        return in_time and since % self.interval == 0 and not self.is_done

    @property
    def is_done(self) -> bool:
        return self.done >= self.trials

    @torch.no_grad()
    def learn(self, loss: Callable[[], Tensor]) -> list[float]:
        """One trial and one step; -> the fractions of the M patches that the stages keep now.

        loss: a scalar of the model on a batch, as at evaluation; equal on all ranks.
        """
        by_loss, by_cost = torch.zeros(2, len(self.logs), dtype=torch.float64)
        for stage in range(len(self.logs)):
            both, costs, losses = self._around(stage), [], []
            for logs in both:
                costs.append(self._operations(logs))
                losses.append(loss().double().cpu())
            span = (both[0] - both[1])[stage]
            by_loss[stage] = (losses[0] - losses[1]) / span
            by_cost[stage] = (costs[0] - costs[1]) / span
        by_loss -= (by_loss @ by_cost) / (by_cost @ by_cost) * by_cost
        if by_loss.isfinite().all():
            left = 1 - self.done / self.trials
            self.optimizer.param_groups[0]["lr"] = 2 * FARTHEST / self.trials * left
            self.logs.grad = by_loss
            self.optimizer.step()
            self.logs.clamp_(max=0)
            self._meet_budget()
        self.done += 1
        return self._set(self.logs)

    def state_dict(self) -> dict[str, Any]:
        optimizer = self.optimizer.state_dict()
        return {"logs": self.logs.detach().clone(), "done": self.done, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.logs.data.copy_(state["logs"])
        self.done = state["done"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _set(self, logs: Tensor) -> list[float]:
        """Let the model keep what the logarithms say, at least one token; -> fractions of M."""
        patches = self.model.num_patches
        counts = (logs.cumsum(0).exp() * patches + 1e-6).long().clamp_min(1).tolist()
        keep = [fraction_of(count, patches) for count in counts]
        self.model.set_token_keep(keep)
        return keep

    def _operations(self, logs: Tensor) -> float:
        """`exact` operations of an image, with the model set to keep what the logarithms say."""
        self._set(logs)
        return count_flops(self.model).exact

    def _around(self, stage: int) -> tuple[Tensor, Tensor]:
        """The logarithms with that of one stage larger, and smaller, by a token at least."""
        delta = DELTA
        while True:
            step = torch.zeros_like(self.logs)
            step[stage] = delta
            more, less = (self.logs + step).clamp(max=0), self.logs - step
            if delta > LARGEST_DELTA or self._operations(more) > self._operations(less):
                return more, less
            delta *= 1.5

    def _meet_budget(self) -> None:
        """Multiply all logarithms by the least factor that keeps the budget."""
        low, high = 0.0, 1.0
        while self._operations(self.logs * high) > self.budget and high < LARGEST_FACTOR:
            low, high = high, 2 * high
        for _ in range(24):
            middle = (low + high) / 2
            if self._operations(self.logs * middle) > self.budget:
                low = middle
            else:
                high = middle
        self.logs.mul_(high)
