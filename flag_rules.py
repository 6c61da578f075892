"""Which flags of main.py a run reads, and what became of those that DeiT, Vim and the paper's
release have.
"""

import argparse
import logging
from collections.abc import Sequence

from datasets import CLASSIFICATION, TIMM_PREFIXES, task_of
from models.reduction import SELECTING
from utils.arguments import given_flags
from utils.errors import UsageError

_logger = logging.getLogger(__name__)

# Flags that only some methods read in training.
READ_BY = {
    "--pruning-layers": ("dyvm", "token"),
    "--token-keep-ratio": ("dyvm", "token"),
    "--token-pruning-weight": ("dyvm", "token"),
    "--block-keep-ratio": ("dyvm", "block"),
    "--block-pruning-weight": ("dyvm", "block"),
    "--gate-threshold": ("dyvm", "block"),
    "--distill-weight": ("dyvm", "token", "block"),
    "--reduction": ("dyvm", "token"),
    "--selector-gradient": ("dyvm", "token"),
    "--stage-keep": ("dyvm", "token"),
    "--keep-schedule": ("dyvm", "token"),
    "--final-noise": ("dyvm", "token", "block"),
}


def _chooses_splits(args: argparse.Namespace) -> bool:
    return args.data_set.lower().startswith(TIMM_PREFIXES)


def _has_a_length(args: argparse.Namespace) -> bool:
    return not _chooses_splits(args)


_NOT_TAUGHT = "with --token-strategy {token_strategy}; it is for distilled"


def _is_taught(args: argparse.Namespace) -> bool:
    return args.token_strategy == "distilled"


def _draws(args: argparse.Namespace) -> bool:
    """Whether training decides with noise: gates, and selectors that are free to."""
    if args.method != "token":
        return True  # gates are; READ_BY refuses it for dense models
    free = args.token_strategy == "learned" or args.selector_gradient == "inplace"
    return args.reduction in SELECTING and free


_SPLITS = (
    "with --data-set {data_set}; only timm's readers (wds/..., hfds/..., tfds/...) have splits to "
    "choose"
)
# Flags that only some runs read: whether a run with these arguments does, and the message if not.
READ_IF = {
    "--dense-path": (
        lambda args: args.eval and args.method != "dense",
        "here: it names what --eval compares a dynamic model with; in training, --model-path names "
        "the teacher or the initial weights",
    ),
    "--token-keep-ratio": (
        lambda args: args.reduction != "merge",
        "with --reduction merge; --merge-tokens says how many tokens each stage merges",
    ),
    "--stage-keep": (
        lambda args: args.reduction != "merge",
        "with --reduction merge; --merge-tokens says how many tokens each stage merges",
    ),
    "--keep-schedule": (
        lambda args: args.reduction != "merge",
        "with --reduction merge, which merges as many tokens at each stage",
    ),
    "--final-noise": (_draws, "here: nothing is decided with noise"),
    "--sweep": (
        lambda args: args.reduction != "merge",
        "with --reduction merge, which does not read the token keep ratios that it varies",
    ),
    "--whole-images": (
        lambda args: task_of(args.data_set) == CLASSIFICATION,
        "with --data-set {data_set}, whose images are not cropped as those of one label are",
    ),
    "--selector-weight": (_is_taught, _NOT_TAUGHT),
    "--importance-every": (_is_taught, _NOT_TAUGHT),
    "--train-split": (_chooses_splits, _SPLITS),
    "--epoch-steps": (
        _has_a_length,
        "with --data-set {data_set}, which timm reads by its own epochs",
    ),
    "--val-split": (_chooses_splits, _SPLITS),
    "--sampling-rate": (
        lambda args: args.frame_sampling == "dense",
        "without --frame-sampling dense",
    ),
    # scripts/slurm.sh passes `auto` to everything it runs: there may be nothing to resume
    "--resume": (
        lambda args: not args.eval or args.resume == "auto",
        "with --eval; the checkpoint to evaluate is --model-path",
    ),
    "--overwrite": (lambda args: not args.eval, "with --eval, which overwrites no training"),
    "--resume-override": (
        lambda args: args.resume,
        "without --resume; give --resume auto, or --resume FILE",
    ),
}

# Flags of DeiT, Vim and the release that have no counterpart of the same name here.
REPLACED = {
    "--if_amp": "--amp bf16",
    "--no_amp": "--amp off",
    "--if_nan2num": "nothing: --amp bf16 trains without NaN",
    "--if_continue_inf": "--nonfinite skip",
    "--finetune": "--model-path with --method dense",
    "--teacher-path": "--model-path in training, --dense-path at evaluation",
    "--teacher-model": "--method dyvm",
    "--distillation-type": "--method dyvm",
    "--distillation-alpha": "--distill-weight",
    "--distillation-tau": "nothing: the temperature is 1",
    "--start_epoch": "--resume",
    "--start-epoch": "--resume",
    "--dist-eval": "nothing: evaluation is always distributed, every image counted once",
    "--dist_url": "torchrun",
    "--world_size": "torchrun --nproc_per_node",
    "--distributed": "torchrun",
    "--local_rank": "torchrun",
    "--local-rank": "torchrun",
    "--gpu": "CUDA_VISIBLE_DEVICES",
    "--model-ema-force-cpu": "nothing: the average is kept beside the model",
    "--ThreeAugment": "--aa none",
    "--src": "--aa none",
    "--resplit": "nothing",
    "--train-mode": "nothing",
    "--no-train-mode": "nothing",
    "--inat-category": "nothing: the finest category is used",
    "--cosub": "nothing",
    "--bce-loss": "nothing: the paper trains with cross entropy",
    "--attn-only": "nothing",
    "--lr-noise": "nothing",
    "--lr-noise-pct": "nothing",
    "--lr-noise-std": "nothing",
    "--decay-epochs": "--sched cosine",
    "--decay-rate": "--sched cosine",
    "--cooldown-epochs": "--epochs",
    "--patience-epochs": "--sched cosine",
    "--drop": "--drop-path",
    "--momentum": "--opt-betas",
    "--cutmix-minmax": "--cutmix",
    "--mixup-mode": "nothing",
    "--no_continue_inf": "--nonfinite stop",
    "--no_nan2num": "nothing",
    "--no_random_cls_token_position": "nothing",
    "--no_random_token_rank": "nothing",
    "--if_random_cls_token_position": "nothing",
    "--if_random_token_rank": "nothing",
    "--no_log": "nothing",
}


def check_read(argv: Sequence[str], args: argparse.Namespace) -> None:
    """Raise UsageError for a flag that this run does not read.

    Flags of READ_BY pass at evaluation, and when an earlier `--method` on the command line reads
    them: a recipe's flags stay when the user overrides its method with a second `--method`.
    """
    given = given_flags(argv)
    for flag, (is_read, where) in READ_IF.items():
        if flag in given and not is_read(args):
            raise UsageError(f"{flag} has no meaning {where.format_map(vars(args))}")
    if args.eval:
        if "--block-keep-ratio" in given and not args.calibrate:
            _logger.warning(
                "--block-keep-ratio %g changes nothing here: the gates open above the "
                "checkpoint's own threshold; --calibrate finds the one for this share, "
                "--gate-threshold P sets one",
                args.block_keep_ratio,
            )
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", action="append", default=[])
    named = {args.method, *parser.parse_known_args(argv)[0].method}
    for flag, readers in READ_BY.items():
        if flag in given and named.isdisjoint(readers):
            raise UsageError(
                f"{flag} has no meaning with --method {args.method}; leave it out, or train with "
                f"--method {' or '.join(readers)}"
            )
