"""Whether the layout that the GPU scan chooses by rule is the fastest one.

    python benchmarks/gpu_plan.py [--device cuda] [--batch 1 2 4 8 16 32 64 128 256]
        [--tokens 197 1025] [--channels 768] [--active 1.0 0.8] [--seconds 0.2] [--output FILE]

Each case is scanned in every number of pieces (ops/selective_scan/gpu/plan.py), timed in turn, and
in CUDA graphs on a GPU: at few images the host is slower than the kernels. The results of all
pieces are compared first. `share of best` is the fastest time divided by that of the rule's choice:
1 where the rule is right. `--active`: share of the scans that run, as a router leaves them.

Without a GPU it runs in Triton's interpreter (TRITON_INTERPRET=1), whose times say nothing.
"""

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import flags, records
from benchmarks.ops import random_params
from ops import triton_support
from ops.cuda_graphs import capture
from ops.selective_scan import KeptParams
from utils import arguments
from utils.errors import UserError
from utils.files import write_json
from utils.program import run_main
from utils.tables import text_table
from utils.timing import interleaved

STATES = 16
PIECES = 0, 1, 2, 4, 8, 16, 32, 64  # 0: one program walks both directions from end to end
TOLERANCE = {"fp32": 1e-5, "bf16": 1.6e-2, "fp16": 2e-3}  # of the largest output


@torch.no_grad()
def measure(batch: int, tokens: int, share: float, args) -> dict[str, Any]:
    """One case: {"batch", "tokens", "active", "chosen", "us": {pieces: time}, "share_of_best"}."""
    from ops.selective_scan import gpu
    from ops.selective_scan.gpu import plan

    generator = torch.Generator().manual_seed(0)
    active = (torch.rand(batch, 2, generator=generator) < share).to(args.device)
    xz = torch.randn(batch, tokens, 2 * args.channels, device=args.device)
    xz = xz.to(flags.PRECISIONS[args.precision])
    directions = [
        KeptParams(*random_params(args.channels, STATES, max(1, args.channels // 32), args.device))
        for _ in range(2)
    ]

    def scan(pieces: int | None, xz: Tensor) -> Tensor:
        """In so many pieces, None: as the rule has it."""
        if pieces is None:
            return gpu.bidirectional_ssm(xz, *directions, active=active, scale=0.5)
        with mock.patch.object(plan, "best_pieces", lambda *sizes: pieces):
            return gpu.bidirectional_ssm(xz, *directions, active=active, scale=0.5)

    chosen = plan.plan(xz.device, batch, args.channels, tokens, 2).pieces
    choices = sorted({chosen, *(pieces for pieces in PIECES if 8 * pieces <= tokens)})
    wanted = scan(0, xz).float()
    calls = {}
    for pieces in choices:
        found = scan(pieces, xz).float()
        error = ((found - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= TOLERANCE[args.precision]:
            raise UserError(
                f"batch {batch}, {tokens} tokens: {pieces} pieces differ from one program by "
                f"{error:.1e} of the largest output; no speed is reported"
            )
        run = partial(scan, pieces)
        if args.device == "cuda":
            run = capture(run, xz)
        calls[pieces] = partial(run, xz)
    times = interleaved(calls, args.device, args.rounds, args.seconds)
    us = {pieces: 1e3 * row["ms"] for pieces, row in times.items()}
    return {
        "batch": batch,
        "tokens": tokens,
        "active": share,
        "chosen": chosen,
        "us": us,
        "share_of_best": min(us.values()) / us[chosen],
    }


def main() -> None:
    parser = flags.build_parser("gpu_plan.py", __doc__)
    parser.add_argument(
        "--batch", type=arguments.positive, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256]
    )
    parser.add_argument("--tokens", type=arguments.positive, nargs="+", default=[197, 1025])
    parser.add_argument("--channels", type=arguments.positive, default=768, help="default: 768")
    parser.add_argument("--active", type=arguments.probability, nargs="+", default=[1.0, 0.8])
    flags.add_precision(parser)
    flags.add_rounds(parser, 5)
    flags.add_seconds(parser, 0.2)
    args = flags.parse(parser)
    reason = triton_support.refusal()
    if reason is not None:
        raise UserError(
            f"the kernels cannot run here: {reason}; in the interpreter also give --device cpu"
        )
    torch.manual_seed(0)
    cases = []
    for tokens, share, batch in itertools.product(args.tokens, args.active, args.batch):
        cases.append(measure(batch, tokens, share, args))
        if args.output:
            head = records.head("gpu_plan.py", args.device)
            write_json(args.output, {**head, "channels": args.channels, "cases": cases})
    rows = [
        [
            *(str(case[name]) for name in ("tokens", "active", "batch", "chosen")),
            f"{case['us'][case['chosen']]:.1f}",
            str(min(case["us"], key=case["us"].get)),
            f"{min(case['us'].values()):.1f}",
            f"{case['share_of_best']:.2f}",
        ]
        for case in cases
    ]
    headers = ["tokens", "active", "batch", "rule", "us", "fastest", "us", "share of best"]
    print(text_table(rows, headers))
    print(f"{args.channels} channels; all results equal within {TOLERANCE[args.precision]:g}")


if __name__ == "__main__":
    run_main(main)
