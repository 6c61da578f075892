"""Runs of main.py from one dense teacher: flags, checks, completeness, training what is missing.

`ablation.py` and `compare.py` plan their runs with it. A run that is complete is left alone, so
that the same command resumes what was interrupted.
"""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

import options
from evaluation.outcomes import DENSE, Outcome, PlannedRun
from models.build import ModelSpec
from models.weights import load_weights
from schedules import check_stages
from tasks import Experiment, Measure
from utils import arguments, preemption
from utils.checkpoint import BEST, load_checkpoint, load_newest
from utils.distributed import Distributed
from utils.errors import UsageError, UserError
from utils.files import prepare_output_dir, sha256_of, write_json
from utils.logging import Progress
from utils.resume import HARMLESS, OF_EVALUATION, flag_differences

# Flags of main.py that cannot be used in such runs, and what replaces them.
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
CONDITIONS = "conditions.json"  # of an evaluation without training, beside its eval.json
POLL_SECONDS = 0.2
ROOT = Path(__file__).resolve().parents[1]

_logger = logging.getLogger(__name__)


def add_teacher_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dense-path", required=True, metavar="FILE", help="checkpoint of the dense teacher"
    )


def add_seeds_argument(group: argparse._ArgumentGroup, what: str) -> None:
    group.add_argument(
        "--seeds",
        nargs="+",
        type=arguments.whole,
        default=[0, 1, 2],
        metavar="SEED",
        help=f"each {what} is trained once with each of them",
    )


def add_run_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """The group "run": where, how many at a time, and how long speeds are measured."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", "--output-dir", default=output, metavar="DIR")
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


def split_words(argv: Sequence[str], quoted: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """The words before `--`, and those after it.

    quoted: {flag: n}; its n-th word holds flags, which begin with a dash and which argparse would
    take for flags of its own: it gets a space in front.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    own = [
        f" {word}" if any(index >= n and argv[index - n] == flag for flag, n in quoted.items())
        else word
        for index, word in enumerate(argv[:end])
    ]  # fmt: skip
    return own, list(argv[end + 1 :])


def check_name(flag: str, name: str) -> None:
    """Raise UsageError unless a name can be that of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == DENSE:
        raise UsageError(
            f"{flag} {name!r}: the name becomes a folder: letters, digits, - _ . and not {DENSE!r}"
        )


def check_unique(flag: str, values: Sequence[Any]) -> None:
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise UsageError(f"{flag}: {', '.join(twice)} is given twice")


def split_flags(where: str, flags: str) -> list[str]:
    """The words of flags that were given in quotes."""
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UsageError(
            f"{where}: {flags.strip()!r} cannot be split into words: {error}"
        ) from None


def refuse_set_here(
    program: str, where: str, words: Sequence[str], refused: Mapping[str, str]
) -> None:
    """Raise UsageError for a flag that the program sets; refused: {flag: what to use}."""
    for name in arguments.given_flags(words):
        if name in refused:
            raise UsageError(f"{where}: {name} is set by {program}; use {refused[name]}")


def parse_flags(where: str, words: Sequence[str]) -> argparse.Namespace:
    """Parse flags of main.py; mistakes name `where` they stand."""
    try:
        return options.parse(words)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def check_shared(
    where: str, parsed: argparse.Namespace, shared: argparse.Namespace, all_of: str
) -> None:
    """Raise UsageError if runs would not be evaluated on the same images."""
    other = [field for field in SHARED if getattr(parsed, field) != getattr(shared, field)]
    if other:
        raise UsageError(
            f"{where}: --{other[0].replace('_', '-')} must be the same for all {all_of}; "
            "give it after --"
        )


def fixed_flags(dense_path: str) -> list[str]:
    """Flags of all trainings from the teacher."""
    dense = str(Path(dense_path).resolve())
    return ["--model-path", dense, "--resume", "auto", "--throughput-seconds", "0"]


def prepare_experiment(args: argparse.Namespace, dense_path: str, output: Path) -> Experiment:
    """What the runs have in common, on the CPU; args: of any of them.

    Raises UserError if the teacher does not fit the data.
    """
    alone = Distributed(torch.device("cpu"))
    experiment = dataclasses.replace(Experiment.prepare(args, alone), output=output)
    dense = load_checkpoint(dense_path)
    experiment.task.check_checkpoint(dense, experiment.data.class_names, dense_path)
    return experiment


def check_fit(
    runs: Sequence[PlannedRun], dense_path: str, experiment: Experiment, what: str = "variant"
) -> None:
    """Raise UserError for a model that the teacher's weights do not fit.

    what: the word for a `PlannedRun.variant`.
    """
    dense = load_checkpoint(dense_path)
    for run in {run.variant: run for run in runs}.values():
        try:
            model = experiment.model(ModelSpec.from_args(run.args))
            load_weights(model, dense, dense_path, from_dense=True)
            if run.args.keep_schedule == "learned" and run.args.method != "block":
                check_stages(model)
        except UserError as error:
            raise type(error)(f"{what} {run.variant}: {error}") from None


def check_inputs(runs: Sequence[PlannedRun], dense_path: str, output: Path) -> Experiment:
    """Prove that data, teacher and models fit together before any time is spent on training.

    -> what the runs have in common, on the CPU.
    """
    experiment = prepare_experiment(runs[0].args, dense_path, output)
    check_fit(runs, dense_path, experiment)
    return experiment


def is_complete(run: PlannedRun, teacher_sha256: str, images: Mapping[str, str]) -> bool:
    """Whether a run was trained and evaluated.

    images: fingerprints of the splits. Raises UserError if its folder holds another run's
    checkpoint.
    """
    if run.conditions is not None:
        return _stands(run)
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
    different = flag_differences(recorded, vars(run.args), HARMLESS - OF_EVALUATION - {"patience"})
    if checkpoint.get("teacher_sha256") != (teacher_sha256 if run.args.model_path else None):
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


def _stands(run: PlannedRun) -> bool:
    """Whether an evaluation without training was made under the same conditions."""
    try:
        recorded = json.loads((run.folder / CONDITIONS).read_bytes())
    except (OSError, ValueError):
        return False
    wanted = json.loads(json.dumps(run.conditions, default=str))
    return recorded == wanted and (run.folder / "eval.json").exists()


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
    if run.conditions is not None:
        (run.folder / "eval.json").unlink(missing_ok=True)
        write_json(run.folder / CONDITIONS, run.conditions)
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
    complete: Callable[[PlannedRun], bool],
    jobs: int,
    lock: int,
    measure: Measure,
) -> dict[str, str]:
    """Train the runs that are not complete, see `is_complete`; -> {run: why it failed}."""
    missing = [run for run in runs if not complete(run)]
    _logger.info("%d runs, %d of them complete", len(runs), len(runs) - len(missing))
    failed: dict[str, str] = {}
    with closing(train_all(missing, jobs, lock)) as ended:
        for run, code in Progress(ended, "runs", total=len(missing)):
            if code == 0:
                value = measure.with_unit(Outcome.read(run).values[measure.key])
                _logger.info("%s: %s %s", run, measure.name, value)
            elif not preemption.requested():
                failed[str(run)] = why_it_failed(run, code)
                _logger.error(
                    "%s failed: %s (%s)", run, failed[str(run)], run.folder / "output.txt"
                )
    return failed


def told_to_leave() -> bool:
    """Whether a signal ended the trainings early; it then says so."""
    if preemption.requested():
        _logger.warning(
            "told to leave by %s; the runs have saved, the same command goes on",
            preemption.received(),
        )
    return preemption.requested()


def read_outcomes(runs: Sequence[PlannedRun], failed: Mapping[str, str]) -> list[Outcome]:
    """Reports of the runs that have not failed. Raises UserError if all have."""
    outcomes = [Outcome.read(run) for run in runs if str(run) not in failed]
    if not outcomes:
        raise UserError(f"all {len(runs)} runs failed; {runs[0]}: {failed[str(runs[0])]}")
    return outcomes
