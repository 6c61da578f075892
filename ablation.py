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
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

import options
from evaluation.ablation_table import (
    DENSE,
    Outcome,
    PlannedRun,
    measure_speeds,
    summarise,
    table,
    write,
)
from loading.fingerprint import fingerprints
from models.build import ModelSpec
from models.weights import load_weights
from tasks import Experiment, Measure
from utils import arguments, preemption
from utils.checkpoint import BEST, load_checkpoint, load_newest
from utils.distributed import Distributed, init_distributed
from utils.errors import UsageError, UserError
from utils.files import prepare_output_dir, sha256_of
from utils.logging import Progress, setup_logging
from utils.program import run_main
from utils.resume import HARMLESS, OF_EVALUATION, flag_differences
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

# Flags of main.py that cannot be used here, and what replaces them.
SET_HERE = {
    "--seed": "--seeds before the --",
    "--output_dir": "--output_dir before the --",
    "--output-dir": "--output_dir before the --",
    "--model-path": "--dense-path before the --",
    "--dense-path": "--dense-path before the --",
    "--throughput-seconds": "--throughput-seconds before the --",
    "--eval": "nothing: every run is evaluated",
    "--sweep": "main.py --eval --sweep on a run's checkpoint",
    "--resume": "nothing: an interrupted run is resumed",
    "--resume-override": "another --output_dir",
    "--overwrite": "another --output_dir",
}
# Accuracies and speeds are compared on the same images.
SHARED = ("data_set", "data_path", "val_split", "input_size", "eval_crop_ratio", "device", "amp")
POLL_SECONDS = 0.2
ROOT = Path(__file__).resolve().parent

_logger = logging.getLogger("ablation")


def build_parser() -> argparse.ArgumentParser:
    """The flags before `--`, in their groups."""
    parser = arguments.OneLineParser(
        prog="ablation.py",
        description="Train variants of the method from one dense teacher and compare them.",
        usage="ablation.py --dense-path FILE [flags] -- FLAGS_OF_MAIN",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--dense-path", required=True, metavar="FILE", help="checkpoint of the dense teacher"
    )
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
    group.add_argument(
        "--seeds",
        nargs="+",
        type=arguments.whole,
        default=[0, 1, 2],
        metavar="SEED",
        help="each variant is trained once with each of them",
    )
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", "--output-dir", default="output/ablation", metavar="DIR")
    group.add_argument(
        "--jobs",
        type=arguments.positive,
        default=1,
        metavar="N",
        help="trainings at a time, each on a GPU of its own where there are several, or on an "
        "equal share of the CPU cores",
    )
    group.add_argument(
        "--throughput-seconds",
        type=arguments.not_negative,
        default=10.0,
        metavar="S",
        help="time spent on images/s for every two models, all in turn; 0 leaves it out",
    )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `variants` becomes {name: flags}, `common` the flags after `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    # A variant's flags are one word that begins with a dash, which argparse would take for a flag.
    own = [
        f" {word}" if index > 1 and argv[index - 2] == "--variant" else word
        for index, word in enumerate(argv[:end])
    ]
    args = build_parser().parse_args(own)
    unknown = [name for name in args.variants if name not in VARIANTS]
    if unknown:
        raise UsageError(
            f"--variants: {', '.join(unknown)} is not built in; known are {', '.join(VARIANTS)}; "
            'add your own with --variant NAME "FLAGS"'
        )
    for name, _ in args.variant:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == DENSE:
            raise UsageError(
                f"--variant {name!r}: the name becomes a folder: letters, digits, - _ . and not "
                f"{DENSE!r}"
            )
        if name in VARIANTS:
            raise UsageError(
                f"--variant {name!r} is built in ({VARIANTS[name]}); choose another name"
            )
    _check_unique("--variants", [*args.variants, *(name for name, _ in args.variant)])
    _check_unique("--seeds", args.seeds)
    args.variants = {name: VARIANTS[name].split() for name in args.variants} | {
        name: _split(name, flags) for name, flags in args.variant
    }
    args.common = list(argv[end + 1 :])
    return args


def _check_unique(flag: str, values: Sequence[Any]) -> None:
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise UsageError(f"{flag}: {', '.join(twice)} is given twice")


def _split(name: str, flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UsageError(
            f"--variant {name}: {flags.strip()!r} cannot be split into words: {error}"
        ) from None


def plan(args: argparse.Namespace) -> list[PlannedRun]:
    """All runs, seed by seed, so that an early look finds every variant.

    Raises UsageError for what cannot run.
    """
    _refuse_set_here(
        "after --", [*args.common], {**SET_HERE, "--method": '--variant NAME "--method ..."'}
    )
    dense = str(Path(args.dense_path).resolve())
    fixed = ["--model-path", dense, "--resume", "auto", "--throughput-seconds", "0"]
    shared = _parse_flags("after --", ["--method", "dyvm", *args.common, *fixed])
    runs = []
    for seed in args.seeds:
        for name, flags in args.variants.items():
            where = f"variant {name}"
            _refuse_set_here(where, flags, SET_HERE)
            folder = Path(args.output_dir).resolve() / name / f"seed{seed}"
            own = ["--seed", str(seed), "--output_dir", str(folder)]
            words = ["--method", "dyvm", *args.common, *flags, *fixed, *own]
            parsed = _parse_flags(where, words)
            if parsed.method == "dense":
                raise UsageError(
                    f"{where}: --method dense is the teacher's; it is in the table already"
                )
            other = [field for field in SHARED if getattr(parsed, field) != getattr(shared, field)]
            if other:
                raise UsageError(
                    f"{where}: --{other[0].replace('_', '-')} must be the same for all variants; "
                    "give it after --"
                )
            runs.append(PlannedRun(name, seed, folder, words, parsed))
    return runs


def _refuse_set_here(where: str, words: Sequence[str], refused: dict[str, str]) -> None:
    for word in words:
        name = word.split("=")[0]
        if name in refused:
            raise UsageError(f"{where}: {name} is set by ablation.py; use {refused[name]}")


def _parse_flags(where: str, words: Sequence[str]) -> argparse.Namespace:
    try:
        return options.parse(words)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def check_inputs(runs: Sequence[PlannedRun], dense_path: str, output: Path) -> Experiment:
    """Prove that data, teacher and variants fit together before any time is spent on training.

    -> what the runs have in common, on the CPU.
    """
    alone = Distributed(torch.device("cpu"))
    experiment = dataclasses.replace(Experiment.prepare(runs[0].args, alone), output=output)
    dense = load_checkpoint(dense_path)
    experiment.task.check_checkpoint(dense, experiment.data.class_names, dense_path)
    for run in {run.variant: run for run in runs}.values():
        try:
            model = experiment.model(ModelSpec.from_args(run.args))
            load_weights(model, dense, dense_path, from_dense=True)
        except UserError as error:
            raise type(error)(f"variant {run.variant}: {error}") from None
    return experiment


def is_complete(run: PlannedRun, teacher_sha256: str, images: Mapping[str, str]) -> bool:
    """Whether a run was trained and evaluated.

    images: fingerprints of the splits. Raises UserError if its folder holds another run's
    checkpoint.
    """
    evaluated = is_evaluated(run.folder)
    newest = (
        (load_checkpoint(run.folder / BEST), run.folder / BEST)
        if evaluated
        else load_newest(run.folder)
    )
    if newest is None:
        return False
    checkpoint, path = newest
    recorded = checkpoint.get("args", {})
    different = flag_differences(recorded, vars(run.args), HARMLESS - OF_EVALUATION)
    if checkpoint.get("teacher_sha256") != teacher_sha256:
        different.append("another dense teacher")
    trained_on = checkpoint.get("images") or images  # earlier versions did not record them
    if trained_on != images:
        different.append(f"other images: {recorded.get('data_path')} -> {run.args.data_path}")
    if different:
        raise UserError(
            f"{path} is of a run with other settings ({'; '.join(different)}); repeat them, or "
            "choose another --output_dir"
        )
    return evaluated


def is_evaluated(folder: Path) -> bool:
    """Whether eval.json is that of the run's best checkpoint, as far as it says so."""
    report, best = folder / "eval.json", folder / BEST
    if not (report.exists() and best.exists()):
        return False
    try:
        evaluated = json.loads(report.read_bytes()).get("checkpoint_sha256")
    except (OSError, ValueError, AttributeError):
        return True  # it is named when it is read
    return evaluated in (None, sha256_of(best))


def train_all(runs: Sequence[PlannedRun], jobs: int, lock: int) -> Iterator[tuple[PlannedRun, int]]:
    """Train all runs, `jobs` at a time; yield each with its exit code when it ends.

    On SIGTERM, SIGUSR1 or an interrupt, it signals the trainings, waits until all have saved, and
    ends early.
    """
    waiting, running = list(runs), {}
    try:
        while (waiting or running) and not preemption.requested():
            for place in range(jobs):
                if waiting and place not in running:
                    run = waiting.pop(0)
                    running[place] = run, _start(run, place, jobs, lock)
            time.sleep(POLL_SECONDS)
            for place, (run, process) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    yield run, process.returncode
    finally:
        for _, process in running.values():
            process.send_signal(signal.SIGTERM)
        for _, process in running.values():
            process.wait()


def _start(run: PlannedRun, place: int, jobs: int, lock: int) -> subprocess.Popen:
    """Start a training, in a session of its own: Ctrl-C must not end it before it has saved."""
    prepare_output_dir(run.folder)
    with open(run.folder / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), *run.flags],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | _resources(run.args.device, place, jobs),
            pass_fds=[lock],
            start_new_session=True,
        )


def _resources(device: str, place: int, jobs: int) -> dict[str, str]:
    """Environment variables that give training `place` its GPU or its share of the CPU cores."""
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        return {"CUDA_VISIBLE_DEVICES": visible[place % gpus]}
    share = max(1, len(os.sched_getaffinity(0)) // jobs)
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share))}


def why_it_failed(run: PlannedRun, code: int) -> str:
    """The last line that a failed run printed, or the signal that ended it."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = (run.folder / "output.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")


def train_missing(
    runs: Sequence[PlannedRun],
    teacher_sha256: str,
    images: Mapping[str, str],
    jobs: int,
    lock: int,
    measure: Measure,
) -> dict[str, str]:
    """Train the runs that are not complete; -> {run: why it failed}."""
    missing = [run for run in runs if not is_complete(run, teacher_sha256, images)]
    _logger.info("%d runs, %d of them complete", len(runs), len(runs) - len(missing))
    failed: dict[str, str] = {}
    with closing(train_all(missing, jobs, lock)) as ended:
        for run, code in Progress(ended, "runs", total=len(missing)):
            if code == 0:
                value = measure.with_unit(Outcome.read(run).dynamic[measure.key])
                _logger.info("%s: %s %s", run, measure.name, value)
            elif not preemption.requested():
                failed[str(run)] = why_it_failed(run, code)
                _logger.error(
                    "%s failed: %s (%s)", run, failed[str(run)], run.folder / "output.txt"
                )
    return failed


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
        failed = train_missing(runs, teacher, images, args.jobs, lock, best)
        if preemption.requested():
            _logger.warning(
                "told to leave by %s; the runs have saved, the same command goes on",
                preemption.received(),
            )
            return preemption.EXIT_CODE
        outcomes = [Outcome.read(run) for run in runs if str(run) not in failed]
        if not outcomes:
            raise UserError(f"all {len(runs)} runs failed; {runs[0]}: {failed[str(runs[0])]}")
        # Only now: until here the trainings had the GPUs to themselves.
        device = init_distributed(runs[0].args.device)
        experiment = dataclasses.replace(experiment, distributed=device)
        speeds = measure_speeds(outcomes, args.dense_path, experiment, args.throughput_seconds)
        summary = summarise(args.variants, outcomes, speeds, best)
        about = describe(args, argv, runs[0].args, teacher)
        write(summary, outcomes, failed, about, speeds, experiment.task, output)
    print(table(summary, best, "simple"))
    for run, reason in failed.items():
        print(f"missing: {run}: {reason}")
    _logger.info("written to %s", output / "ablation.md")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
