"""Random calls of the CPU kernels, to be run under the address sanitizer; not collected by pytest.

    ASAN=$(g++ -print-file-name=libasan.so)
    export LD_PRELOAD=$ASAN ASAN_OPTIONS=detect_leaks=0 OMP_WAIT_POLICY=passive DYVM_BACKEND=cpu
    python tests/helpers/fuzz_cpu_kernel.py --calls 10000

Without the preloaded sanitizer the script refuses to run. Every call draws sizes, flags, strides
and types; forward and, for half of the calls, backward. All tensors that the kernels read or write
come from malloc, so that a step beyond any of them is seen. The outputs must be finite. Prints a
summary as JSON.
"""

import argparse
import ctypes
import json
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ops.selective_scan import BranchParams, bidirectional_ssm, cpu, ssm_branch  # noqa: E402
from ops.selective_scan.cpu import build, library  # noqa: E402


def random_params(channels: int, states: int, rank: int) -> BranchParams:
    return BranchParams(
        torch.randn(channels, 4) * 0.4,
        torch.randn(channels) * 0.1,
        torch.randn(rank + 2 * states, channels) * channels**-0.5,
        torch.randn(channels, rank) * rank**-0.5,
        torch.randn(channels) - 2,
        -torch.exp(torch.randn(channels, states)),
        torch.randn(channels),
    )


def in_other_form(params: BranchParams, draw: random.Random) -> BranchParams:
    """The same weights, some of them strided or in bfloat16."""

    def other(tensor: torch.Tensor) -> torch.Tensor:
        form = draw.choice(["as it is", "strided", "bfloat16"])
        if form == "strided":
            return torch.stack((tensor, tensor + 1), -1)[..., 0]
        return tensor.bfloat16() if form == "bfloat16" else tensor

    return BranchParams(*map(other, params))


def random_call(draw: random.Random, counts: dict[str, int]) -> None:
    """One call of ssm_branch or bidirectional_ssm, with what it drew counted."""
    images, tokens = (
        draw.randint(0, 5),
        draw.choice([0, 1, 2, 3, 4, 15, 16, 17, 31, 33, draw.randint(1, 70)]),
    )
    channels = draw.choice([draw.randint(1, 70), draw.randint(1, 290)])
    states = draw.choice([1, 2, 3, 4, 5, 8, 11, 16, 17, 20, 33])
    sizes = (channels, states, draw.choice([draw.randint(1, 9), draw.randint(1, 26)]))
    dtype = draw.choice([torch.float32] * 4 + [torch.bfloat16, torch.float16])
    flags = {
        name: draw.random() < 0.5
        for name in (
            "backward",
            "both directions",
            "mask",
            "in place",
            "active",
            "lengths",
            "gates",
            "strided",
            "reverse",
            "weights",
        )
    }
    flags["gates"] &= flags["both directions"]
    flags["reverse"] &= not flags["both directions"]
    flags["in place"] &= flags["mask"]
    xz = torch.randn(images, tokens, 2 * channels)
    if flags["strided"]:
        xz = xz.transpose(1, 2).contiguous().transpose(1, 2)
    xz = xz.to(dtype).requires_grad_(flags["backward"])
    options = {"in_place": flags["in place"]}
    if flags["mask"]:
        kept = torch.randint(0, tokens + 1, (images, 1))
        prefix = (torch.arange(tokens) < kept).float()
        options["mask"] = (
            prefix if draw.random() < 0.5 else prefix * (torch.rand(images, tokens) < 0.7)
        )
        options["mask"].requires_grad_(flags["backward"])
    if flags["lengths"]:
        options["lengths"] = torch.randint(
            0, tokens + 1, (images,), dtype=draw.choice([torch.int32, torch.int64])
        )
    if flags["active"]:
        options["active"] = torch.rand(images, *((2,) if flags["both directions"] else ())) < 0.6
    params = [random_params(*sizes) for _ in range(1 + flags["both directions"])]
    if flags["weights"]:
        params = [in_other_form(branch, draw) for branch in params]
    if flags["both directions"]:
        if flags["gates"]:
            options["gates"] = torch.rand(images, 2).round().requires_grad_(flags["backward"])
        y = bidirectional_ssm(xz, *params, **options)
    else:
        y = ssm_branch(xz, *params, reverse=flags["reverse"], **options)
    assert y.shape == (images, tokens, channels) and y.isfinite().all()
    if flags["backward"]:
        weights = torch.randn_like(y)
        if flags["mask"] and draw.random() < 0.5:
            weights = weights * prefix.unsqueeze(-1).to(dtype)
        y.backward(weights)
        assert xz.grad.isfinite().all()
    flags["weights strided or bfloat16"] = flags.pop("weights")
    for name, value in {**flags, str(dtype): True, "no rows": xz.numel() == 0}.items():
        counts[name] = counts.get(name, 0) + value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--flags",
        default="-fsanitize=address -fno-omit-frame-pointer -g",
        help="compiler flags added to the kernels' own",
    )
    args = parser.parse_args()
    if "-fsanitize=address" in args.flags and not hasattr(
        ctypes.CDLL(None), "__asan_region_is_poisoned"
    ):
        raise SystemExit(
            "error: the address sanitizer is not loaded; see the head of this file for the command"
        )
    path = build.library_path(tuple(args.flags.split()))
    build.library_path = lambda: path
    assert cpu.available() is None
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    draw, counts, start = random.Random(args.seed), {}, time.time()
    for _ in range(args.calls):
        random_call(draw, counts)
    print(
        json.dumps(
            {
                "calls": args.calls,
                "seed": args.seed,
                "flags": args.flags,
                "library": path.name,
                "errors": 0,
                "seconds": round(time.time() - start),
                "lanes": library.kernels().lanes(),
                "torch": torch.__version__,
                "calls with": dict(sorted(counts.items())),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
