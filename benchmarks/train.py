"""Training steps: DyVM against the release's step, dense Vim against timm's DeiT of equal size.

    python benchmarks/train.py --output benchmarks/results/train-cpu.json
    python benchmarks/train.py --device cuda --precision bf16 --batch 64

A DyVM step is all of it: teacher, student, loss, backward pass, optimizer. The release-like step is
the same on mamba_ssm's operators, or on the reference ones if that is not installed, and
re-arranges tokens image by image as the release does; on a GPU the reference operators recompute
each layer in the backward pass, or nothing would fit. Both get the same weights and the same noise
and must arrive at the same loss and gradient in this very run, and so must dense Vim and its step
in plain PyTorch; otherwise no speed is printed and the command fails. Samples are taken in turn and
redone while other processes are busy.
"""

import argparse
import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import checking, flags, hotspots, records
from benchmarks.checking import CHECKED, require_correct
from benchmarks.memory import mebibytes, peak_memory
from benchmarks.model import BLOCK_KEEP, SIZES, TOKEN_KEEP, logits_of, random_images
from benchmarks.rivals import products_differ, with_our_products
from losses import Budgets, ClassificationTerms, Distillation, Objective
from models import DynamicVisionMamba, VisionMamba, sampling
from models.reduction import base
from ops import selective_scan
from utils import arguments
from utils.errors import UserError
from utils.files import write_json
from utils.precision import autocast
from utils.program import run_main
from utils.tables import text_table
from utils.timing import interleaved

# Relative difference of the loss and of each parameter's gradient (Frobenius norm) between two ways
# to do one step. Measured with fresh weights: 1.4e-5 in fp32, 6.1e-2 in bf16, and 1.3 or more for a
# scan without recurrence, one that walks the wrong way, or one that ignores its mask. fp16 rounds 8
# times finer than bf16.
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-1, "fp16": 2e-2}
Step = Callable[[], list[Tensor]]
Keep = Callable[[dict[str, Any]], None]  # gets a record, also one that is not complete yet


class Part(NamedTuple):
    steps: dict[str, Step]
    errors: Callable[[], dict[str, float]]  # `difference` of each step that is compared


def parse_args() -> argparse.Namespace:
    parser = flags.build_parser("train.py", __doc__)
    parser.add_argument("--parts", nargs="+", default=["dyvm", "dense"], choices=PARTS)
    parser.add_argument(
        "--dyvm-model",
        type=flags.dense_model_name,
        help="default: vim_small on a GPU, else vim_micro: the reference operators keep every "
        "state of the scans",
    )
    parser.add_argument("--dense-size", choices=SIZES, help="default: S on a GPU, else T")
    parser.add_argument(
        "--batch",
        type=arguments.positive,
        help="default: 16; 64 on a GPU with mamba_ssm; halved for a part as long as the GPU's "
        "memory does not hold it",
    )
    flags.add_profile(parser)
    flags.add_precision(parser)
    flags.add_seconds(parser, 30.0)
    flags.add_retries(parser, 10)
    args = flags.parse(parser)
    on_gpu = args.device == "cuda"
    args.release_backend = (
        "mamba_ssm" if selective_scan.runs_on("mamba_ssm", args.device) else "reference"
    )
    # A GPU cannot hold the states that the reference operators keep for all layers at once.
    args.release_checkpointing = on_gpu and args.release_backend == "reference"
    args.dyvm_model = args.dyvm_model or ("vim_small" if on_gpu else "vim_micro")
    args.dense_size = args.dense_size or ("S" if on_gpu else "T")
    args.batch = args.batch or (64 if on_gpu and args.release_backend == "mamba_ssm" else 16)
    return args


def kept_first_by_image(policy: Tensor) -> tuple[Tensor, Tensor]:
    """`models.pruning.kept_first`, image by image."""
    orders = [torch.cat([image.nonzero()[:, 0], (image == 0).nonzero()[:, 0]]) for image in policy]
    return torch.stack(orders), torch.stack([image.sum().long() for image in policy])


def take_by_image(tokens: Tensor, index: Tensor) -> Tensor:
    """`models.layouts.take`, image by image."""
    return torch.stack([image[rows] for image, rows in zip(tokens, index, strict=True)])


@contextmanager
def release_like(name: str) -> Iterator[None]:
    """Run DyVM on the backend `name`, with its tokens re-arranged image by image."""
    with (
        checking.backend(name),
        mock.patch.object(base, "kept_first", kept_first_by_image),
        mock.patch.object(base, "take", take_by_image),
    ):
        yield


def build_pair(args: argparse.Namespace) -> tuple[DynamicVisionMamba, VisionMamba]:
    """Student and teacher with the same weights; only noise decides, and meets the budgets."""
    teacher = timm.create_model(args.dyvm_model).to(args.device).eval().requires_grad_(False)
    student = (
        timm.create_model(f"dyvm_{args.dyvm_model}", token_keep=TOKEN_KEEP).to(args.device).train()
    )
    student.load_state_dict(teacher.state_dict(), strict=False)
    with torch.no_grad():
        for layer in student.layers:
            layer.mixer.block_head.bias.fill_(math.log(BLOCK_KEEP / (1 - BLOCK_KEEP)))
        for predictor in student.score_predictors:
            predictor.out_conv[-2].bias[0] = math.log(TOKEN_KEEP / (1 - TOKEN_KEEP))
    return student, teacher


def draw_noise(model: DynamicVisionMamba, images: int, device: str) -> dict[str, Tensor]:
    """Noise for one forward pass, for `sampling.replay`."""

    def gumbel(*shape: int) -> Tensor:
        return sampling.gumbel_like(torch.empty(shape, device=device), "")

    noise = {
        f"token.stage{s}": gumbel(images, model.num_patches, 2)
        for s in range(len(model.pruning_layers))
    }
    for i in range(model.depth):
        noise |= {f"router.layer{i}.gumbels{part}": gumbel(images, 2) for part in (1, 2)}
    return noise


def train_step(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
) -> list[Tensor]:
    """One step; -> the loss and every gradient. The learning rate is 0: every step is the same."""
    model.zero_grad(set_to_none=True)
    with autocast(args.device, args.precision):
        loss = loss_of()
    loss.backward()
    optimizer.step()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def dyvm_part(args: argparse.Namespace) -> Part:
    """Ours first, then the release-like step."""
    torch.manual_seed(0)
    model, teacher = build_pair(args)
    images = random_images(args.batch, model.patch_embed.img_size[0], args.device)
    targets = torch.softmax(torch.randn(args.batch, model.num_classes, device=args.device), dim=1)
    noise = draw_noise(model, args.batch, args.device)
    objective = Objective(
        ClassificationTerms(SoftTargetCrossEntropy()),
        Budgets(model.token_keep, BLOCK_KEEP),
        Distillation(),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def loss_of() -> Tensor:
        with sampling.replay(noise):
            result = model(images)
        with torch.no_grad():
            teacher_result = teacher(images)
        return objective(result, targets, teacher_result)[0]

    step = partial(train_step, model, loss_of, optimizer, args)

    def ours() -> list[Tensor]:
        with checking.backend(None):
            return step()

    def release() -> list[Tensor]:
        model.grad_checkpointing = args.release_checkpointing
        try:
            with release_like(args.release_backend):
                return step()
        finally:
            model.grad_checkpointing = False

    steps = {"DyVM": ours, f"release-like, {args.release_backend}": release}

    def errors() -> dict[str, float]:
        """Rounding would flip decisions that are nearly ties, so both steps use the same ones."""
        with checking.decisions_recorded(model) as decided:
            expected = release()
        with checking.decisions_replayed(model, decided):
            actual = ours()
        # Which of the two is wrong is unknown.
        return dict.fromkeys(steps, difference(actual, expected))

    return Part(steps, errors)


def dense_part(args: argparse.Namespace) -> Part:
    """Vim and DeiT, Vim on the mamba_ssm backend if that is installed, and DeiT with oneDNN's
    products where our models have them in place of PyTorch's.

    Vim is compared with its step on the lean PyTorch backend, for the first images: the definition
    would take longer than everything that is timed, and the tests compare the two.
    """
    torch.manual_seed(0)
    name = SIZES[args.dense_size]
    images = random_images(args.batch, 224, args.device)
    targets = torch.softmax(torch.randn(args.batch, 1000, device=args.device), dim=1)
    criterion = SoftTargetCrossEntropy()

    def step_of(model: nn.Module, backend: str | None = None, count: int = args.batch) -> Step:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

        def step() -> list[Tensor]:
            with checking.backend(backend):
                return train_step(
                    model,
                    lambda: criterion(logits_of(model(images[:count])), targets[:count]),
                    optimizer,
                    args,
                )

        return step

    vim = timm.create_model(f"vim_{name}").to(args.device).train()
    deit = timm.create_model(f"deit_{name}_patch16_224").to(args.device).train()
    backends: dict[str, str | None] = {f"Vim-{args.dense_size}": None}
    if args.device == "cuda" and args.release_backend == "mamba_ssm":
        backends[f"Vim-{args.dense_size}, mamba_ssm"] = "mamba_ssm"

    def errors() -> dict[str, float]:
        fastest = next(
            b for b in selective_scan.PREFERENCE if selective_scan.runs_on(b, args.device)
        )
        expected = step_of(vim, "torch" if fastest != "torch" else "reference", CHECKED)()
        return {
            name: difference(step_of(vim, backend, CHECKED)(), expected)
            for name, backend in backends.items()
        }

    steps = {name: step_of(vim, backend) for name, backend in backends.items()}
    steps[f"DeiT-{args.dense_size}"] = step_of(deit)
    if products_differ(args.device):
        steps[f"DeiT-{args.dense_size}, oneDNN"] = step_of(with_our_products(deit))
    return Part(steps, errors)


PARTS = {"dyvm": dyvm_part, "dense": dense_part}


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference of the tensors, in the Frobenius norm; infinite for NaN."""
    errors = torch.stack(
        [
            (a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-12)
            for a, e in zip(actual, expected, strict=True)
        ]
    )
    return errors.nan_to_num(nan=float("inf")).max().item()


def measure(
    name: str, args: argparse.Namespace, keep: Keep = lambda record: None
) -> dict[str, Any]:
    """{"errors", "wrong", "steps": {name: times}, "memory": {name: bytes}}.

    Wrong steps are left out of the last two. `keep` gets the record whenever a figure is added.
    """
    steps, errors = PARTS[name](args)
    measured = errors()
    wrong = [step for step, error in measured.items() if not error <= TOLERANCES[args.precision]]
    for step in wrong:
        del steps[step]
        print(
            f"no speed: loss or gradient of {step} are wrong by {measured[step]:.1e}, allowed is "
            f"{TOLERANCES[args.precision]}",
            file=sys.stderr,
        )
    record: dict[str, Any] = {
        "model": args.dyvm_model if name == "dyvm" else args.dense_size,
        "batch": args.batch,
        "errors": measured,
        "wrong": wrong,
        "memory": {},
        "steps": {},
    }
    keep(record)
    if not steps:
        return record
    for step in steps.values():
        step()
    record["memory"] = {name: peak_memory(step, args.device) for name, step in steps.items()}
    keep(record)
    if args.profile:
        # A profile of the release-like step, with its many kernels, takes minutes.
        record["hotspots"] = {
            name: hotspots.hotspots(step, args.device)
            for name, step in steps.items()
            if not name.startswith("release-like")
        }
    record["steps"] = interleaved(steps, args.device, 3, args.seconds, args.retries)
    keep(record)
    return record


def measure_fitting(
    name: str, args: argparse.Namespace, keep: Keep = lambda record: None
) -> dict[str, Any]:
    """`measure` at the largest of batch, batch / 2, ... that the GPU's memory holds."""
    batch = args.batch
    while True:
        try:
            return measure(name, argparse.Namespace(**vars(args) | {"batch": batch}), keep)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise UserError(f"{name}: the GPU's memory does not hold a batch of 1") from None
        print(f"{name}: out of memory at batch {batch}, going on at {batch // 2}", file=sys.stderr)
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def table(record: dict[str, Any]) -> str:
    base, base_memory = next(iter(record["steps"].values())), next(iter(record["memory"].values()))
    rows = []
    for name, row in record["steps"].items():
        memory = record["memory"][name]
        error = record["errors"].get(name)
        rows.append(
            [
                name,
                f"{row['ms']:.1f}",
                f"{1e3 * record['batch'] / row['ms']:.1f}",
                f"{row['ms'] / base['ms']:.2f}",
                f"{row['cpu_ms'] / base['cpu_ms']:.2f}",
                mebibytes(memory),
                f"{memory / base_memory:.2f}" if memory and base_memory else "-",
                row["samples"],
                row["disturbed"],
                "-" if error is None else f"{error:.1e}",
            ]
        )
    headers = [
        "",
        "ms",
        "images/s",
        "time, x first",
        "processor time, x",
        "peak MiB",
        "memory, x",
        "samples",
        "disturbed",
        "error",
    ]
    return "\n".join([text_table(rows, headers), *hotspots.lines(record)])


def main() -> None:
    args = parse_args()
    record: dict[str, Any] = {
        **records.head("train.py", args.device),
        "precision": args.precision,
        "release_checkpointing": args.release_checkpointing,
    }

    def keep(part: str, measured: dict[str, Any]) -> None:
        record[part] = measured
        if args.output:
            write_json(args.output, record)

    for part in args.parts:
        record[part] = measure_fitting(part, args, partial(keep, part))
        print(
            f"\n{part} step, {record[part]['model']}, batch {record[part]['batch']}, "
            f"{args.precision}, {record['device']}, {record['threads']} threads"
        )
        if record[part]["steps"]:
            print(table(record[part]), flush=True)
    wrong = [step for part in args.parts for step in record[part]["wrong"]]
    require_correct(wrong, TOLERANCES[args.precision])


if __name__ == "__main__":
    run_main(main)
