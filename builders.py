"""Models from flags and from checkpoints, and what a training needs beside them."""

import argparse
import logging
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from calibration import restore_threshold
from datasets import Data
from engine import Training, seed_everything
from losses import DenseLoss, DynamicLoss
from models import DynamicVisionMamba, VisionMamba
from models.weights import load_weights
from utils.checkpoint import load_checkpoint
from utils.distributed import Distributed
from utils.errors import UsageError, UserError
from utils.files import sha256_of
from utils.nonfinite import NonFiniteSteps

# What a checkpoint is, so that it can be evaluated without repeating the flags that made it.
IDENTITY = (
    "model",
    "method",
    "model_kwargs",
    "pruning_layers",
    "token_keep_ratio",
    "block_keep_ratio",
    "token_strategy",
    "scorer_input",
    "data_set",
    "data_path",
    "train_split",
    "val_split",
    "input_size",
    "eval_crop_ratio",
)

# Arguments of the models that have a flag of their own.
FLAGGED = {
    "num_classes": "--data-set",
    "drop_path_rate": "--drop-path",
    "img_size": "--input-size",
    "pruning_layers": "--pruning-layers",
    "token_keep": "--token-keep-ratio",
    "token_strategy": "--token-strategy",
    "scorer_input": "--scorer-input",
    "prune_tokens": "--method",
    "route_blocks": "--method",
}

_logger = logging.getLogger(__name__)


def build_model(args: argparse.Namespace, num_classes: int) -> VisionMamba:
    """The model that `--model` and its companions name, with fresh weights."""
    for name in FLAGGED.keys() & args.model_kwargs.keys():
        raise UsageError(f"--model-kwargs {name}=...: use {FLAGGED[name]}")
    sizes: dict[str, Any] = dict(
        args.model_kwargs, num_classes=num_classes, drop_path_rate=args.drop_path
    )
    if args.input_size:
        sizes["img_size"] = args.input_size
    if args.method != "dense":
        sizes |= dict(
            pruning_layers=args.pruning_layers,
            token_keep=args.token_keep_ratio,
            token_strategy=args.token_strategy,
            scorer_input=args.scorer_input,
            prune_tokens=args.method != "block",
            route_blocks=args.method != "token",
        )
    try:
        return timm.create_model(args.model, **sizes)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--model {args.model}: {error}") from None


def build_dense(args: argparse.Namespace, num_classes: int) -> VisionMamba:
    """The dense counterpart of a dynamic model, with fresh weights."""
    dense = argparse.Namespace(
        **vars(args) | dict(model=args.model.removeprefix("dyvm_"), method="dense", drop_path=0.0)
    )
    return build_model(dense, num_classes)


def restore_model(
    args: argparse.Namespace, checkpoint: dict[str, Any], num_classes: int, ema: bool = False
) -> VisionMamba:
    """The model of `args` with weights and gate threshold of a checkpoint, or with the average of
    them (`ema`).

    Raises UserError when the weights do not fit, or when there is no average.
    """
    source = args.model_path
    if ema:
        if not checkpoint.get("ema"):
            raise UserError(f"{source} holds no average of the weights (EMA)")
        checkpoint, source = checkpoint | {"model": checkpoint["ema"]}, f"{source} (EMA)"
    model = build_model(args, num_classes)
    load_weights(model, checkpoint, source)
    restore_threshold(model, checkpoint, args.gate_threshold, "ema" if ema else "model", source)
    return model


def recorded_arguments(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of ours says it is, as defaults for the flags; nothing for others."""
    recorded = checkpoint.get("args")
    if not isinstance(recorded, dict) or "method" not in recorded:
        return {}
    known = {name: recorded[name] for name in IDENTITY if name in recorded}
    known["model_kwargs"] = list(known.get("model_kwargs", {}).items())
    known["dense_path"] = _recorded_teacher(
        recorded.get("model_path"), checkpoint.get("teacher_sha256")
    )
    return known


def _recorded_teacher(path: str | None, sha256: str | None) -> str | None:
    """The teacher's file if it is still there and still the same."""
    if not path or not Path(path).is_file():
        return None
    if sha256 is not None and sha256_of(path) != sha256:
        _logger.warning(
            "%s is not the teacher any more that the checkpoint was trained with; the dense "
            "column has no "
            "accuracy (give --dense-path to compare with it all the same)",
            path,
        )
        return None
    return path


def check_classes(checkpoint: dict[str, Any], class_names: list[str], source: str) -> None:
    """Raise UserError when a checkpoint of ours was trained on other classes than those of the data
    set.
    """
    recorded = checkpoint.get("class_names")
    if recorded is None or list(recorded) == list(class_names):
        return
    if len(recorded) != len(class_names):
        difference = f"{len(recorded)} classes, the data set has {len(class_names)}"
    else:
        i = next(
            i
            for i, pair in enumerate(zip(recorded, class_names, strict=True))
            if pair[0] != pair[1]
        )
        difference = f"other classes than the data set's: class {i} was {recorded[i]!r}, here it is {class_names[i]!r}"
    raise UserError(
        f"{source} was trained on {difference}; evaluate on the --data-set of its training, or "
        "fine-tune "
        "it first with --method dense --model-path"
    )


def model_image_size(args: argparse.Namespace) -> int:
    with torch.device("meta"):
        return build_model(args, num_classes=1).patch_embed.img_size


def build_criterion(args: argparse.Namespace, model: VisionMamba) -> nn.Module:
    """Classification alone for a dense model, the terms of the method for a dynamic one."""
    if args.mixup or args.cutmix:
        classification: nn.Module = SoftTargetCrossEntropy()
    elif args.smoothing:
        classification = LabelSmoothingCrossEntropy(args.smoothing)
    else:
        classification = nn.CrossEntropyLoss()
    if not isinstance(model, DynamicVisionMamba):
        return DenseLoss(classification)
    return DynamicLoss(
        classification,
        token_keep=model.token_keep or None,
        block_keep=args.block_keep_ratio if model.route_blocks else None,
        token_weight=args.token_pruning_weight,
        block_weight=args.block_pruning_weight,
        distill_weight=args.distill_weight,
        token_budget=model.token_strategy == "learned",
    )


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
