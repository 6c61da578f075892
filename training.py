"""The state of a training, and how a new one is set up.

Source of the method: "Dynamic Vision Mamba" (arXiv 2504.04787).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from losses import Budgets, Distillation, Objective
from models import VisionMamba
from models.build import STAGE_KEEP
from models.fitting import check_numbers
from models.weights import load_weights
from schedules import KeepSchedule
from tasks import Experiment, check_task, task_of_checkpoint
from tasks.base import BatchTransform
from utils.checkpoint import load_checkpoint
from utils.errors import UsageError
from utils.nonfinite import NonFiniteSteps
from utils.optimization import make_optimizer, make_schedule
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
    keep_schedule: KeepSchedule | None = None  # if it is learned
    epoch: int = 0
    step: int = 0  # the next one of this epoch; past the last one, the evaluation comes next
    best: float | None = None
    best_epoch: int | None = None

    def set_token_keep(self, keep: float | Sequence[float]) -> None:
        """What each stage keeps from now on, in the average of the weights and in the loss too."""
        self.model.set_token_keep(keep)
        if self.ema is not None:
            self.ema.module.set_token_keep(keep)
        budgets = self.objective.budgets
        if budgets.token_keep is not None:
            self.objective.budgets = replace(budgets, token_keep=self.model.token_keep)

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
            "best_epoch": self.best_epoch,
            STAGE_KEEP: list(self.model.token_keep) if self.keep_schedule else None,
            "keep_schedule": self.keep_schedule and self.keep_schedule.state_dict(),
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
        # Earlier versions did not record it; patience then counts from here.
        latest = None if self.best is None else self.epoch - 1
        self.best_epoch = state.get("best_epoch", latest)
        if self.keep_schedule is not None and state.get("keep_schedule"):
            self.keep_schedule.load_state_dict(state["keep_schedule"])
            self.set_token_keep(state[STAGE_KEEP])


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
    learned = args.keep_schedule == "learned" and args.method in ("dyvm", "token")
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
        keep_schedule=KeepSchedule(model, args.epochs * updates) if learned else None,
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
