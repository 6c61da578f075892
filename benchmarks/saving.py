"""What saving costs: training throughput with a save every minute against training without.

    python benchmarks/saving.py [--device cpu|cuda] [--model vim_tiny] [--batch 16] [--saves 20]
        [--output FILE]

One run does both, and every training step is timed. A window begins with a save and ends a few
steps after the background thread is done; it loses the time of the call that saves, and what its
steps take beyond the median of the undisturbed steps on either side. Next to each save, in random
order, is a control: a window of as many steps in which nothing is saved, so that what the machine
loses by itself shows, and is subtracted. The ratio is 60 s / (60 s + the loss), at the median and
at the upper quartile of the losses; it is printed only if every save, read back, is intact and
equals what was saved.
"""

import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import options
from benchmarks import flags, records
from engine import accumulate_gradients, gradient_norm
from loading.data import Data
from loading.loaders import Batch
from tasks import Experiment
from training import Training, build_training
from utils import arguments, resume
from utils.checkpoint import copy_to_host, is_intact, load_checkpoint
from utils.distributed import Distributed
from utils.errors import UserError
from utils.files import write_json
from utils.logging import Averages, Progress
from utils.program import run_main
from utils.timing import seconds_of

MARGIN = 5  # undisturbed steps between two windows, with which both are compared
SETTLING = 2  # steps after the background thread is done that still count as touched by the save


def endless(data: Data) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from data.train_batches(epoch)
        epoch += 1


def stepper(training: Training, experiment: Experiment) -> Callable[[], float]:
    """A function that does one training step; -> its seconds."""
    batches = endless(experiment.data)

    def step() -> None:
        batch = next(batches)
        measured = accumulate_gradients(training, [batch], experiment)
        training.guard.step(gradient_norm(training, None), measured["loss"], batch.indices)
        training.ema.update(training.model)

    return partial(seconds_of, step, experiment.device.type)


def equal(a: Any, b: Any) -> bool:
    """Whether nested dicts and lists are equal, tensors to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        )
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def check_saved(path: Path, expected: dict[str, Any]) -> None:
    """Raise UserError, without a ratio, unless `path` is intact and holds `expected`."""
    saved = load_checkpoint(path) if is_intact(path) else {}
    wrong = [
        name for name in expected if name not in saved or not equal(saved[name], expected[name])
    ]
    if wrong:
        raise UserError(
            f"no ratio is reported: {', '.join(wrong)} of {path.name} is not what was saved"
        )


def window_of_save(step: Callable[[], float], saver: resume.Saver) -> tuple[float, list[float]]:
    """Save and train on until it is done; -> seconds of the call that saves, and of each step."""
    blocked, steps = seconds_of(lambda: saver.save(Averages()), saver.args.device), []
    while saver.writer.writing():
        steps.append(step())
        saver.writer.check()
    return blocked, steps + [step() for _ in range(SETTLING)]


def measure(step: Callable[[], float], saver: resume.Saver, saves: int) -> list[dict[str, Any]]:
    """`saves` windows of saves and as many controls; -> kind, length and seconds lost of each."""
    for _ in range(MARGIN):
        step()  # the first ones are slow
    # The first save does not count: it has no previous file to verify.
    expected_steps = len(window_of_save(step, saver)[1])
    order = random.Random(0)
    kinds = [kind for _ in range(saves) for kind in order.sample(("save", "control"), 2)]
    before, windows = [step() for _ in range(MARGIN)], []
    for kind in Progress(kinds, "windows"):
        blocked, expected = 0.0, copy_to_host(saver.training.state_dict())
        if kind == "save":
            blocked, steps = window_of_save(step, saver)
            expected_steps = len(steps)
            check_saved(saver.writer.newest, expected)
        else:
            steps = [step() for _ in range(expected_steps)]
        after = [step() for _ in range(MARGIN)]
        windows.append(
            {
                "kind": kind,
                "steps": len(steps),
                "blocked_s": blocked,
                "lost_s": blocked + lost_seconds(before, steps, after),
            }
        )
        before = after
    return windows


def lost_seconds(before: Sequence[float], steps: Sequence[float], after: Sequence[float]) -> float:
    """What `steps` took beyond the median of those before and after them."""
    return sum(steps) - len(steps) * statistics.median([*before, *after])


def summary(windows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Quartiles of the seconds lost in saves, controls and their paired differences; the ratios."""
    lost = {
        kind: [window["lost_s"] for window in windows if window["kind"] == kind]
        for kind in ("save", "control")
    }
    lost["difference"] = [a - b for a, b in zip(lost["save"], lost["control"], strict=True)]
    quartiles = {
        kind: statistics.quantiles(values, n=4, method="inclusive") for kind, values in lost.items()
    }
    _, median, upper = quartiles["difference"]
    return {
        "quartiles_of_lost_s": quartiles,
        "ratio": {"median": 60 / (60 + median), "upper_quartile_of_loss": 60 / (60 + upper)},
    }


def main() -> None:
    parser = flags.build_parser("saving.py", __doc__)
    parser.add_argument("--model", type=flags.dense_model_name, default="vim_tiny")
    parser.add_argument("--input-size", type=arguments.positive, default=32)
    parser.add_argument("--batch", type=arguments.positive, default=16)
    parser.add_argument("--saves", type=arguments.positive, default=20)
    flag = flags.parse(parser)
    if flag.saves < 2:
        parser.error(f"--saves {flag.saves}: quartiles need 2 or more")
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        args = options.parse(
            f"--model {flag.model} --input-size {flag.input_size} --batch-size {flag.batch} "
            f"--num-workers 0 --device {flag.device} --output_dir".split()
            + [folder]
        )
        alone = Distributed(torch.device(flag.device))
        experiment = Experiment.prepare(args, alone)
        training, data = build_training(experiment), experiment.data
        record = resume.identity(
            args,
            1,
            data.class_names,
            data.steps_per_epoch,
            training.model.family.name,
            experiment.task.name,
        )
        saver = resume.Saver(training, record, args, alone)
        windows = measure(stepper(training, experiment), saver, flag.saves)
        size = saver.writer.newest.stat().st_size
        saver.close()
    result = summary(windows)
    for kind, (lower, median, upper) in result["quartiles_of_lost_s"].items():
        print(f"{kind:>10}: {median:.3f} s lost (quartiles {lower:.3f} to {upper:.3f})")
    print(
        f"a save of {size / 1e6:.0f} MB every minute: {result['ratio']['median']:.4f} of the "
        f"throughput without, {result['ratio']['upper_quartile_of_loss']:.4f} at the upper "
        f"quartile of the loss; {flag.saves} saves, each read back and equal to what was saved"
    )
    if flag.output:
        write_json(
            flag.output,
            {
                **records.head("saving.py", flag.device),
                "load_average": {"before": load_before, "after": os.getloadavg()},
                "checkpoint_bytes": size,
                **result,
                "windows": windows,
            },
        )


if __name__ == "__main__":
    run_main(main)
