"""Training steps: DyVM against the step of the paper's release, and dense Vim against timm's DeiT of equal size.

    python benchmarks/train.py --output benchmarks/results/train-cpu.json
    python benchmarks/train.py --device cuda --precision bf16 --batch 64

A DyVM step is the whole of it: teacher, student, loss, backward pass, optimizer. The release-like step is the same on
mamba_ssm's operators, or on the reference ones where that is not installed, and re-arranges tokens image by image as
the release does. Both get the same weights and the same noise and must come to the same loss and gradient in this very
run, or there is no speed and the command fails. Samples are taken in turn and redone while other processes are busy.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import timm
import torch
from tabulate import tabulate
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import checking, timing
from benchmarks.model import BLOCK_KEEP, SIZES, TOKEN_KEEP, parse_common, peak_memory, precision, random_images
from evaluation import device_name
from losses import DynamicLoss
from models import DynamicVisionMamba, VisionMamba, backbone, sampling
from ops import selective_scan
from utils.environment import describe_environment

# Relative difference of the loss and of each parameter's gradient (Frobenius norm) between two ways to do one step.
TOLERANCES = {"fp32": 1e-3, "bf16": 1e-1, "fp16": 2e-2}
Step = Callable[[], list[Tensor]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["dyvm", "dense"], choices=("dyvm", "dense"))
    parser.add_argument("--dyvm-model", help="default: vim_small on a GPU, else vim_micro: the reference operators "
                        "keep every state of the scans")
    parser.add_argument("--dense-size", choices=SIZES, help="default: S on a GPU, else T")
    parser.add_argument("--batch", type=int, help="default: 16; 64 on a GPU with mamba_ssm")
    args = parse_common(parser, seconds=30.0)
    on_gpu = args.device == "cuda"
    args.release_backend = "mamba_ssm" if selective_scan.runs_on("mamba_ssm", args.device) else "reference"
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
    """Within this context, DyVM runs on the backend `name` and re-arranges its tokens image by image."""
    with checking.backend(name), mock.patch.object(backbone, "kept_first", kept_first_by_image), \
            mock.patch.object(backbone, "take", take_by_image):
        yield


def build_pair(args: argparse.Namespace) -> tuple[DynamicVisionMamba, VisionMamba]:
    """Student and teacher of the same weights; noise alone decides, and keeps what the budget asks for."""
    teacher = timm.create_model(args.dyvm_model).to(args.device).eval().requires_grad_(False)
    student = timm.create_model(f"dyvm_{args.dyvm_model}", token_keep=TOKEN_KEEP).to(args.device).train()
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

    noise = {f"token.stage{s}": gumbel(images, model.num_patches, 2) for s in range(len(model.pruning_layers))}
    for i in range(model.depth):
        noise |= {f"router.layer{i}.gumbels{part}": gumbel(images, 2) for part in (1, 2)}
    return noise


def train_step(model: nn.Module, loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer,
               args: argparse.Namespace) -> list[Tensor]:
    """One step; -> the loss and every gradient. The learning rate is 0, so that every step is the same."""
    model.zero_grad(set_to_none=True)
    with precision(args):
        loss = loss_of()
    loss.backward()
    optimizer.step()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def dyvm_steps(args: argparse.Namespace) -> dict[str, Step]:
    """Ours first, then the release-like step."""
    torch.manual_seed(0)
    model, teacher = build_pair(args)
    images = random_images(args.batch, model.patch_embed.img_size, args.device)
    targets = torch.softmax(torch.randn(args.batch, model.num_classes, device=args.device), dim=1)
    noise = draw_noise(model, args.batch, args.device)
    criterion = DynamicLoss(SoftTargetCrossEntropy(), token_keep=model.token_keep, block_keep=BLOCK_KEEP)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def loss_of() -> Tensor:
        with sampling.replay(noise):
            result = model(images)
        with torch.no_grad():
            taught = teacher(images)
        return criterion(result, targets, taught)[0]

    step = partial(train_step, model, loss_of, optimizer, args)

    def ours() -> list[Tensor]:
        with checking.backend(None):
            return step()

    def release() -> list[Tensor]:
        # A GPU cannot hold the states that the reference operators keep for all layers at once.
        model.grad_checkpointing = args.release_backend == "reference" and args.device == "cuda"
        try:
            with release_like(args.release_backend):
                return step()
        finally:
            model.grad_checkpointing = False

    return {"DyVM": ours, f"release-like, {args.release_backend}": release}


def dense_steps(args: argparse.Namespace) -> dict[str, Step]:
    """Vim, DeiT, and Vim on the mamba_ssm backend where that is installed."""
    torch.manual_seed(0)
    name = SIZES[args.dense_size]
    images = random_images(args.batch, 224, args.device)
    targets = torch.softmax(torch.randn(args.batch, 1000, device=args.device), dim=1)
    criterion = SoftTargetCrossEntropy()

    def step_of(model: nn.Module, chosen: Optional[str] = None) -> Step:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

        def loss_of() -> Tensor:
            output = model(images)
            return criterion(output if isinstance(output, Tensor) else output.logits, targets)

        def step() -> list[Tensor]:
            with checking.backend(chosen):
                return train_step(model, loss_of, optimizer, args)

        return step

    vim = timm.create_model(f"vim_{name}").to(args.device).train()
    deit = timm.create_model(f"deit_{name}_patch16_224").to(args.device).train()
    steps = {f"Vim-{args.dense_size}": step_of(vim), f"DeiT-{args.dense_size}": step_of(deit)}
    if args.device == "cuda" and args.release_backend == "mamba_ssm":
        steps[f"Vim-{args.dense_size}, mamba_ssm"] = step_of(vim, "mamba_ssm")
    return steps


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference of any of the tensors, in the Frobenius norm; infinite for NaN."""
    errors = torch.stack([(a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-12)
                          for a, e in zip(actual, expected, strict=True)])
    return errors.nan_to_num(nan=float("inf")).max().item()


def dense_error(args: argparse.Namespace) -> float:
    """`difference` of a small dense Vim's step, on the chosen backend against the definition."""
    torch.manual_seed(0)
    model = timm.create_model("vim_micro", num_classes=10).to(args.device).train()
    images = random_images(4, 32, args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    results = []
    for name in (None, "reference"):
        with checking.backend(name):
            results.append(train_step(model, lambda: model(images).logits.float().square().mean(), optimizer, args))
    return difference(*results)


def measure(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """{"error", "steps": {name: times}, "memory": {name: bytes}}; without times when the error is too large."""
    steps = dyvm_steps(args) if part == "dyvm" else dense_steps(args)
    results = [step() for step in steps.values()]
    error = difference(*results) if part == "dyvm" else dense_error(args)
    del results
    record: dict[str, Any] = {"error": error, "model": args.dyvm_model if part == "dyvm" else args.dense_size}
    if not error <= TOLERANCES[args.precision]:
        return record
    if args.device == "cuda":
        record["memory"] = {name: peak_memory(step) for name, step in steps.items()}
    rounds = max(3, int(args.seconds / sum(timing.sample(step, args.device)[0] for step in steps.values())))
    record["steps"] = timing.interleaved(steps, args.device, rounds, args.retries, long=float("inf"))
    return record


def table(record: dict[str, Any], batch: int) -> str:
    base = next(iter(record["steps"].values()))
    rows = [[name, f"{row['ms']:.1f}", f"{1e3 * batch / row['ms']:.1f}", f"{row['ms'] / base['ms']:.2f}",
             f"{row['cpu_ms'] / base['cpu_ms']:.2f}",
             f"{record['memory'][name] / 2**20:.0f}" if "memory" in record else "-", row["samples"], row["disturbed"]]
            for name, row in record["steps"].items()]
    headers = ["", "ms", "images/s", "time, x first", "processor time, x", "peak MiB", "samples", "disturbed"]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 7))


def main() -> None:
    args = parse_args()
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/train.py", *sys.argv[1:]]), "batch": args.batch,
        "device": device_name(torch.device(args.device)), "precision": args.precision,
        "environment": describe_environment()}
    for part in args.parts:
        record[part] = measure(part, args)
        print(f"\n{part} step, {record[part]['model']}, batch {args.batch}, {args.precision}, {record['device']}; "
              f"loss and gradient differ by {record[part]['error']:.1e}")
        if "steps" in record[part]:
            print(table(record[part], args.batch), flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(record, indent=1) + "\n")
    wrong = [part for part in args.parts if "steps" not in record[part]]
    if wrong:
        raise SystemExit(f"error: no speed without correctness: {', '.join(wrong)} beyond "
                         f"{TOLERANCES[args.precision]}")


if __name__ == "__main__":
    main()
