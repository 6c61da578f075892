"""The flags of main.py, with the names that DeiT and the paper's release gave them.

A checkpoint records its run's flags; evaluation and the teacher use them, unless a flag overrides
them.
"""

import argparse
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from timm.optim import get_optimizer_info, list_optimizers

from datasets import add_data_arguments, settle_data, task_of
from flag_rules import REPLACED, check_read
from models.options import (
    add_method_arguments,
    add_model_arguments,
    check_reduction,
    check_token_budget,
    forget_other_reduction,
    reduction_defaults,
    settle_model,
    settle_stage_keep,
)
from tasks import Task, task_named
from tasks.other_flags import where_other_flags_are, whose
from utils.arguments import (
    HelpFormatter,
    OneLineParser,
    below_one,
    given_flags,
    not_negative,
    positive,
    ratio,
    whole,
)
from utils.checkpoint import BEST, NEWEST, PREVIOUS
from utils.errors import UsageError
from utils.precision import AMP_DTYPES
from utils.run_folder import CALIBRATED

MOST_BUDGETS = 100  # of one --sweep


def sweep_range(text: str) -> list[float]:
    """Parse `first:last:step`, both ends included, or a single ratio, into token keep ratios."""
    parts = text.split(":")
    if len(parts) not in (1, 3):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST:STEP, such as 0.5:1.0:0.1")
    try:
        first, last, step = map(Decimal, parts if len(parts) == 3 else (parts[0], parts[0], "1"))
        proper = 0 < first <= last <= 1 and step > 0  # comparisons with NaN raise InvalidOperation
    except InvalidOperation:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not FIRST:LAST:STEP in numbers, such as 0.5:1.0:0.1"
        ) from None
    if not proper:
        raise argparse.ArgumentTypeError(
            f"{text}: needs 0 < FIRST <= LAST <= 1 and STEP > 0, since token keep ratios lie in "
            "(0, 1]"
        )
    count = int((last - first) / step) + 1
    if count > MOST_BUDGETS:
        raise argparse.ArgumentTypeError(
            f"{text}: {count} budgets, at most {MOST_BUDGETS}; give a larger STEP"
        )
    return [float(first + index * step) for index in range(count)]


def add_device_arguments(group: argparse._ArgumentGroup) -> None:
    """Where a model runs and in which precision, which visualize.py and predict.py take too."""
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one",
    )
    group.add_argument("--amp", choices=("off", *AMP_DTYPES), default="off", help="mixed precision")


def task_for(argv: Sequence[str], recorded: Mapping[str, Any]) -> Task:
    """The task of the data set named by the flags, or else by an earlier run's arguments."""
    parser = OneLineParser(prog="main.py", add_help=False, allow_abbrev=False)
    add_data_arguments(parser)
    parser.set_defaults(**{name: recorded[name] for name in ("data_set",) if name in recorded})
    return task_named(task_of(parser.parse_known_args(argv)[0].data_set))


def build_parser(task: Task) -> argparse.ArgumentParser:
    """All flags in their groups, including those of a task."""
    parser = OneLineParser(
        prog="main.py",
        description="Train and evaluate Vision Mamba and DyVM.",
        epilog=where_other_flags_are(task),
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    flag = argparse.BooleanOptionalAction

    add_model_arguments(parser)
    add_method_arguments(parser)
    add_data_arguments(parser)

    task.add_arguments(parser)

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=positive, default=30, help="passes over the training set")
    group.add_argument(
        "--patience",
        type=positive,
        metavar="N",
        help="stop after N epochs of which none is at least as good as the best one before",
    )
    group.add_argument(
        "--lr", type=not_negative, help="at a batch of 512 (default: 1e-3 for dense, else 5e-5)"
    )
    group.add_argument(
        "--unscale-lr", action="store_true", help="do not scale --lr by the whole batch / 512"
    )
    group.add_argument("--min-lr", type=not_negative, default=1e-6, help="learning rate at the end")
    group.add_argument(
        "--warmup-lr", type=not_negative, default=1e-5, help="learning rate at the start"
    )
    group.add_argument(
        "--warmup-epochs",
        type=not_negative,
        help="default: 5, or fewer in a run of less than 10 epochs; with --sched-on-updates, "
        "fractions too",
    )
    group.add_argument(
        "--sched", choices=("cosine", "poly", "tanh"), default="cosine", help="of the learning rate"
    )
    group.add_argument(
        "--poly-power", type=not_negative, default=1.0, help="of --sched poly; 1: linear"
    )
    group.add_argument(
        "--sched-on-updates", action="store_true", help="change the learning rate every step"
    )
    group.add_argument("--opt", default="adamw", help="an optimizer of timm")
    group.add_argument(
        "--opt-eps",
        type=not_negative,
        default=1e-8,
        help="of Adam and its like, against division by zero",
    )
    group.add_argument(
        "--opt-betas",
        type=below_one,
        nargs="+",
        default=[0.9, 0.999],
        metavar="BETA",
        help="as many as --opt has: one with three (adan) has its own by default, of one with "
        "momentum (sgd) it is the first",
    )
    group.add_argument(
        "--weight-decay",
        type=not_negative,
        default=1e-8,
        help="not of biases, norms and position embeddings",
    )
    group.add_argument(
        "--layer-decay",
        type=ratio,
        metavar="D",
        help="the learning rate of each layer is D times that of the next one, the head's is --lr",
    )
    group.add_argument(
        "--clip-grad", type=not_negative, metavar="NORM", help="clip the gradient's norm"
    )
    group.add_argument(
        "--accum-steps",
        type=positive,
        default=1,
        metavar="K",
        help="batches whose gradients are joined; counts in the scaling of --lr",
    )
    group.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="recompute layers in the backward pass: less memory, a third more time",
    )
    group.add_argument(
        "--model-ema", action=flag, default=True, help="average of the weights, evaluated too"
    )
    group.add_argument(
        "--model-ema-decay",
        type=ratio,
        metavar="D",
        help="default: 0.99996, or less in a run of less than 125,000 updates: 1 - 5 / updates",
    )

    group = parser.add_argument_group("run")
    group.add_argument(
        "--eval", action="store_true", help="evaluate --model-path and write eval.json"
    )
    group.add_argument(
        "--calibrate",
        action="store_true",
        help="with --eval: choose the gate threshold on training images first (and with "
        "--token-budget image those of tokens), and write --output_dir/calibrated_checkpoint.pth",
    )
    group.add_argument(
        "--sweep",
        type=sweep_range,
        metavar="FIRST:LAST:STEP",
        help="with --eval: evaluate at each of these token keep ratios and draw accuracy against "
        "cost and speed",
    )
    group.add_argument(
        "--output_dir",
        "--output-dir",
        metavar="DIR",
        help="results and checkpoints (default: output, of --eval output/eval)",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew in an --output_dir that holds another run, and remove its files; without "
        "it such a folder is refused. A run that its launcher restarts, or that --resume auto "
        "finds, is continued all the same",
    )
    add_device_arguments(group)
    group.add_argument(
        "--cuda-graph",
        action=flag,
        default=True,
        help="evaluation on a GPU: record the forward pass of each batch shape once and replay it",
    )
    group.add_argument(
        "--resume",
        metavar="auto|FILE",
        help="resume from FILE, or from the newest checkpoint in --output_dir if there is one, "
        "else start anew",
    )
    group.add_argument(
        "--resume-override",
        action="store_true",
        help="resume although flags or the number of processes differ from the run's; the epoch "
        "that was begun starts again",
    )
    group.add_argument(
        "--save-minutes",
        type=not_negative,
        default=15.0,
        metavar="M",
        help="save that often within an epoch; 0: only at its end",
    )
    group.add_argument(
        "--nonfinite",
        choices=("skip", "stop"),
        default="skip",
        help="a step whose gradient is not finite: skip up to 10 in a row, or stop at once",
    )
    group.add_argument("--seed", type=whole, default=0, help="of all random numbers")
    group.add_argument(
        "--throughput-seconds",
        type=not_negative,
        default=10.0,
        metavar="S",
        help="evaluation: time spent on images/s; 0 leaves it out",
    )
    return parser


def parse(argv: Sequence[str], recorded: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """Parse flags; `recorded` arguments of an earlier run replace the defaults. Raises UsageError.

    For `--eval`, parse once to learn the checkpoint's name and again with what it recorded.
    """
    for name in given_flags(argv):
        if name in REPLACED:
            raise UsageError(f"{name} is not a flag here; use {REPLACED[name]}")
    task = task_for(argv, recorded or {})
    parser = build_parser(task)
    parser.set_defaults(**task.defaults)
    plain = reduction_defaults(parser)
    if recorded:
        parser.set_defaults(**recorded)
    args, unknown = parser.parse_known_args(argv)
    # The task of an evaluation, and so its flags, are known only once the checkpoint is read.
    if unknown and not (args.eval and recorded is None):
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}{whose(unknown, task, build_parser)}"
        )
    _check_data_given(argv, args, recorded)
    if args.output_dir is None:
        args.output_dir = "output/eval" if args.eval else "output"
    if args.warmup_epochs is None:
        args.warmup_epochs = min(5, args.epochs // 2)
    if args.eval and recorded is None:
        if not args.model_path:
            raise UsageError("--eval needs --model-path, the checkpoint to evaluate")
        return args  # flags are checked again once the checkpoint's own are known
    if recorded and args.data_set != recorded["data_set"]:
        given = given_flags(argv)
        for name in ("data_path", "prefix", "part_seconds", "part_stride", "canvas"):
            same = getattr(args, name) == recorded.get(name)
            if same and f"--{name.replace('_', '-')}" not in given:
                setattr(args, name, None)  # that of another data set
    settle_stage_keep(argv, args)
    if recorded:
        forget_other_reduction(argv, args, plain)
    settle_data(args)
    settle_model(args)
    check_read(argv, args)
    _check(args, task)
    if args.lr is None:
        args.lr = 1e-3 if args.method == "dense" else 5e-5
    return args


def _check(args: argparse.Namespace, task: Task) -> None:
    """Raise UsageError for combinations that cannot work."""
    check_reduction(args)
    if args.sweep and not args.eval:
        raise UsageError(
            "--sweep needs --eval and --model-path, the checkpoint to evaluate at each budget"
        )
    of_tokens = args.token_budget == "image" and args.method == "token"
    if args.calibrate and not (args.eval and (args.method in ("dyvm", "block") or of_tokens)):
        raise UsageError(
            "--calibrate needs --eval and --model-path, a checkpoint of --method dyvm or block (or "
            "of --method token, with --token-budget image)"
        )
    if args.calibrate and args.gate_threshold != "calibrated":
        raise UsageError(
            f"--calibrate chooses the threshold; leave out --gate-threshold {args.gate_threshold}"
        )
    if args.token_budget == "image":
        _check_image_budget(args)
    _check_overwriting(args)
    if task.distils and not args.eval and args.method != "dense" and not args.model_path:
        raise UsageError(
            f"--method {args.method} needs --model-path, the checkpoint of its dense teacher"
        )
    task.check(args)
    if args.warmup_epochs != int(args.warmup_epochs) and not args.sched_on_updates:
        raise UsageError(
            f"--warmup-epochs {args.warmup_epochs:g}: fractions need --sched-on-updates"
        )
    if args.opt.lower() not in list_optimizers():
        raise UsageError(
            f"--opt {args.opt!r} is unknown; timm knows {', '.join(list_optimizers())}"
        )
    if get_optimizer_info(args.opt.lower()).second_order and not args.eval:
        raise UsageError(
            f"--opt {args.opt} needs second derivatives, which the selective scan does not have; "
            "choose another, such as adamw"
        )
    if not 0 <= args.warmup_epochs < args.epochs and not args.eval:
        raise UsageError(
            f"--warmup-epochs {args.warmup_epochs:g} must lie between 0 and --epochs {args.epochs} "
            "- 1"
        )


def _check_image_budget(args: argparse.Namespace) -> None:
    """Settle `--token-budget image`. Raises UsageError where it has no meaning."""
    if not args.eval:
        raise UsageError("--token-budget image needs --eval and --model-path, the checkpoint")
    check_token_budget(args)
    if args.sweep:
        raise UsageError(
            "--token-budget image and --sweep do not go together; give --token-keep-ratio R"
        )
    args.cuda_graph = False  # the numbers of tokens differ from batch to batch


def _check_data_given(
    argv: Sequence[str], args: argparse.Namespace, recorded: Mapping[str, Any] | None
) -> None:
    """Raise UsageError for a --data-path that nothing would be read from."""
    if args.eval and recorded is None:
        return  # what the checkpoint records is not yet known
    given = given_flags(argv)
    if "--data-path" not in given or args.data_set != "DIGITS":
        return
    if "--data-set" in given or recorded:
        raise UsageError(
            "--data-path has no meaning with --data-set DIGITS, whose images come with "
            "scikit-learn; give another --data-set, such as FOLDER"
        )
    raise UsageError(
        f"--data-path {args.data_path} without --data-set, whose default is DIGITS: which one is "
        "it? FOLDER is a folder with train/ and val/, and in each a folder of images per class"
    )


def _check_overwriting(args: argparse.Namespace) -> None:
    """Raise UsageError if a run would write its checkpoints over the weights it starts from."""
    if args.eval or not args.model_path:
        return
    names = (NEWEST, PREVIOUS, BEST, CALIBRATED)
    own = [Path(args.output_dir).resolve() / name for name in names]
    if Path(args.model_path).resolve() in own:
        raise UsageError(
            f"--model-path {args.model_path} lies in --output_dir {args.output_dir} and would be "
            "overwritten; choose another --output_dir"
        )
