"""timm's optimizers and schedules, as the flags ask for them."""

import argparse
import logging
from collections.abc import Iterable
from typing import Any

from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from .checkpoint import copy_to_host
from .errors import UsageError, first_line

DEFAULT_BETAS = (0.9, 0.999)

_logger = logging.getLogger(__name__)


def make_optimizer(model: nn.Module, args: argparse.Namespace, lr: float) -> Optimizer:
    """`--opt` with its flags. Raises UsageError for one that cannot be used here."""
    fused = {"fused": True} if args.opt.lower() in ("adam", "adamw", "sgd") else {}
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=args.opt,
            lr=lr,
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay,
            eps=args.opt_eps,
            **_betas(args),
            **fused,
        )
        copy_to_host(optimizer.state_dict())  # what a checkpoint cannot hold is found here
        return optimizer
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise UsageError(f"--opt {args.opt} cannot be used: {first_line(error)}") from None


def _betas(args: argparse.Namespace) -> dict[str, Any]:
    """`--opt-betas` as the optimizer takes them; one with another number has its own by default."""
    info, given = get_optimizer_info(args.opt.lower()), tuple(args.opt_betas)
    if not info.has_betas:
        return {"momentum": given[0]} if info.has_momentum else {}
    if len(given) == info.num_betas:
        return {"betas": given}
    if given == DEFAULT_BETAS:
        return {}
    raise UsageError(f"--opt-betas {_words(given)}: --opt {args.opt} has {info.num_betas} of them")


def _words(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def make_schedule(optimizer: Optimizer, args: argparse.Namespace, updates: int) -> Scheduler:
    """`--sched` for a run with so many updates an epoch."""
    _tell_inverted_schedule(optimizer, args)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        decay_rate=args.poly_power,  # timm's name for it
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=updates,
    )
    return scheduler


def _tell_inverted_schedule(optimizer: Optimizer, args: argparse.Namespace) -> None:
    """Warn of a schedule that is upside down: `--lr` is scaled by the batch, the others are not."""
    lr = max(group["lr"] for group in optimizer.param_groups)
    scaled = f"--lr {args.lr:g}" + ("" if args.unscale_lr else " scaled by the batch / 512")
    flags = [("--min-lr", args.min_lr, "ends higher than it should begin")]
    if args.warmup_epochs:
        flags.append(("--warmup-lr", args.warmup_lr, "goes down in warm-up"))
    for flag, value, what in flags:
        if value > lr:
            _logger.warning(
                "%s %g is above the learning rate %.3g (%s): the schedule %s; give a lower %s or a "
                "higher --lr%s",
                *(flag, value, lr, scaled, what, flag),
                "" if args.unscale_lr else ", or --unscale-lr",
            )
