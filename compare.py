"""Compare ways of reducing tokens at equal operations, from one dense teacher, for several seeds.

    python compare.py --dense-path output/dense/best_checkpoint.pth --output_dir output/compare \
        --methods static paper distilled merge --keep 0.5 0.2 --seeds 0 1 2 \
        --smaller "embed_dim=48" -- --data-set CLUTTER --model vim_micro --pruning-layers 2
    python compare.py ... --method deep "--token-strategy norm --pruning-layers 4" -- ...

The budgets are the operations of evenly spread tokens (`static`) at each `--keep`; every method
meets them with its own knob. What follows `--` are flags of main.py for all trainings of students.
The same command resumes an interrupted comparison.
"""

from utils.startup import prepare, require

prepare()

import argparse
import dataclasses
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import options
from evaluation.budgets import Cell, Method, Priced, budgets, solve
from evaluation.comparison_table import RECORD, summarise, table, write
from evaluation.methods import METHODS, Plan, parsed_of, plan, where_of, words_of
from evaluation.outcomes import PlannedRun, measure_speeds
from evaluation.runs import (
    ROOT,
    SHARED,
    add_run_arguments,
    add_seeds_argument,
    add_teacher_argument,
    check_fit,
    check_name,
    check_unique,
    fixed_flags,
    is_complete,
    parse_flags,
    prepare_experiment,
    read_outcomes,
    split_flags,
    split_words,
    told_to_leave,
    train_missing,
)
from evaluation.smaller import parse_smaller, plan_smaller
from loading.fingerprint import fingerprints
from models.build import FLAG_OF, ModelSpec, recorded_arguments
from tasks import Experiment, task_of_checkpoint
from utils import arguments, preemption
from utils.checkpoint import load_checkpoint
from utils.distributed import init_distributed
from utils.errors import UsageError
from utils.files import prepare_output_dir, sha256_of
from utils.logging import setup_logging
from utils.program import run_main
from utils.run_folder import locked

DEFAULT = (
    *("static", "random", "paper", "inplace", "distilled"),
    *("merge", "prune+merge", "distilled+merge"),
)
_logger = logging.getLogger("compare")


def build_parser() -> argparse.ArgumentParser:
    """The flags before `--`, in their groups."""
    parser = arguments.OneLineParser(
        prog="compare.py",
        description="Compare ways of reducing tokens at equal operations, from one dense teacher.",
        usage="compare.py --dense-path FILE [flags] -- FLAGS_OF_MAIN",
        allow_abbrev=False,
        formatter_class=arguments.HelpFormatter,
    )
    group = parser.add_argument_group("what is compared")
    add_teacher_argument(group)
    group.add_argument(
        "--methods",
        nargs="*",
        default=list(DEFAULT),
        metavar="NAME",
        help="trained from the teacher; among those built in: "
        + "; ".join(f"{name} ({flags})" for name, flags in METHODS.items()),
    )
    group.add_argument(
        "--method",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FLAGS"),
        help="your own, with its flags of main.py in quotes; may be repeated",
    )
    group.add_argument(
        "--training-free",
        nargs="*",
        metavar="NAME",
        help="methods without predictors to evaluate with the teacher's weights too, without "
        "training; no name: all such methods of this comparison",
    )
    add_seeds_argument(group, "method")
    group = parser.add_argument_group("budgets")
    group.add_argument(
        "--keep",
        nargs="+",
        type=arguments.ratio,
        default=[0.7],
        metavar="K",
        help="a budget is the exact operations of `static` at this --token-keep-ratio",
    )
    group = parser.add_argument_group("smaller dense models")
    group.add_argument(
        "--smaller",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help='changes of the teacher\'s --model-kwargs in quotes, such as "embed_dim=48 depth=4"; '
        "trained from scratch as the teacher was, for the steps of teacher and student together; "
        "may be repeated",
    )
    group.add_argument(
        "--smaller-seeds",
        type=arguments.positive,
        metavar="N",
        help="of these models train the first N seeds alone (default: all)",
    )
    group.add_argument(
        "--smaller-flags",
        default="",
        metavar="FLAGS",
        help="flags of main.py for their trainings, in quotes, in place of the teacher's recorded "
        "ones",
    )
    add_run_arguments(parser, "output/compare")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    `flags_of` becomes {method: flags}, `trained` the names of those to train, `smaller` a list of
    `Smaller`, and `common` the flags after `--`.
    """
    own, common = split_words(argv, {"--method": 2, "--smaller-flags": 1})
    args = build_parser().parse_args(own)
    names = [name for name, _ in args.method]
    for name in names:
        check_name("--method", name)
        if name in METHODS:
            raise UsageError(f"--method {name!r} is built in ({METHODS[name]}); choose another")
    args.flags_of = {name: flags.split() for name, flags in METHODS.items()} | {
        name: split_flags(f"--method {name}", flags) for name, flags in args.method
    }
    for flag, given in (("--methods", args.methods), ("--training-free", args.training_free or [])):
        unknown = [name for name in given if name not in args.flags_of]
        if unknown:
            raise UsageError(
                f"{flag}: {', '.join(unknown)} is not built in; known are {', '.join(METHODS)}; "
                'add your own with --method NAME "FLAGS"'
            )
        check_unique(flag, given)
    args.trained = [*args.methods, *names]
    check_unique("--method", args.trained)
    check_unique("--seeds", args.seeds)
    check_unique("--keep", [f"{keep:g}" for keep in args.keep])
    args.smaller = list(map(parse_smaller, args.smaller))
    check_unique("--smaller", [smaller.name for smaller in args.smaller])
    args.smaller_flags = split_flags("--smaller-flags", args.smaller_flags)
    for flag, value in (
        ("--smaller-flags", args.smaller_flags),
        ("--smaller-seeds", args.smaller_seeds),
    ):
        if value and not args.smaller:
            raise UsageError(f"{flag} is for --smaller, which is not given")
    if args.smaller_seeds and args.smaller_seeds > len(args.seeds):
        raise UsageError(
            f"--smaller-seeds {args.smaller_seeds} are more than the {len(args.seeds)} of --seeds"
        )
    args.common = common
    return args


def meet_budgets(
    args: argparse.Namespace, planned: Plan, experiment: Experiment
) -> tuple[list[Cell], dict[str, str], int]:
    """Each method at each budget; -> cells, {cell that is left out: why}, layers of the model.

    Raises UsageError for a model that cannot be built, and if no cell is left.
    """

    def build(spec: ModelSpec):
        return experiment.task.model(spec, experiment.data.num_classes)

    static = Priced(ModelSpec.from_args(planned.shared), build)
    wanted, depth = budgets(static, args.keep), static.model.depth
    cells, left_out = [], {}
    for method in planned.methods:
        spec = ModelSpec.from_args(parsed_of(args, where_of(method), method, depth))
        try:
            priced = Priced(spec, build)
        except UsageError as error:
            raise UsageError(f"{where_of(method)}: {error}") from None
        found, why = solve(method, priced, wanted)
        cells, left_out = [*cells, *found], left_out | why
    if not cells:
        raise UsageError("nothing is left to compare: " + next(iter(left_out.values())))
    for name, why in left_out.items():
        _logger.warning("%s is left out: %s", name, why)
    for cell in cells:
        tell = _logger.warning if cell.is_off else _logger.info
        knob, percent = " ".join(cell.knob), 100 * cell.deviation
        tell("%s: %s, %.2f MFLOPs, %+.2f %% of budget", cell.name, knob, cell.exact / 1e6, percent)
    return cells, left_out, depth


def plan_runs(
    args: argparse.Namespace, cells: Sequence[Cell], depth: int, conditions: Mapping[str, Any]
) -> list[PlannedRun]:
    """All runs of students, seed by seed; without training a method is evaluated once.

    conditions: of evaluations without training, apart from the model.
    """
    output, fixed, runs = Path(args.output_dir).resolve(), fixed_flags(args.dense_path), []
    for seed in args.seeds:
        for cell in cells:
            method = cell.method
            folder = output / cell.name / f"seed{seed}"
            own = ["--seed", str(seed), "--output_dir", str(folder)]
            words = words_of(args, method, cell.knob, depth)
            parsed = parse_flags(where_of(method), [*words, *fixed, *own])
            if not method.training_free:
                runs.append(PlannedRun(cell.name, seed, folder, [*words, *fixed, *own], parsed))
            elif seed == args.seeds[0]:
                words = [*words, *own, *_evaluation_flags(parsed.model_path)]
                _check_recorded(method, words, parsed)
                of_model = dataclasses.asdict(ModelSpec.from_args(parsed))
                full = {**conditions, "model": of_model}
                runs.append(PlannedRun(cell.name, seed, folder, words, parsed, full))
    return runs


def _evaluation_flags(dense: str) -> list[str]:
    paths = ["--model-path", dense, "--dense-path", dense]
    return ["--eval", *paths, "--throughput-seconds", "0"]


def _check_recorded(method: Method, words: Sequence[str], parsed: argparse.Namespace) -> None:
    """Raise UsageError if the teacher's record would change what the flags say: main.py --eval
    takes from it what they leave out.
    """
    dense = load_checkpoint(parsed.model_path)
    recorded = recorded_arguments(dense, task_of_checkpoint(dense).recorded)
    evaluated = options.parse(words, recorded)
    for name in (*SHARED, *FLAG_OF.values()):
        there, here = getattr(evaluated, name), getattr(parsed, name)
        if there != here:
            raise UsageError(
                f"{where_of(method)}: --{name.replace('_', '-')} is {there} in {parsed.model_path} "
                f"and {here} here; give it after --"
            )


def describe(
    args: argparse.Namespace,
    argv: Sequence[str],
    planned: Plan,
    teacher: str,
    smaller: Mapping[str, str],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """The record's description of the comparison."""
    shared = planned.shared
    return {
        "command": shlex.join(["python", "compare.py", *argv]).replace(f"{ROOT}/", ""),
        "data_set": shared.data_set,
        "subset": shared.subset,
        "model": shared.model,
        "epochs": shared.epochs,
        "seeds": args.seeds,
        "keep": args.keep,
        "teacher_sha256": teacher,
        "methods": {method.name: list(method.flags) for method in planned.methods},
        "training_free": [method.name for method in planned.methods if method.training_free],
        "smaller": smaller,
        "left_out": left_out,
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    require("tensorboard", "matplotlib")
    planned = plan(args)
    setup_logging()
    experiment = prepare_experiment(planned.shared, args.dense_path, Path(args.output_dir))
    cells, left_out, depth = meet_budgets(args, planned, experiment)
    teacher = sha256_of(args.dense_path)
    images = fingerprints(experiment.data, experiment.args.data_path)
    conditions = {"teacher_sha256": teacher, "images_sha256": images["val"]}
    conditions |= {name: getattr(experiment.args, name) for name in ("amp", "eval_crop_ratio")}
    students = plan_runs(args, cells, depth, conditions)
    check_fit(students, args.dense_path, experiment, "method")
    dense = plan_smaller(args, planned.shared, experiment)
    runs = [*students, *dense.runs]
    best, output = experiment.task.best, prepare_output_dir(args.output_dir)
    preemption.install()

    def complete(run: PlannedRun) -> bool:
        return is_complete(run, teacher, dense.images if run.variant in dense.told else images)

    # The trainings inherit the lock, in case they outlive this process.
    with locked(output, "compare.py, or by trainings that one left running") as lock:
        failed = train_missing(runs, complete, args.jobs, lock, best)
        if told_to_leave():
            return preemption.EXIT_CODE
        outcomes = read_outcomes(runs, failed)
        # Only now: until here the trainings had the GPUs to themselves.
        device = init_distributed(planned.shared.device)
        experiment = dataclasses.replace(experiment, distributed=device)
        speeds = measure_speeds(
            outcomes, args.dense_path, experiment, args.throughput_seconds, output / RECORD
        )
        rows = summarise(cells, dense.told, outcomes, speeds, best)
        about = describe(args, argv, planned, teacher, dense.told, left_out)
        write(rows, outcomes, failed, about, speeds, experiment.task, output)
    print(table(rows, experiment.task, "simple"))
    for run, reason in failed.items():
        print(f"missing: {run}: {reason}")
    _logger.info("written to %s", output / "compare.md")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
