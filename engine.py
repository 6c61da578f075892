"""One epoch of training, one pass of evaluation.

Every random number of a step follows from (seed, epoch, step, rank): a run that is interrupted
anywhere goes on with the numbers that it would have drawn.

B images, S stages. Source of the method: "Dynamic Vision Mamba" (arXiv 2504.04787).
"""

import argparse
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from datasets import Data
from graphs import graphed
from loading.loaders import Batch
from loading.transforms import derive_seed
from losses import batch_statistics, mean_over_ranks
from models import Result, VisionMamba
from utils.distributed import Distributed
from utils.errors import UserError
from utils.logging import Averages, Progress
from utils.nonfinite import NonFiniteSteps

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def seed_everything(*numbers: int) -> None:
    """Seed Python's, numpy's and torch's generators, the GPU's too, from several numbers."""
    seed = derive_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def autocast(device: torch.device, amp: str):
    """The context of a forward pass under `--amp`."""
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp]) if amp != "off" else nullcontext()


def evaluation_forward(
    model: Callable[[Tensor], Result], device: torch.device, amp: str
) -> Callable[[Tensor], Result]:
    """A model's forward pass under `--amp`; each call enters autocast anew, so that a CUDA graph
    can hold it.
    """

    def forward(images: Tensor) -> Result:
        with autocast(device, amp):
            return model(images)

    return forward


@dataclass
class Training:
    """Everything that a run changes as it goes, and what it needs to go on."""

    model: VisionMamba
    parallel: nn.Module  # the model, wrapped for several processes
    teacher: VisionMamba | None
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    guard: NonFiniteSteps
    epoch: int = 0
    step: int = (
        0  # the next step of this epoch; after the last one, the epoch awaits its evaluation
    )
    best: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped_in_a_row": self.guard.in_a_row,
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.guard.in_a_row = state["skipped_in_a_row"]
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]


def train_one_epoch(
    run: Training,
    data: Data,
    args: argparse.Namespace,
    distributed: Distributed,
    averages: Averages,
    after_step: Callable[[], bool] = lambda: False,
) -> bool:
    """Train from `run.step` to the last step of epoch `run.epoch`; -> whether it came to the end.

    A step is one batch of the loader; the weights change every `--accum-steps` of them. A rest is
    left out.

    averages: gets the means of the loss terms and rates; those of the steps done before, when
        resumed.
    after_step: called when the weights have changed; True stops here.
    """
    run.parallel.train()
    steps = data.steps_per_epoch // args.accum_steps * args.accum_steps
    if not args.sched_on_updates:
        run.scheduler.step(run.epoch)
    bar = Progress(
        data.train_batches(run.epoch, run.step),
        f"epoch {run.epoch + 1}/{args.epochs}",
        total=steps,
        initial=run.step,
        status=lambda: _one_line(averages.means()),
        shown=distributed.is_main,
    )
    parts: list[Batch] = []
    for batch in bar:
        parts.append(batch)
        if len(parts) < args.accum_steps:
            continue
        if args.sched_on_updates:
            run.scheduler.step_update((run.epoch * steps + run.step) // args.accum_steps)
        measured = accumulate_gradients(run, parts, args, distributed)
        norm = gradient_norm(run, args.clip_grad)
        skipped = run.guard.step(
            norm, measured["loss"], torch.cat([part.indices for part in parts])
        )
        if run.ema is not None:
            run.ema.update(run.model)
        lr = run.optimizer.param_groups[0]["lr"]
        averages.update(
            sum(len(part.images) for part in parts), **measured, skipped_steps=skipped, lr=lr
        )
        run.step, parts = run.step + len(parts), []
        if after_step():
            return False
        if run.step == steps:
            break
    run.guard.look()
    return True


def _one_line(means: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in means.items())


def gradient_norm(run: Training, clip: float | None) -> Tensor:
    """The norm of the whole gradient, which is clipped to `clip` if that is given."""
    run.scaler.unscale_(run.optimizer)
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    if clip:
        return torch.nn.utils.clip_grad_norm_(parameters, clip)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters])


def accumulate_gradients(
    run: Training, parts: Sequence[Batch], args: argparse.Namespace, distributed: Distributed
) -> dict[str, Tensor]:
    """Gradients of the loss on the joined parts; -> means of the loss, its terms and the measured
    rates.

    The budget terms look at the joined batch. With several parts these statistics need a forward
    pass of their own, without gradient, which the same seeds make equal to the one that follows.
    """
    whole = None
    if len(parts) > 1 and run.teacher is not None:
        with torch.no_grad():
            seen = [
                batch_statistics(_forward(run, run.model, part, i, args, distributed)[0])
                for i, part in enumerate(parts)
            ]
        whole = mean_over_ranks(torch.stack(seen).mean(dim=0))
    run.optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        with nullcontext() if last or run.parallel is run.model else run.parallel.no_sync():
            result, images, targets = _forward(run, run.parallel, part, i, args, distributed)
            with autocast(distributed.device, args.amp):
                taught = None
                if run.teacher is not None:
                    with torch.no_grad():
                        taught = run.teacher(images)
                loss, terms = run.criterion(result, targets, taught, whole)
            # A loss that is not finite can have a finite gradient. This makes the gradient tell, on
            # every rank.
            loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
            run.scaler.scale(loss / len(parts)).backward()
        for name, value in ({"loss": loss} | terms | measured_rates(result)).items():
            totals[name] = totals.get(name, 0) + value.detach() / len(parts)
    return totals


def _forward(
    run: Training,
    model: nn.Module,
    part: Batch,
    index: int,
    args: argparse.Namespace,
    distributed: Distributed,
) -> tuple[Result, Tensor, Tensor]:
    """The model on the `index`-th part of a step, mixed up; -> result, images, targets. Seeds every
    random number.
    """
    seed_everything(args.seed, run.epoch, run.step + index, distributed.rank)
    images = part.images.to(distributed.device, non_blocking=True)
    targets = part.targets.to(distributed.device, non_blocking=True)
    if run.mixup is not None:
        images, targets = run.mixup(images, targets)
    with autocast(distributed.device, args.amp):
        return model(images), images, targets


def measured_rates(result: Result) -> dict[str, Tensor]:
    """What a training batch kept: fraction of the patches after each stage, mean gate of each
    direction.
    """
    rates = {
        f"keep_stage{s + 1}": decision.detach().mean()
        for s, decision in enumerate(result.decisions)
    }
    if result.gates.requires_grad:
        rates["gate_forward"], rates["gate_backward"] = result.gates.detach().mean(dim=(0, 1))
    return rates


class Interrupted(Exception):
    """An evaluation was asked to end early; what was trained is saved already."""


@dataclass
class Metrics:
    """What an evaluation pass measures; percentages as 0 - 100."""

    top1: float
    top5: float
    loss: float
    images: int
    keep: list[float]  # S, fraction of the patches left after each stage
    gates: list[list[float]]  # depth x (forward, backward)


@torch.no_grad()
def evaluate(
    model: VisionMamba,
    data: Data,
    args: argparse.Namespace,
    distributed: Distributed,
    description: str = "evaluation",
    interrupted: Callable[[], bool] = lambda: False,
    observe: Callable[[Batch, Result], None] | None = None,
) -> Metrics:
    """Every validation image once, over all ranks. Raises Interrupted on all of them when
    `interrupted` says so on one.

    observe: sees each batch of this rank and what the model made of it, which the next batch may
        overwrite.
    """
    model.eval()
    device = distributed.device
    forward = graphed(evaluation_forward(model, device, args.amp), device, args.cuda_graph)
    # images, correct in 1, correct in 5, summed loss, then summed gates and kept patches
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    gates = torch.zeros(model.depth, 2, dtype=torch.float64, device=device)
    kept: list[int] = []
    leaving = False
    share = -(-data.num_val // (args.batch_size * distributed.world_size)) if data.num_val else None
    for batch in Progress(data.val_batches(), description, total=share, shown=distributed.is_main):
        images = batch.images.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        result = forward(images)
        logits = result.logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        # Multiples of 2^-24: their float64 sum is exact, so that no number of processes changes the
        # last digit.
        loss = (
            F.cross_entropy(logits, targets, reduction="none").double() * 2**24
        ).round().sum() / 2**24
        totals += torch.stack(
            [totals.new_tensor(len(images)), ranked[:, 0].sum(), ranked.sum(), loss]
        ).double()
        gates += result.gates.double().sum(dim=1)
        kept = [stage.shape[1] for stage in result.kept]
        if observe is not None:
            observe(batch, result)
        leaving = interrupted()
        if leaving:
            break
    # Ranks differ in their number of batches, so that they can agree only here.
    if distributed.agree_any(leaving):
        raise Interrupted
    totals = distributed.all_reduce_sum(totals)
    gates = distributed.all_reduce_sum(gates)
    count = int(totals[0])
    if count == 0:
        raise UserError("no validation image could be used")
    top1, top5 = (100 * totals[1:3] / count).tolist()
    keep = [number / model.num_patches for number in kept]
    return Metrics(top1, top5, totals[3].item() / count, count, keep, (gates / count).tolist())
