"""One epoch of training, one pass of evaluation.

Every random number of a step follows from (seed, epoch, step, rank): a run that is interrupted anywhere goes on with
the numbers that it would have drawn.

B images, S stages. Source of the method: "Dynamic Vision Mamba" (arXiv 2504.04787).
"""

import argparse
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from datasets import Data
from loaders import Batch
from models import Result, VisionMamba
from transforms import derive_seed
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


@dataclass
class Training:
    """Everything that a run changes as it goes, and what it needs to go on."""

    model: VisionMamba
    parallel: nn.Module  # the model, wrapped for several processes
    teacher: Optional[VisionMamba]
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: Optional[ModelEmaV3]
    mixup: Optional[Mixup]
    epoch: int = 0
    step: int = 0  # the next step of this epoch; after the last one, the epoch awaits its evaluation
    best: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
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
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]


def train_one_epoch(run: Training, data: Data, args: argparse.Namespace, distributed: Distributed,
                    averages: Averages, after_step: Callable[[], bool] = lambda: False) -> bool:
    """Train from `run.step` to the last step of epoch `run.epoch`; -> whether it came to the end.

    averages: gets the means of the loss terms and rates; those of the steps done before, when resumed.
    after_step: called when a step is done; True stops here.
    """
    device = distributed.device
    run.parallel.train()
    guard = NonFiniteSteps(run.optimizer, run.scaler, data.describe, stop=args.nonfinite == "stop")
    steps = data.steps_per_epoch
    if not args.sched_on_updates:
        run.scheduler.step(run.epoch)
    bar = Progress(data.train_batches(run.epoch, run.step), f"epoch {run.epoch + 1}/{args.epochs}", total=steps,
                   initial=run.step, status=lambda: _one_line(averages.means()), shown=distributed.is_main)
    for batch in bar:
        if args.sched_on_updates:
            run.scheduler.step_update(run.epoch * steps + run.step)
        seed_everything(args.seed, run.epoch, run.step, distributed.rank)
        images = batch.images.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        loss, measured = forward_backward(run, images, targets, args)
        parameters = [p for p in run.model.parameters() if p.grad is not None]
        run.scaler.unscale_(run.optimizer)
        if args.clip_grad:
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        skipped = guard.step(norm, batch.indices)
        if run.ema is not None:
            run.ema.update(run.model)
        averages.update(len(images), loss=loss, **measured, skipped_steps=skipped,
                        lr=run.optimizer.param_groups[0]["lr"])
        run.step += 1
        if after_step():
            return False
    guard.look()
    return True


def _one_line(means: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in means.items())


def forward_backward(run: Training, images: Tensor, targets: Tensor,
                     args: argparse.Namespace) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of one batch; -> loss, its terms and the measured rates."""
    if run.mixup is not None:
        images, targets = run.mixup(images, targets)
    with autocast(images.device, args.amp):
        taught = None
        if run.teacher is not None:
            with torch.no_grad():
                taught = run.teacher(images)
        result = run.parallel(images)
        loss, terms = run.criterion(result, targets, taught)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    return loss.detach(), {name: term.detach() for name, term in terms.items()} | measured_rates(result)


def measured_rates(result: Result) -> dict[str, Tensor]:
    """What a training batch kept: fraction of the patches after each stage, mean gate of each direction."""
    rates = {f"keep_stage{s + 1}": decision.detach().mean() for s, decision in enumerate(result.decisions)}
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
def evaluate(model: VisionMamba, data: Data, args: argparse.Namespace, distributed: Distributed,
             description: str = "evaluation", interrupted: Callable[[], bool] = lambda: False,
             observe: Optional[Callable[[Batch, Result], None]] = None) -> Metrics:
    """Every validation image once, over all ranks. Raises Interrupted when `interrupted` says so after a batch.

    observe: sees each batch of this rank and what the model made of it.
    """
    model.eval()
    device = distributed.device
    # images, correct in 1, correct in 5, summed loss, then summed gates and kept patches
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    gates = torch.zeros(model.depth, 2, dtype=torch.float64, device=device)
    kept: list[int] = []
    share = -(-data.num_val // (args.batch_size * distributed.world_size)) if data.num_val else None
    for batch in Progress(data.val_batches(), description, total=share, shown=distributed.is_main):
        images = batch.images.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        with autocast(device, args.amp):
            result = model(images)
        logits = result.logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="none").double().sum()
        totals += torch.stack([totals.new_tensor(len(images)), ranked[:, 0].sum(), ranked.sum(), loss]).double()
        gates += result.gates.double().sum(dim=1)
        kept = [stage.shape[1] for stage in result.kept]
        if observe is not None:
            observe(batch, result)
        if interrupted():
            raise Interrupted
    totals = distributed.all_reduce_sum(totals)
    gates = distributed.all_reduce_sum(gates)
    count = int(totals[0])
    if count == 0:
        raise UserError("no validation image could be used")
    top1, top5 = (100 * totals[1:3] / count).tolist()
    keep = [number / model.num_patches for number in kept]
    return Metrics(top1, top5, totals[3].item() / count, count, keep, (gates / count).tolist())
