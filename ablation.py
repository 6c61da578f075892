"""Train variants of the method from one dense teacher, for several seeds; compare them.

    python ablation.py --dense-path output/dense/best_checkpoint.pth --output_dir output/ablation \
        --seeds 0 1 2 -- --data-set FMNIST --model vim_micro --epochs 3 --token-keep-ratio 0.7
    python ablation.py ... --variants main token-only --variant half "--token-keep-ratio 0.5" -- ...

What follows `--` are flags of main.py for all runs. The same command resumes an interrupted
ablation.
"""

from utils.startup import prepare, require

prepare()

import argparse
import dataclasses
import logging
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.ablation_table import RECORD, summarise, table, write
from evaluation.outcomes import PlannedRun, measure_speeds
from evaluation.runs import (
    ROOT,
    SET_HERE,
    add_run_arguments,
    add_seeds_argument,
    add_teacher_argument,
    check_inputs,
    check_name,
    check_shared,
    check_unique,
    fixed_flags,
    is_complete,
    parse_flags,
    read_outcomes,
    refuse_set_here,
    split_flags,
    split_words,
    told_to_leave,
    train_missing,
)
from loading.fingerprint import fingerprints
from utils import arguments, preemption
from utils.distributed import init_distributed
from utils.errors import UsageError
from utils.files import prepare_output_dir, sha256_of
from utils.logging import setup_logging
from utils.program import run_main
from utils.run_folder import locked

# Each variant's flags of main.py. `random` and `static` have the routers of `main`.
VARIANTS = {
    "main": "--method dyvm",
    "token-only": "--method token",
    "block-only": "--method block",
    "scorer-B": "--scorer-input B",
    "scorer-delta": "--scorer-input delta",
    "random": "--token-strategy random",
    "static": "--token-strategy static",
}

_logger = logging.getLogger("ablation")


def build_parser() -> argparse.ArgumentParser:
    """The flags before `--`, in their groups."""
    parser = arguments.OneLineParser(
        prog="ablation.py",
        description="Train variants of the method from one dense teacher and compare them.",
        usage="ablation.py --dense-path FILE [flags] -- FLAGS_OF_MAIN",
        allow_abbrev=False,
        formatter_class=arguments.HelpFormatter,
    )
    group = parser.add_argument_group("what is compared")
    add_teacher_argument(group)
    group.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        metavar="NAME",
        help="among those built in: "
        + "; ".join(f"{name} ({VARIANTS[name]})" for name in VARIANTS),
    )
    group.add_argument(
        "--variant",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FLAGS"),
        help="your own variant, with its flags of main.py in quotes; may be repeated",
    )
    add_seeds_argument(group, "variant")
    add_run_arguments(parser, "output/ablation")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `variants` becomes {name: flags}, `common` the flags after `--`."""
    own, common = split_words(argv, {"--variant": 2})
    args = build_parser().parse_args(own)
    unknown = [name for name in args.variants if name not in VARIANTS]
    if unknown:
        raise UsageError(
            f"--variants: {', '.join(unknown)} is not built in; known are {', '.join(VARIANTS)}; "
            'add your own with --variant NAME "FLAGS"'
        )
    for name, _ in args.variant:
        check_name("--variant", name)
        if name in VARIANTS:
            raise UsageError(
                f"--variant {name!r} is built in ({VARIANTS[name]}); choose another name"
            )
    check_unique("--variants", [*args.variants, *(name for name, _ in args.variant)])
    check_unique("--seeds", args.seeds)
    args.variants = {name: VARIANTS[name].split() for name in args.variants} | {
        name: split_flags(f"--variant {name}", flags) for name, flags in args.variant
    }
    args.common = common
    return args


def plan(args: argparse.Namespace) -> list[PlannedRun]:
    """All runs, seed by seed, so that an early look finds every variant.

    Raises UsageError for what cannot run.
    """
    refuse_set_here(
        "ablation.py",
        "after --",
        args.common,
        {**SET_HERE, "--method": '--variant NAME "--method ..."'},
    )
    fixed = fixed_flags(args.dense_path)
    shared = parse_flags("after --", ["--method", "dyvm", *args.common, *fixed])
    runs = []
    for seed in args.seeds:
        for name, flags in args.variants.items():
            where = f"variant {name}"
            refuse_set_here("ablation.py", where, flags, SET_HERE)
            folder = Path(args.output_dir).resolve() / name / f"seed{seed}"
            own = ["--seed", str(seed), "--output_dir", str(folder)]
            words = ["--method", "dyvm", *args.common, *flags, *fixed, *own]
            parsed = parse_flags(where, words)
            if parsed.method == "dense":
                raise UsageError(
                    f"{where}: --method dense is the teacher's; it is in the table already"
                )
            check_shared(where, parsed, shared, "variants")
            runs.append(PlannedRun(name, seed, folder, words, parsed))
    return runs


def describe(
    args: argparse.Namespace, argv: Sequence[str], common: argparse.Namespace, teacher: str
) -> dict[str, Any]:
    """The record's description of the ablation; `common`: flags of a run, only shared ones read."""
    command = shlex.join(["python", "ablation.py", *argv]).replace(f"{ROOT}/", "")
    return {
        "command": command,
        "data_set": common.data_set,
        "subset": common.subset,
        "model": common.model,
        "epochs": common.epochs,
        "seeds": args.seeds,
        "teacher_sha256": teacher,
        "variants": args.variants,
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    require("tensorboard", "matplotlib")
    runs = plan(args)
    setup_logging()
    experiment = check_inputs(runs, args.dense_path, Path(args.output_dir))
    best, output = experiment.task.best, prepare_output_dir(args.output_dir)
    preemption.install()
    teacher = sha256_of(args.dense_path)
    images = fingerprints(experiment.data, experiment.args.data_path)
    # The trainings inherit the lock, in case they outlive this process.
    with locked(output, "ablation.py, or by trainings that one left running") as lock:
        complete = partial(is_complete, teacher_sha256=teacher, images=images)
        failed = train_missing(runs, complete, args.jobs, lock, best)
        if told_to_leave():
            return preemption.EXIT_CODE
        outcomes = read_outcomes(runs, failed)
        # Only now: until here the trainings had the GPUs to themselves.
        device = init_distributed(runs[0].args.device)
        experiment = dataclasses.replace(experiment, distributed=device)
        speeds = measure_speeds(
            outcomes, args.dense_path, experiment, args.throughput_seconds, output / RECORD
        )
        summary = summarise(args.variants, outcomes, speeds, best)
        about = describe(args, argv, runs[0].args, teacher)
        write(summary, outcomes, failed, about, speeds, experiment.task, output)
    print(table(summary, experiment.task, "simple"))
    for run, reason in failed.items():
        print(f"missing: {run}: {reason}")
    _logger.info("written to %s", output / "ablation.md")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
