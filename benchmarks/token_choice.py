"""What a training step costs with each way to choose tokens, against the paper's, in turn.

    python benchmarks/token_choice.py --output benchmarks/results/token-choice-cpu.json

A step is the forward pass of student and teacher, the loss and the backward pass, without routers
(`--method token`); predictors are set so that noise meets the budget. First the loss and the
gradient of each way are compared with those of the scan in plain PyTorch, for two images; what is
wrong gets no time, and the command fails.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import checking, flags, records
from benchmarks.model import random_images
from benchmarks.train import draw_noise
from losses import Budgets, ClassificationTerms, Distillation, Objective
from models import VisionMamba, sampling
from models.importance import with_importance
from utils import arguments
from utils.files import write_json
from utils.program import run_main
from utils.tables import text_table
from utils.timing import interleaved

WAYS: dict[str, dict[str, Any]] = {
    "paper": {},
    "in place": {"selector_gradient": "inplace"},
    "distilled": {"token_strategy": "distilled"},
    "distilled, every 4th step": {"token_strategy": "distilled"},
    "distilled in place": {"token_strategy": "distilled", "selector_gradient": "inplace"},
    "distilled, merged": {"token_strategy": "distilled", "reduction": "prune+merge"},
    "static": {"token_strategy": "static"},
}
EVERY = {"distilled, every 4th step": 4}
TOLERANCE = 2e-3


def parse_args() -> argparse.Namespace:
    parser = flags.build_parser("token_choice.py", __doc__)
    parser.add_argument("--model", type=flags.dense_model_name, default="vim_tiny")
    parser.add_argument("--batch", type=arguments.positive, default=8)
    parser.add_argument("--token-keep-ratio", type=arguments.ratio, default=0.7)
    flags.add_seconds(parser, 120.0)
    flags.add_retries(parser, 10)
    return flags.parse(parser)


class Steps:
    """The training steps of one way, with fixed noise and without an optimizer."""

    def __init__(self, name: str, teacher: VisionMamba, args: argparse.Namespace):
        self.teacher, self.every, self.done = teacher, EVERY.get(name, 1), 0
        torch.manual_seed(1)
        self.model = timm.create_model(
            f"dyvm_{args.model}", token_keep=args.token_keep_ratio, route_blocks=False, **WAYS[name]
        )
        self.model.to(args.device).train().load_state_dict(teacher.state_dict(), strict=False)
        if self.model.reduction.draws:
            odds = math.log(args.token_keep_ratio / (1 - args.token_keep_ratio))
            for predictor in self.model.score_predictors:
                torch.nn.init.zeros_(predictor.out_conv[-2].weight)
                predictor.out_conv[-2].bias.data[:] = torch.tensor([odds, 0.0])
        drawn = self.model.reduction.draws
        self.objective = Objective(
            ClassificationTerms(SoftTargetCrossEntropy()),
            Budgets(self.model.token_keep if drawn else None),
            Distillation(tokens=not self.model.reduction.merges),
        )

    def several(self, images: Tensor, targets: Tensor, noise: dict[str, Tensor]) -> None:
        """As many steps as there are from one taking of importance to the next."""
        for _ in range(self.every):
            self(images, targets, noise)

    def __call__(self, images: Tensor, targets: Tensor, noise: dict[str, Tensor]) -> list[Tensor]:
        """A step; -> the loss and every gradient."""
        self.model.zero_grad(set_to_none=True)
        with sampling.replay(noise):
            result = self.model(images)
        teacher_result = self._taught(images, targets)
        self.done += 1
        loss = self.objective(result, targets, teacher_result)[0]
        loss.backward()
        return [loss.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)]

    def _taught(self, images: Tensor, targets: Tensor):
        if not self.model.reduction.taught or self.done % self.every:
            with torch.no_grad():
                return self.teacher(images)
        criterion = self.objective.criterion
        return with_importance(
            self.teacher,
            images,
            lambda result: criterion(result, targets)["cls"],
            self.model.pruning_layers,
        )


def error_of(step: Steps, images: Tensor, targets: Tensor, noise: dict[str, Tensor]) -> float:
    """Relative difference of the loss or of the whole gradient from those in plain PyTorch."""
    images, targets = images[: checking.CHECKED], targets[: checking.CHECKED]
    noise = {name: part[: checking.CHECKED] for name, part in noise.items()}
    # Rounding would flip decisions that are nearly ties, so both steps use the same ones.
    with checking.backend("torch"), checking.decisions_recorded(step.model) as decided:
        expected = step(images, targets, noise)
    step.done = 0
    with checking.decisions_replayed(step.model, decided):
        actual = step(images, targets, noise)
    step.done = 0
    pairs = [
        (actual[0], expected[0]),
        tuple(torch.cat([part.flatten() for part in parts[1:]]) for parts in (actual, expected)),
    ]
    return max(((one - other).norm() / other.norm()).item() for one, other in pairs)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times of all ways that are right."""
    torch.manual_seed(0)
    teacher = timm.create_model(args.model)
    checking.set_telling_weights(teacher)
    teacher.to(args.device).eval().requires_grad_(False)
    images = random_images(args.batch, teacher.patch_embed.img_size[0], args.device)
    targets = torch.softmax(torch.randn(args.batch, teacher.num_classes, device=args.device), dim=1)
    steps = {name: Steps(name, teacher, args) for name in WAYS}
    noise = draw_noise(steps["paper"].model, args.batch, args.device)
    errors = {name: error_of(step, images, targets, noise) for name, step in steps.items()}
    wrong = [name for name, error in errors.items() if not error <= TOLERANCE]
    checking.require_correct(wrong, TOLERANCE)
    calls = {name: partial(step.several, images, targets, noise) for name, step in steps.items()}
    for call in calls.values():
        call()
    times = interleaved(calls, args.device, 8, args.seconds, args.retries)
    for name, step in steps.items():
        for unit in ("ms", "cpu_ms"):
            times[name][unit] /= step.every
    return {"errors": errors, "times": times}


def table(measured: dict[str, Any]) -> str:
    times = measured["times"]
    paper = times["paper"]
    rows = [
        [
            name,
            f"{time['ms']:.0f}",
            f"{time['ms'] / paper['ms']:.2f}",
            f"{time['cpu_ms'] / paper['cpu_ms']:.2f}",
            f"{time['samples']}",
            f"{measured['errors'][name]:.1e}",
        ]
        for name, time in times.items()
    ]
    headers = ["training step", "ms", "x paper's", "x its processor time", "samples", "error"]
    return text_table(rows, headers)


def main() -> None:
    args = parse_args()
    record = records.head("token_choice.py", args.device) | {
        "model": args.model,
        "batch": args.batch,
        "token_keep_ratio": args.token_keep_ratio,
    }
    print(f"{record['device']}, {record['threads']} threads, {args.model}, batch {args.batch}")
    record |= measure(args)
    print(table(record))
    if args.output:
        write_json(args.output, record)


if __name__ == "__main__":
    run_main(main)
