"""Training and its set-up, one epoch of training, one pass of evaluation.

Every random number of a step follows from (seed, epoch, step, rank): an interrupted run resumes
with the numbers that it would have drawn.

B images, S stages. Source of the method: "Dynamic Vision Mamba" (arXiv 2504.04787).
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from loading.loaders import Batch
from losses import Budgets, Distillation, Objective
from models import Result, VisionMamba
from models.batch_norm import statistics_kept
from models.fitting import check_numbers
from models.importance import with_importance
from models.weights import load_weights
from tasks import Experiment, Meter, ObjectMeter, ReductionMeter
from tasks.base import BatchTransform, check_task, task_of_checkpoint
from utils.checkpoint import load_checkpoint
from utils.cuda_graphs import graphed
from utils.distributed import Distributed
from utils.errors import UsageError, UserError
from utils.logging import Averages, Progress
from utils.nonfinite import NonFiniteSteps
from utils.optimization import make_optimizer, make_schedule
from utils.precision import autocast
from utils.seeding import seed_everything


@dataclass
class Training:
    """The state of a training, and what it needs to continue."""

    model: VisionMamba
    parallel: nn.Module  # the model, wrapped for several processes
    teacher: VisionMamba | None
    objective: Objective
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    batch_transform: BatchTransform | None
    guard: NonFiniteSteps
    epoch: int = 0
    step: int = 0  # the next one of this epoch; past the last one, the evaluation comes next
    best: float | None = None

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
            "grid": list(self.model.patch_embed.grid),  # of the rows of pos_embed
            "stride": list(self.model.patch_embed.stride),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "ema"):
            check_numbers({}, state.get(name) or {}, f"the run to resume, entry '{name}'")
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.guard.in_a_row = state["skipped_in_a_row"]
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]


def train_one_epoch(
    training: Training,
    experiment: Experiment,
    averages: Averages,
    after_step: Callable[[], bool] = lambda: False,
) -> bool:
    """Train from `training.step` to the end of epoch `training.epoch`; -> whether it got there.

    A step is one batch of the loader; the weights change every `--accum-steps` of them. An
    incomplete last group is dropped.

    Args:
        averages: collects the means of the loss terms and rates; when resumed, it holds those of
            the steps done before.
        after_step: called after each change of the weights; returns True to stop here.
    """
    args, data = experiment.args, experiment.data
    training.parallel.train()
    steps = data.steps_per_epoch // args.accum_steps * args.accum_steps
    if not args.sched_on_updates:
        training.scheduler.step(training.epoch)
    bar = Progress(
        data.train_batches(training.epoch, training.step),
        f"epoch {training.epoch + 1}/{args.epochs}",
        total=steps,
        initial=training.step,
        status=lambda: _one_line(averages.means()),
        shown=experiment.is_main,
    )
    parts: list[Batch] = []
    for batch in bar:
        parts.append(batch)
        if len(parts) < args.accum_steps:
            continue
        if args.sched_on_updates:
            done = training.epoch * steps + training.step
            training.scheduler.step_update(done // args.accum_steps)
        measured = accumulate_gradients(training, parts, experiment)
        norm = gradient_norm(training, args.clip_grad)
        skipped = training.guard.step(
            norm, measured["loss"], torch.cat([part.indices for part in parts])
        )
        if training.ema is not None:
            training.ema.update(training.model)
        lr = max(group["lr"] for group in training.optimizer.param_groups)  # see --layer-decay
        averages.update(
            sum(len(part.images) for part in parts), **measured, skipped_steps=skipped, lr=lr
        )
        training.step, parts = training.step + len(parts), []
        if after_step():
            return False
        if training.step == steps:
            break
    training.guard.look()
    return True


def _one_line(means: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in means.items())


def gradient_norm(training: Training, clip: float | None) -> Tensor:
    """The norm of the whole gradient, which is clipped to `clip` if that is set."""
    training.scaler.unscale_(training.optimizer)
    parameters = [p for p in training.model.parameters() if p.grad is not None]
    if clip:
        return torch.nn.utils.clip_grad_norm_(parameters, clip)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters])


def accumulate_gradients(
    training: Training, parts: Sequence[Batch], experiment: Experiment
) -> dict[str, Tensor]:
    """Gradients of the loss on the joined parts; -> means of the loss, its terms and the rates.

    Some terms depend on the joined batch. With several parts its statistics need a forward pass of
    their own, without gradient; equal seeds make it equal to the one that follows. A decoder's
    batch norm sees each part by itself.
    """
    whole = None
    if len(parts) > 1:
        with statistics_kept(training.model):
            whole = training.objective.whole_batch(
                _forward(training, training.model, part, i, experiment)[0]
                for i, part in enumerate(parts)
            )
    training.optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        alone = training.parallel is training.model
        with nullcontext() if last or alone else training.parallel.no_sync():
            result, images, targets = _forward(training, training.parallel, part, i, experiment)
            with autocast(experiment.device, experiment.args.amp):
                teacher_result = teach(training, images, targets, experiment)
                loss, terms = training.objective(result, targets, teacher_result, whole)
            # A loss that is not finite can have a finite gradient. This makes the gradient NaN too,
            # and so on every rank.
            loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
            training.scaler.scale(loss / len(parts)).backward()
        measured = {"loss": loss} | terms | measured_rates(result)
        if result.scored and teacher_result is not None and not teacher_result.importance:
            measured["selector"] = torch.full_like(loss, torch.nan)  # not taught: not in the mean
        for name, value in measured.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(parts)
    return totals


def teach(
    training: Training, images: Tensor, targets: Tensor, experiment: Experiment
) -> Result | None:
    """What the teacher says of a batch; for a distilled selector also which tokens matter to it."""
    teacher, model = training.teacher, training.model
    if teacher is None:
        return None
    every = experiment.args.importance_every
    if not model.reduction.taught or training.step // experiment.args.accum_steps % every:
        with torch.no_grad():
            return teacher(images)
    criterion = training.objective.criterion

    def loss(result: Result) -> Tensor:
        # Scaled against underflow in fp16; shares of importance are the same.
        return training.scaler.scale(torch.stack(list(criterion(result, targets).values())).sum())

    return with_importance(teacher, images, loss, model.pruning_layers)


def _forward(
    training: Training, model: nn.Module, part: Batch, index: int, experiment: Experiment
) -> tuple[Result, Tensor, Tensor]:
    """Seed, mix up the `index`-th part of a step and run the model; -> result, images, targets."""
    seed = experiment.args.seed
    seed_everything(seed, training.epoch, training.step + index, experiment.distributed.rank)
    part = to_device(part, experiment.device)
    images, targets = part.images, part.targets
    if training.batch_transform is not None:
        images, targets = training.batch_transform(images, targets)
    with autocast(experiment.device, experiment.args.amp):
        return model(images), images, targets


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Images and targets on the device; the indices stay on the host."""
    images, targets = (part.to(device, non_blocking=True) for part in (batch.images, batch.targets))
    return batch._replace(images=images, targets=targets)


def measured_rates(result: Result) -> dict[str, Tensor]:
    """What a training batch kept: share of patches per stage, mean gate per direction."""
    rates = {
        f"keep_stage{s + 1}": decision.detach().mean()
        for s, decision in enumerate(result.decisions)
    }
    patches = result.owner.shape[1]
    for s, kept in enumerate(result.kept):
        rates[f"keep_stage{s + 1}"] = torch.full((), kept.shape[1] / patches, device=kept.device)
    if result.gates.requires_grad:
        rates["gate_forward"], rates["gate_backward"] = result.gates.detach().mean(dim=(0, 1))
    return rates


class Interrupted(Exception):
    """An evaluation was asked to stop early; the training's state has been saved before."""


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Result],
    batches: Iterable[Batch],
    meters: Sequence[Meter],
    distributed: Distributed,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run the meters over this rank's batches.

    Returns:
        `images`, the number of images on all ranks, and what the meters compute.

    Raises:
        Interrupted: on all ranks, when `interrupted` returns True on one.
        UserError: no image could be used.
    """
    count, leaving = 0, False
    for batch in batches:
        batch = to_device(batch, distributed.device)
        result = forward(batch.images)
        count += len(batch.images)
        for meter in meters:
            meter.update(batch, result)
        leaving = interrupted()
        if leaving:
            break
    # Ranks may have different numbers of batches: they can agree only here.
    if distributed.agree_any(leaving):
        raise Interrupted
    images = int(distributed.all_reduce_sum([count]).item())
    if images == 0:
        raise UserError("no validation image could be used")
    values: dict[str, Any] = {"images": images}
    for meter in meters:
        values |= meter.compute(distributed)
    return values


def validate(
    model: VisionMamba,
    experiment: Experiment,
    description: str = "evaluation",
    meters: Sequence[Meter] = (),
    interrupted: Callable[[], bool] = lambda: False,
    quick: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on the validation images.

    quick: with the quick transform, if the task has one.

    Returns:
        The task's measures, `images`, `keep` and `gates` (see `ReductionMeter`), `object` where
        the data set knows it (see `ObjectMeter`), and what the additional `meters` compute.
    """
    data, distributed = experiment.data, experiment.distributed
    batch_size = (data.quick_loader if quick else data.val_loader).batch_size
    whole_batch = batch_size * distributed.world_size
    share = -(-data.num_val // whole_batch) if data.num_val else None
    batches = Progress(data.val_batches(quick), description, total=share, shown=distributed.is_main)
    own = [
        experiment.task.meter(experiment.args, data, distributed.device),
        ReductionMeter(model, distributed.device),
    ]
    if model.pruning_layers and data.val is not None and data.val.knows_objects:
        task, args, size = experiment.task, experiment.args, model.patch_embed.img_size
        region = partial(task.seen_region, args=args, img_size=size)
        own.append(ObjectMeter(model, data.val, region, distributed.device))
    forward = evaluation_forward(model, experiment)
    return evaluate(forward, batches, [*own, *meters], distributed, interrupted)


def evaluation_forward(
    model: Callable[[Tensor], Result], experiment: Experiment
) -> Callable[[Tensor], Result]:
    """The task's prediction with a model, under `--amp` and in CUDA graphs.

    A result is valid until the next call.
    """
    if isinstance(model, nn.Module):
        model.eval()

    def forward(images: Tensor) -> Result:
        # Each call enters autocast anew, so that a CUDA graph can capture it.
        with autocast(experiment.device, experiment.args.amp):
            return experiment.task.predict(model, images)

    if not experiment.task.fixed_size:
        return forward
    return graphed(forward, experiment.device, experiment.args.cuda_graph)


def ema_decay(decay: float | None, updates: int) -> float:
    """`--model-ema-decay`, or its default for a run with this number of `updates`.

    The default is DeiT's. Over fewer than 125,000 updates that would leave an average of mostly
    random weights; there it is lower, so that the initial weights count for e^-5 = 0.7 % at the
    end.
    """
    if decay is not None:
        return decay
    return min(0.99996, max(0.0, 1 - 5 / updates))


def build_training(experiment: Experiment) -> Training:
    """Model, teacher, objective, optimizer, schedule and EMA of a new run."""
    args, data, device = experiment.args, experiment.data, experiment.device
    if args.amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or off")
    seed_everything(args.seed)
    model = experiment.model(experiment.spec)
    teacher = load_start(model, experiment) if args.model_path else None
    model.grad_checkpointing = args.grad_checkpointing
    if teacher is not None:  # it is run backwards for its importance
        teacher.grad_checkpointing = args.grad_checkpointing
    parallel: nn.Module = model
    if experiment.distributed.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        if ids:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        parallel = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    updates = data.steps_per_epoch // args.accum_steps
    if not updates:
        raise UsageError(
            f"--accum-steps {args.accum_steps}: an epoch has only {data.steps_per_epoch} batches"
        )
    optimizer = build_optimizer(model, experiment)
    scheduler = make_schedule(optimizer, args, updates)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=ema_decay(args.model_ema_decay, args.epochs * updates))
    stop = args.nonfinite == "stop"
    return Training(
        model,
        parallel,
        teacher,
        build_objective(model, teacher, experiment),
        optimizer,
        scheduler,
        scaler,
        ema,
        batch_transform=experiment.task.batch_transform(args, data.num_classes),
        guard=NonFiniteSteps(optimizer, scaler, experiment.distributed, data.describe, stop=stop),
    )


def load_start(model: VisionMamba, experiment: Experiment) -> VisionMamba | None:
    """Load `--model-path` into a new model; -> the teacher, or None if nothing is distilled."""
    source, spec = experiment.args.model_path, experiment.spec
    dense_weights = load_checkpoint(source)
    if task_of_checkpoint(dense_weights).name != experiment.task.name:
        if experiment.task.load_start(model, dense_weights, source):
            return None
    check_task(dense_weights, experiment.task, source)
    if not spec.dynamic:
        load_weights(model, dense_weights, source, new_head=True)
        return None
    experiment.task.check_checkpoint(dense_weights, experiment.data.class_names, source)
    load_weights(model, dense_weights, source, from_dense=True)
    if not experiment.task.distils:
        return None
    teacher = experiment.model(spec.dense()).eval().requires_grad_(False)
    load_weights(teacher, dense_weights, source)
    return teacher


def build_objective(
    model: VisionMamba, teacher: VisionMamba | None, experiment: Experiment
) -> Objective:
    """The task's terms; for a dynamic model also budgets, and distillation if it has a teacher."""
    args, task = experiment.args, experiment.task
    budgets = distillation = None
    if experiment.spec.dynamic:
        drawn = model.token_keep and model.reduction.draws
        budgets = Budgets(
            token_keep=model.token_keep if drawn else None,
            block_keep=args.block_keep_ratio if model.route_blocks else None,
            token_weight=args.token_pruning_weight,
            block_weight=args.block_pruning_weight,
        )
    if teacher is None and model.reduction.taught:
        raise UsageError(
            "--token-strategy distilled: a teacher says which tokens matter, and there is none; "
            "give --model-path the dense checkpoint of the same task"
        )
    if teacher is not None:
        distillation = Distillation(
            task.distillation,
            # a merged token is not the teacher's at that patch
            tokens=bool(model.token_keep) and not model.reduction.merges,
            weight=args.distill_weight,
            selector_weight=args.selector_weight,
        )
    return Objective(task.criterion(args), budgets, distillation)


def build_optimizer(model: VisionMamba, experiment: Experiment) -> torch.optim.Optimizer:
    """timm's optimizer `--opt`; `--lr` is scaled by the whole batch."""
    args = experiment.args
    clips = experiment.task.clips_of(args)
    whole_batch = args.batch_size * clips * args.accum_steps * experiment.distributed.world_size
    return make_optimizer(model, args, args.lr if args.unscale_lr else args.lr * whole_batch / 512)
