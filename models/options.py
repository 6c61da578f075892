"""Flags that say which model is built and how it is made dynamic."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from utils.arguments import below_one, given_flags, key_value, not_negative, positive, ratio
from utils.errors import UsageError

from .reduction import REDUCTIONS, SCORER_INPUTS, SELECTING, SELECTOR_GRADIENTS, TOKEN_STRATEGIES
from .registry import canonical_name, model_names

METHODS = ("dense", "dyvm", "token", "block")
# What a checkpoint records of its reduction, with the flags that set it.
OF_REDUCTION = {
    "reduction": ("--reduction",),
    "token_strategy": ("--token-strategy", "--selector"),
    "merge_tokens": ("--merge-tokens",),
    "selector_gradient": ("--selector-gradient",),
    "scorer_input": ("--scorer-input",),
}


def gate_threshold(text: str) -> float | str:
    """Parse the word "calibrated" or a probability in (0, 1)."""
    if text == "calibrated":
        return text
    value = not_negative(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is neither `calibrated` nor a probability between 0 and 1"
        )
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the groups "model" and "method": what every program that takes a checkpoint reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="vim_micro",
        metavar="NAME",
        help="vim_small, dyvm_vim_small, Vim-Small, ...",
    )
    group.add_argument(
        "--model-path",
        metavar="FILE",
        help="training: the dense teacher (dyvm, token, block) or the weights to start from "
        "(dense); evaluation: the checkpoint to evaluate",
    )
    group.add_argument(
        "--model-kwargs",
        nargs="+",
        type=key_value,
        default=[],
        metavar="NAME=VALUE",
        help="further arguments of the model, such as embed_dim=96 depth=10",
    )
    group.add_argument(
        "--pruning-layers",
        nargs="+",
        type=positive,
        metavar="LAYER",
        help="prune tokens before these layers (default: the model's)",
    )

    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        choices=METHODS,
        help="dense: the task alone; dyvm: tokens and blocks; token, block: one of them (default: "
        "dyvm for dyvm_* models, else dense)",
    )
    group.add_argument(
        "--token-keep-ratio",
        type=ratio,
        default=0.7,
        metavar="R",
        help="stage j keeps R^j of the patches; at evaluation it overrides the trained budget",
    )
    group.add_argument(
        "--stage-keep",
        type=ratio,
        nargs="+",
        metavar="K",
        help="fractions of the patches that are left after each stage, in place of "
        "--token-keep-ratio",
    )
    group.add_argument(
        "--token-strategy",
        "--selector",
        choices=TOKEN_STRATEGIES,
        default="learned",
        help="which tokens stay: the paper's learned scores; distilled: scores that are taught "
        "what matters to the teacher; random, static, norm: baselines; top: ToP-ViM's score",
    )
    group.add_argument(
        "--reduction",
        choices=REDUCTIONS,
        default="prune",
        help="what becomes of the others: dropped, or averaged into the most similar one that "
        "stays; merge: R-MeeTo's pairs, mtr: MTR's groups by step size, both without a selector",
    )
    group.add_argument(
        "--merge-tokens",
        type=positive,
        metavar="R",
        help="--reduction merge: tokens that each stage merges, in place of --token-keep-ratio",
    )
    group.add_argument(
        "--selector-gradient",
        choices=SELECTOR_GRADIENTS,
        default="paper",
        help="inplace: the decision about a dropped token gets the gradient of putting it back "
        "where it stands; in the paper's training it gets none",
    )
    group.add_argument(
        "--scorer-input",
        choices=SCORER_INPUTS,
        default="hidden",
        help="what the score predictors read",
    )
    group.add_argument(
        "--gate-threshold",
        type=gate_threshold,
        default="calibrated",
        metavar="calibrated|P",
        help="evaluation: a scan runs if its router's probability exceeds P (0.5 in the paper, "
        "which keeps more than was trained); calibrated: the checkpoint's own P, at which "
        "--block-keep-ratio is met",
    )
    group.add_argument(
        "--token-budget",
        choices=("fixed", "image"),
        default="fixed",
        help="evaluation: the same number of tokens for every image; image: as many as its scores "
        "earn, more of some and fewer of others, at the same mean cost. The thresholds are the "
        "checkpoint's own, from main.py --eval --calibrate; for one that has none main.py --eval "
        "chooses them on training images (one view of each)",
    )


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "training and comparison", which main.py alone reads."""
    group = parser.add_argument_group("training and comparison")
    group.add_argument(
        "--drop-path",
        type=below_one,
        default=0.0,
        help="stochastic depth: rate of the last layer, linear in depth",
    )
    group.add_argument(
        "--keep-schedule",
        choices=("fixed", "learned"),
        default="fixed",
        help="learned: the training shares the operations of --token-keep-ratio (or --stage-keep) "
        "out among the stages anew, by trying; the checkpoint records what came of it",
    )
    group.add_argument(
        "--block-keep-ratio", type=ratio, default=0.8, metavar="R", help="target of the mean gate"
    )
    group.add_argument(
        "--token-pruning-weight",
        type=not_negative,
        default=10.0,
        help="of the term that holds a selector to --token-keep-ratio; of no effect on those that "
        "keep a fixed number",
    )
    group.add_argument(
        "--block-pruning-weight",
        type=not_negative,
        default=10.0,
        help="of the term that holds the routers to --block-keep-ratio",
    )
    group.add_argument(
        "--final-noise",
        type=not_negative,
        default=1.0,
        metavar="F",
        help="factor of the Gumbel noise in selectors' decisions and gates at the end of the "
        "training, down from 1 in a straight line (in the paper it stays 1)",
    )
    group.add_argument(
        "--distill-weight",
        type=not_negative,
        default=0.5,
        help="of the terms that compare with the teacher",
    )
    group.add_argument(
        "--selector-weight",
        type=not_negative,
        default=1.0,
        help="--token-strategy distilled: of the term that teaches the scores",
    )
    group.add_argument(
        "--importance-every",
        type=positive,
        default=1,
        metavar="N",
        help="--token-strategy distilled: run the teacher backwards every N steps only",
    )
    group.add_argument(
        "--dense-path",
        metavar="FILE",
        help="evaluation: dense checkpoint to compare with (default: the teacher named in the "
        "checkpoint)",
    )


def settle_model(args: argparse.Namespace) -> None:
    """Make `--model` and `--method` agree.

    Methods dyvm, token and block turn the name of a dense model into that of its dynamic form.
    """
    args.model_kwargs = dict(args.model_kwargs)
    name = canonical_name(args.model)
    if name not in model_names():
        raise UsageError(f"--model {args.model!r} is unknown; known are {', '.join(model_names())}")
    dynamic = name.startswith("dyvm_")
    if args.method is None:
        args.method = "dyvm" if dynamic else "dense"
    if args.method == "dense" and dynamic:
        raise UsageError(
            f"--model {args.model} is dynamic; --method dense trains {name.removeprefix('dyvm_')}"
        )
    args.model = name if dynamic or args.method == "dense" else f"dyvm_{name}"


def reduction_defaults(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What the flags of a reduction are if they are not given."""
    return {name: parser.get_default(name) for name in OF_REDUCTION}


def forget_other_reduction(
    argv: Sequence[str], args: argparse.Namespace, defaults: Mapping[str, Any]
) -> None:
    """Leave out what a checkpoint records of its reduction if the flags ask for another one."""
    given = given_flags(argv)
    asking = OF_REDUCTION["reduction"] + OF_REDUCTION["token_strategy"]
    if given.isdisjoint(asking):
        return
    for name, flags in OF_REDUCTION.items():
        if given.isdisjoint(flags):
            setattr(args, name, defaults[name])


def check_reduction(args: argparse.Namespace) -> None:
    """Raise UsageError for ways to reduce tokens that do not go together."""
    strategy, reduction = args.token_strategy, args.reduction
    if args.method in ("dense", "block") and (strategy, args.scorer_input) != ("learned", "hidden"):
        raise UsageError(
            f"--token-strategy and --scorer-input have no meaning with --method {args.method}, "
            "which keeps all tokens"
        )
    if reduction not in SELECTING and strategy != "learned":
        raise UsageError(
            f"--token-strategy {strategy} has no meaning with --reduction {reduction}, which "
            "selects nothing; --reduction prune+merge merges what a strategy does not keep"
        )
    if strategy not in ("learned", "distilled") or reduction not in SELECTING:
        what = (
            f"--token-strategy {strategy}" if reduction in SELECTING else f"--reduction {reduction}"
        )
        for flag, value, default in (
            ("--scorer-input", args.scorer_input, "hidden"),
            ("--selector-gradient", args.selector_gradient, "paper"),
        ):
            if value != default:
                raise UsageError(
                    f"{flag} {value} has no meaning with {what}, which learns no scores"
                )
    if reduction == "merge" and args.method in ("dyvm", "token"):
        if args.merge_tokens is None:
            raise UsageError(
                "--reduction merge needs --merge-tokens, how many each stage merges; R-MeeTo's: 5 "
                "for vim_tiny, 11 for vim_small and vim_base"
            )
    elif args.merge_tokens is not None and args.method in ("dense", "block"):
        raise UsageError(
            f"--merge-tokens has no meaning with --method {args.method}, which keeps all tokens"
        )
    elif args.merge_tokens is not None:
        raise UsageError(
            f"--merge-tokens has no meaning with --reduction {reduction}; use --token-keep-ratio"
        )


def check_token_budget(args: argparse.Namespace) -> None:
    """Raise UsageError for `--token-budget image` of a model whose images cannot differ."""
    if args.token_budget == "fixed":
        return
    for flag, value, wanted in (
        ("--method", args.method, ("dyvm", "token")),
        ("--token-strategy", args.token_strategy, ("learned", "distilled")),
        ("--reduction", args.reduction, ("prune",)),
    ):
        if value not in wanted:
            raise UsageError(
                f"--token-budget image is for tokens that are pruned by learned scores, not for "
                f"{flag} {value}"
            )


def settle_stage_keep(argv: Sequence[str], args: argparse.Namespace) -> None:
    """--token-keep-ratio and other stages take the place of a checkpoint's --stage-keep.

    Raises UsageError for flags that contradict each other, or the checkpoint.
    """
    given = given_flags(argv)
    if "--stage-keep" in given:
        if others := sorted(given & {"--token-keep-ratio", "--sweep"}):
            raise UsageError(f"--stage-keep and {others[0]} both say what is left; give one")
        return
    if "--token-keep-ratio" in given:
        args.stage_keep = None
    elif args.stage_keep and "--pruning-layers" in given:
        if len(args.stage_keep) != len(args.pruning_layers):
            raise UsageError(
                f"--pruning-layers: the checkpoint's {len(args.stage_keep)} stages have ratios of "
                "their own; say what others keep by --stage-keep or --token-keep-ratio"
            )
