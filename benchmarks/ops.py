"""One mixer's selective scan, both directions, against other implementations: errors, then speed.

    python benchmarks/ops.py --output benchmarks/results/ops.json
    python benchmarks/ops.py --device cuda --precision bf16 --batch 256

Every rival's output and gradients are compared with the float64 definition in the same run, on the
first images of the same batch; a wrong one is not timed, and the command fails. The two matrix
products around the scan (in_proj and out_proj) are timed as well, for scale. Samples are taken in
turn and redone while other processes are busy. Rivals that are not installed
(requirements-bench.txt), fail or do not fit the memory are left out.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import flags, records, rivals
from benchmarks.checking import require_correct
from benchmarks.flags import PRECISIONS
from ops import selective_scan
from ops.selective_scan import BranchParams
from utils import arguments
from utils.errors import UserError, first_line
from utils.files import write_json
from utils.program import run_main
from utils.tables import text_table
from utils.timing import interleaved

# Largest error of a tensor relative to its largest element: float32 sums over 197 steps; otherwise
# a few roundings.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}
CHECKED = 2  # images compared with the definition
# Under autograd these take up to a minute a step.
SLOW_TO_TRAIN = ("sequential loop", "sequential loop, einsum", "transformers")


def parse_args() -> argparse.Namespace:
    parser = flags.build_parser("ops.py", __doc__)
    flags.add_precision(parser, "fp32")
    parser.add_argument("--batch", type=arguments.positive, default=16)
    parser.add_argument("--tokens", type=arguments.positive, default=197)
    parser.add_argument(
        "--width", type=arguments.positive, default=384, help="d of the model; Vim-S has 384"
    )
    parser.add_argument("--states", type=arguments.positive, default=16)
    parser.add_argument("--passes", default="both", choices=("forward", "train", "both"))
    flags.add_rounds(parser, 15)
    flags.add_retries(parser, 60)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile too, which takes minutes to compile",
    )
    parser.add_argument(
        "--slow", action="store_true", help=f"train also {'; '.join(SLOW_TO_TRAIN)}"
    )
    return flags.parse(parser)


def random_params(channels: int, states: int, rank: int, device: str) -> BranchParams:
    """As in a new model: steps between 1e-3 and 0.1, A = -(1 ... N)."""
    delta = torch.exp(torch.empty(channels).uniform_(-6.9, -2.3))
    params = BranchParams(
        torch.randn(channels, 4) * 0.4,
        torch.randn(channels) * 0.1,
        torch.randn(rank + 2 * states, channels) * channels**-0.5,
        torch.randn(channels, rank) * rank**-0.5,
        torch.log(torch.expm1(delta)),
        -torch.arange(1.0, states + 1).repeat(channels, 1),
        torch.randn(channels),
    )
    return BranchParams(*(p.to(device).requires_grad_() for p in params))


def backend(name: str, xz: Tensor, forward: BranchParams, backward: BranchParams) -> Tensor:
    os.environ["DYVM_BACKEND"] = name
    return selective_scan.bidirectional_ssm(xz, forward, backward, scale=0.5)


def all_rivals(
    xz: Tensor, forward: BranchParams, backward: BranchParams, compiled: bool = True
) -> dict[str, rivals.Rival]:
    """The functions that run here, by name; `compiled`: torch.compile among them."""
    contenders: dict[str, Callable | None] = {}
    for name in selective_scan.PREFERENCE:
        os.environ["DYVM_BACKEND"] = name
        try:
            selective_scan.backend_for(xz, forward)
        except selective_scan.BackendError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        contenders[f"backend {name}"] = partial(backend, name)
    contenders["sequential loop"] = contenders.pop("backend reference")
    ours = set(contenders)
    mambapy = rivals.mambapy_scan()
    contenders |= {
        "sequential loop, einsum": rivals.with_core(rivals.einsum_loop),
        "chunked PyTorch": rivals.with_core(rivals.chunked(rivals.chunk_steps)),
        "mambapy": None if mambapy is None else rivals.with_core(mambapy),
        "transformers": rivals.transformers_mixer(forward, backward),
    }
    if compiled:
        contenders["torch.compile"] = rivals.with_core(rivals.compiled_chunks())
    for name in [name for name, rival in contenders.items() if rival is None]:
        print(f"left out: {name} is not installed", file=sys.stderr)
        del contenders[name]
    precise = xz.dtype == torch.float32
    return {
        name: rival if precise or name in ours else autocasting(rival, xz)
        for name, rival in contenders.items()
    }


def autocasting(rival: rivals.Rival, xz: Tensor) -> rivals.Rival:
    """A rival that supports one dtype only, in the precision of xz, with float32 weights."""

    def call(*arguments) -> Tensor:
        with torch.autocast(xz.device.type, dtype=xz.dtype):
            return rival(*arguments)

    return call


def gradients(
    rival: rivals.Rival, xz: Tensor, forward: BranchParams, backward: BranchParams, grad_out: Tensor
) -> list[Tensor | None]:
    """Output and gradients of xz and all weights (None if the rival keeps copies of them)."""
    leaf = xz.detach().clone().requires_grad_()
    y = rival(leaf, forward, backward)
    return [
        y.detach(),
        *torch.autograd.grad(
            y, (leaf, *forward, *backward), grad_out.to(y.dtype), allow_unused=True
        ),
    ]


def worst_error(actual: list[Tensor | None], expected: list[Tensor]) -> float:
    """Largest error of any tensor, relative to its largest element; infinite for nan."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a is not None:
            error = ((a[: len(e)].double() - e).abs().max() / e.abs().max()).item()
            worst = max(worst, error if error == error else float("inf"))
    return worst


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the host's memory was too small.

    The host's allocator raises a plain RuntimeError.
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(
        error
    )


def measure(args: argparse.Namespace, train: bool) -> dict[str, dict]:
    """{rival: {"error", "ms", ...}}, and the layer's matrix products besides."""
    torch.manual_seed(0)
    channels, rank, dtype = 2 * args.width, -(-args.width // 16), PRECISIONS[args.precision]
    xz = torch.randn(args.batch, args.tokens, 2 * channels, device=args.device).to(dtype)
    forward, backward = (random_params(channels, args.states, rank, args.device) for _ in range(2))
    grad_out = torch.randn(args.batch, args.tokens, channels, device=args.device)
    contenders = all_rivals(xz, forward, backward, args.compile)
    if train and not args.slow:
        contenders = {
            name: rival for name, rival in contenders.items() if name not in SLOW_TO_TRAIN
        }

    # a gradient from the checked images alone, so that the weights' gradients are theirs too
    checked_grad = grad_out.clone()
    checked_grad[CHECKED:] = 0
    exact = [
        BranchParams(*(p.detach().double().requires_grad_() for p in params))
        for params in (forward, backward)
    ]
    expected = gradients(
        rivals.sequential_loop, xz[:CHECKED].double(), *exact, grad_out[:CHECKED].double()
    )
    results, calls = {}, {}
    for name, rival in contenders.items():
        call = (
            partial(gradients, rival, xz, forward, backward, grad_out)
            if train
            else torch.no_grad()(partial(rival, xz, forward, backward))
        )
        try:
            error = worst_error(
                gradients(rival, xz, forward, backward, checked_grad) if train else [call()],
                expected if train else expected[:1],
            )
        except (RuntimeError, MemoryError) as failure:
            if name.startswith("backend ") and not out_of_memory(failure):
                raise  # of our own
            reason = (
                "does not fit the memory"
                if out_of_memory(failure)
                else f"fails ({first_line(failure)})"
            )
            print(f"left out: {name} {reason}", file=sys.stderr)
            continue
        results[name], calls[name] = {"error": error}, call
        if error > TOLERANCES[args.precision]:
            del calls[name]
    calls["in_proj + out_proj"] = block_products(args, train)
    for call in calls.values():
        call()
    timed = interleaved(calls, args.device, args.rounds, retries=args.retries, long=1.0)
    for name, times in timed.items():
        results.setdefault(name, {}).update(times)
    return results


def block_products(args: argparse.Namespace, train: bool) -> Callable[[], object]:
    """The mixer's in_proj and out_proj alone, with their backward products when training."""
    dtype, width = PRECISIONS[args.precision], args.width
    x = torch.randn(
        args.batch, args.tokens, width, device=args.device, dtype=dtype, requires_grad=train
    )
    y = torch.randn(
        args.batch, args.tokens, 2 * width, device=args.device, dtype=dtype, requires_grad=train
    )
    in_proj = torch.nn.Linear(width, 4 * width, bias=False, device=args.device, dtype=dtype)
    out_proj = torch.nn.Linear(2 * width, width, bias=False, device=args.device, dtype=dtype)
    grads = torch.ones(*x.shape[:2], 4 * width, device=args.device, dtype=dtype), torch.ones_like(x)

    def call() -> None:
        with torch.set_grad_enabled(train):
            outputs = in_proj(x), out_proj(y)
            if train:
                torch.autograd.grad(
                    outputs, (x, y, *in_proj.parameters(), *out_proj.parameters()), grads
                )

    return call


def table(results: dict[str, dict], fastest: str) -> str:
    base = results[fastest]
    rows = []
    for name, r in sorted(results.items(), key=lambda item: item[1].get("ms", float("inf"))):
        error = f"{r['error']:.1e}" if "error" in r else ""
        if "ms" not in r or "ms" not in base:
            ms = "WRONG" if "ms" not in r else f"{r['ms']:.1f}"
            rows.append((name, ms, "", "", "", error, "", ""))
            continue
        rows.append(
            (
                name,
                f"{r['ms']:.1f}",
                f"{r['ms'] / base['ms']:.2f}",
                f"{r['cpu_ms']:.1f}",
                f"{r['cpu_ms'] / base['cpu_ms']:.2f}",
                error,
                r["samples"],
                r["disturbed"],
            )
        )
    headers = ("", "ms", f"x {fastest}", "processor ms", "x", "worst error", "samples", "disturbed")
    return text_table(rows, headers)


def main() -> None:
    args = parse_args()
    record = {
        **records.head("ops.py", args.device, *rivals.PACKAGES),
        "precision": args.precision,
        "batch": args.batch,
        "tokens": args.tokens,
        "channels": 2 * args.width,
        "states": args.states,
    }
    wrong = []
    for name, train in (("forward", False), ("forward + backward", True)):
        if args.passes not in ("both", "train" if train else "forward"):
            continue
        record[name] = measure(args, train)
        ours = next((rival for rival in record[name] if rival.startswith("backend ")), None)
        if ours is None:
            raise UserError(
                f"{name}: no backend fits the memory at --batch {args.batch}; give a smaller one"
            )
        print(
            f"\n{name}: B {args.batch}, L {args.tokens}, E {2 * args.width}, N {args.states}, "
            f"{args.precision}, {record['device']}, {record['threads']} threads\n"
            f"{table(record[name], ours)}",
            flush=True,
        )
        wrong += [rival for rival, result in record[name].items() if "ms" not in result]
        if args.output:
            write_json(args.output, record)
    require_correct(wrong, TOLERANCES[args.precision])


if __name__ == "__main__":
    run_main(main)
