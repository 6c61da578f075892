"""One epoch of training, one pass of evaluation.

Every random number of a step follows from (seed, epoch, step, rank): a run that is interrupted
anywhere goes on with the numbers that it would have drawn.

B images, S stages. Source of the method: "Dynamic Vision Mamba" (arXiv 2504.04787).
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from datasets import Data
from loading.loaders import Batch
from losses import batch_statistics, mean_over_ranks
from models import DynamicVisionMamba, Result, VisionMamba
from models.build import build_dense, build_model, check_classes
from models.weights import load_weights
from tasks.classification import build_criterion
from utils.checkpoint import load_checkpoint
from utils.cuda_graphs import graphed
from utils.distributed import Distributed
from utils.errors import UsageError, UserError
from utils.logging import Averages, Progress
from utils.nonfinite import NonFiniteSteps
from utils.precision import autocast
from utils.seeding import seed_everything


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


def ema_decay(args: argparse.Namespace, updates: int) -> float:
    """`--model-ema-decay`, for `updates` of the average in the whole run.

    The default is DeiT's. In a run shorter than 125,000 updates that would leave an average of
    mostly random weights; there the default is less, so that the initial weights count for e^-5 =
    0.7 % of the average at the end.
    """
    if args.model_ema_decay is not None:
        return args.model_ema_decay
    return min(0.99996, max(0.0, 1 - 5 / updates))


def build_training(args: argparse.Namespace, data: Data, distributed: Distributed) -> Training:
    """Model, teacher, loss, optimizer, schedule, EMA and mixup of a fresh run."""
    device = distributed.device
    if args.amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or off")
    seed_everything(args.seed)
    model, teacher = build_model(args, data.num_classes).to(device), None
    if args.model_path:
        dense_weights = load_checkpoint(args.model_path)
        dynamic = isinstance(model, DynamicVisionMamba)
        if dynamic:
            check_classes(dense_weights, data.class_names, args.model_path)
        load_weights(
            model, dense_weights, args.model_path, from_dense=dynamic, new_head=not dynamic
        )
        if dynamic:
            teacher = build_dense(args, data.num_classes).to(device).eval().requires_grad_(False)
            load_weights(teacher, dense_weights, args.model_path)
    model.grad_checkpointing = args.grad_checkpointing
    parallel: nn.Module = model
    if distributed.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        parallel = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    updates = data.steps_per_epoch // args.accum_steps
    if not updates:
        raise UsageError(
            f"--accum-steps {args.accum_steps}: an epoch has only {data.steps_per_epoch} batches"
        )
    whole_batch = args.batch_size * args.accum_steps * distributed.world_size
    lr = args.lr if args.unscale_lr else args.lr * whole_batch / 512
    fused = {"fused": True} if args.opt.lower() in ("adam", "adamw", "sgd") else {}
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=args.opt,
            lr=lr,
            weight_decay=args.weight_decay,
            eps=args.opt_eps,
            betas=tuple(args.opt_betas),
            **fused,
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise UsageError(f"--opt {args.opt} cannot be used: {error}") from None
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=updates,
    )
    mixup = None
    if args.mixup or args.cutmix:
        mixup = Mixup(
            args.mixup,
            args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            label_smoothing=args.smoothing,
            num_classes=data.num_classes,
        )
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    return Training(
        model,
        parallel,
        teacher,
        build_criterion(args, model),
        optimizer,
        scheduler,
        scaler,
        ema=ModelEmaV3(model, decay=ema_decay(args, args.epochs * updates))
        if args.model_ema
        else None,
        mixup=mixup,
        guard=NonFiniteSteps(
            optimizer, scaler, distributed, data.describe, stop=args.nonfinite == "stop"
        ),
    )
