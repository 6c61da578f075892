"""Ways of reducing tokens by name: their flags of main.py, and a plan of which are compared."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from models.reduction import make_reduction, uniform_stages
from utils.errors import UsageError

from .budgets import Method
from .runs import SET_HERE, check_shared, check_unique, fixed_flags, parse_flags, refuse_set_here

# Each method's flags of main.py, but for the knob that meets a budget.
METHODS = {
    "static": "--token-strategy static",
    "random": "--token-strategy random",
    "norm": "--token-strategy norm",
    "top": "--token-strategy top",
    "paper": "--token-strategy learned",
    "inplace": "--token-strategy learned --selector-gradient inplace",
    "distilled": "--token-strategy distilled",
    "distilled+inplace": "--token-strategy distilled --selector-gradient inplace",
    "merge": "--reduction merge",
    "mtr": "--reduction mtr",
    "prune+merge": "--token-strategy learned --reduction prune+merge",
    "distilled+merge": "--token-strategy distilled --reduction prune+merge",
}
UNTRAINED = "-untrained"  # after the name of a method that is evaluated without training

# Flags that no method may have, and those that belong to a method; what replaces them.
KNOBS = dict.fromkeys(
    ("--token-keep-ratio", "--stage-keep", "--merge-tokens"), "--keep before the --"
)
REFUSED = SET_HERE | KNOBS | {"--method": "nothing: without routers operations are known before"}
OF_METHODS = dict.fromkeys(
    ("--token-strategy", "--selector", "--reduction", "--selector-gradient", "--scorer-input"),
    '--method NAME "FLAGS" before the --',
)
OF_SMALLER = {"--model": "nothing: it is the teacher's", "--model-kwargs": "--smaller"}


@dataclass(frozen=True)
class Plan:
    """What is compared: {method: flags it parses to}, and those of all students."""

    methods: dict[Method, argparse.Namespace]
    shared: argparse.Namespace


def plan(args: argparse.Namespace) -> Plan:
    """The methods with their flags, all checked as far as that needs no file.

    Raises UsageError for what cannot run.
    """
    refuse = partial(refuse_set_here, "compare.py")
    refuse("after --", args.common, REFUSED | OF_METHODS)
    refuse("--smaller-flags", args.smaller_flags, REFUSED | OF_METHODS | OF_SMALLER)
    shared = parsed_of(args, "after --", Method("static", tuple(METHODS["static"].split())))
    wanted = [Method(name, tuple(args.flags_of[name])) for name in args.trained]
    for name, flags in args.flags_of.items():
        refuse(f"method {name}", flags, REFUSED)
    parsed = {}
    untrained = args.training_free
    if untrained == []:
        untrained = [m.name for m in wanted if _needs_no_training(args, m)]
    for name in untrained or []:
        wanted.append(Method(name + UNTRAINED, tuple(args.flags_of[name]), training_free=True))
    check_unique("--method", [method.name for method in wanted])
    for method in wanted:
        parsed[method] = parsed_of(args, where_of(method), method)
        check_shared(where_of(method), parsed[method], shared, "methods")
        if method.training_free and parsed[method].keep_schedule != "fixed":
            raise UsageError(
                f"--training-free {method.name.removesuffix(UNTRAINED)}: its schedule has to be "
                "learned; leave it out"
            )
        if method.training_free and learns(parsed[method]):
            raise UsageError(
                f"--training-free {method.name.removesuffix(UNTRAINED)}: its predictors have to be "
                "trained; leave it out"
            )
    if not wanted:
        raise UsageError("nothing to compare: give --methods, --method or --training-free")
    return Plan(parsed, shared)


def where_of(method: Method) -> str:
    return f"method {method.name}"


def parsed_of(
    args: argparse.Namespace, where: str, method: Method, depth: int | None = None
) -> argparse.Namespace:
    """A method's flags with a knob that stands in for the one to be found."""
    knob = ("--merge-tokens", "1") if merges_pairs(method) else ("--token-keep-ratio", "0.5")
    words = [*words_of(args, method, knob, depth), *fixed_flags(args.dense_path)]
    return parse_flags(where, words)


def merges_pairs(method: Method) -> bool:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--reduction")
    return parser.parse_known_args(method.flags)[0].reduction == "merge"


def _needs_no_training(args: argparse.Namespace, method: Method) -> bool:
    parsed = parsed_of(args, where_of(method), method)
    return not learns(parsed) and parsed.keep_schedule == "fixed"


def learns(parsed: argparse.Namespace) -> bool:
    """Whether a method has predictors."""
    return make_reduction(
        parsed.reduction,
        parsed.token_strategy,
        parsed.scorer_input,
        parsed.merge_tokens,
        parsed.selector_gradient,
    ).learns


def words_of(
    args: argparse.Namespace, method: Method, knob: Sequence[str], depth: int | None = None
) -> list[str]:
    """A method's words of main.py. Pairs are merged before every second of `depth` layers, wherever
    others have their stages, unless the method's own flags say otherwise.
    """
    stages: list[str] = []
    if merges_pairs(method) and depth:
        stages = list(map(str, uniform_stages("merge", depth)))
        if not stages:
            raise UsageError(
                f"{where_of(method)}: it merges before every second layer from 2 on, which a model "
                f"of {depth} does not have; leave it out"
            )
        stages = ["--pruning-layers", *stages]
    return ["--method", "token", *args.common, *stages, *method.flags, *knob]
