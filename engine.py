"""One epoch of training, one pass of evaluation.

Every random number of a step follows from (seed, epoch, step, rank): an interrupted run resumes
with the numbers that it would have drawn.

B images, S stages. Source of the method: "Dynamic Vision Mamba" (arXiv 2504.04787).
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loading.loaders import Batch
from losses import total_of
from models import Result, VisionMamba
from models.batch_norm import statistics_kept
from models.importance import with_importance
from ops.cuda_graphs import graphed
from schedules import noise_factor
from tasks import Experiment, Meter, ObjectMeter, ReductionMeter
from training import Training
from utils.distributed import Distributed, mean_over_ranks
from utils.errors import UserError
from utils.logging import Averages, Progress
from utils.precision import autocast
from utils.seeding import seed_everything

_logger = logging.getLogger(__name__)


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
        update = (training.epoch * steps + training.step) // args.accum_steps
        if args.sched_on_updates:
            training.scheduler.step_update(update)
        if args.final_noise != 1:
            progress = update / max(1, args.epochs * steps // args.accum_steps - 1)
            training.model.set_noise(noise_factor(progress, args.final_noise))
        if training.keep_schedule is not None and training.keep_schedule.is_due(update):
            try_schedule(training, parts[0], experiment)
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
        return training.scaler.scale(total_of(criterion(result, targets)))

    return with_importance(teacher, images, loss, model.pruning_layers)


def try_schedule(training: Training, part: Batch, experiment: Experiment) -> None:
    """A trial of the keep schedule on a part of a step; the model keeps what it says from now on.

    All ranks try the same, and learn from the mean of their losses.
    """
    images, targets = _prepare(training, part, 0, experiment)

    def loss() -> Tensor:
        with autocast(experiment.device, experiment.args.amp):
            terms = training.objective.criterion(training.model(images), targets)
        return mean_over_ranks(total_of(terms))

    training.model.eval()
    keep = training.keep_schedule.learn(loss)
    training.set_token_keep(keep)
    if training.keep_schedule.is_done:
        counts = ", ".join(map(str, training.model.kept_counts()))
        patches = training.model.num_patches
        _logger.info("learned: the stages keep %s of %d patches", counts, patches)
    training.parallel.train()


def _prepare(
    training: Training, part: Batch, index: int, experiment: Experiment
) -> tuple[Tensor, Tensor]:
    """Seed, and mix up the `index`-th part of a step; -> images, targets."""
    seed = experiment.args.seed
    seed_everything(seed, training.epoch, training.step + index, experiment.distributed.rank)
    part = to_device(part, experiment.device)
    images, targets = part.images, part.targets
    if training.batch_transform is not None:
        # It works in place, and a batch may be looked at twice.
        images, targets = training.batch_transform(images.clone(), targets)
    return images, targets


def _forward(
    training: Training, model: nn.Module, part: Batch, index: int, experiment: Experiment
) -> tuple[Result, Tensor, Tensor]:
    """Seed, mix up the `index`-th part of a step and run the model; -> result, images, targets."""
    images, targets = _prepare(training, part, index, experiment)
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
