"""What the compiler makes of the GPU kernels, and what a GPU would take for them: computed, not
measured. Needs Triton, no GPU.

    python benchmarks/gpu_static/report.py --output benchmarks/results/gpu_static.json
    python benchmarks/gpu_static/report.py --architectures 90 --kernels scan_forward

Every kernel is compiled as the host code launches it for a layer of Vim-S in bf16, that in CUDA C++
by NVRTC (`scan_backward_cuda`), its loops run on a model of an SM (simulator.py), and whole models
are put together from that (bounds.py). Read the times as +-25 %. The peak memory of a training step
is counted (step_memory.py). The kernels' interpreter (TRITON_INTERPRET) must be off.
"""

import argparse
import hashlib
import math
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import flags, records
from benchmarks.gpu_static import bounds, compiling, kernels, step_memory
from benchmarks.memory import mebibytes
from models.flops import count_flops
from ops import triton_support
from ops.selective_scan.gpu import cuda
from utils import arguments
from utils.errors import UsageError, UserError
from utils.files import write_json
from utils.program import run_main

COMPUTED = "computed, not measured"
BATCH = 256  # of a training step
CHANNELS, STATES, DTYPE = 768, 16, torch.bfloat16
FORWARD = "scan_forward", "piece_ends", "scan_pieces"
CUDA = "scan_backward_cuda"


def parse_args() -> argparse.Namespace:
    parser = arguments.OneLineParser(
        prog="benchmarks/gpu_static/report.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--architectures",
        nargs="+",
        type=int,
        default=[80, 90, 100],
        help="compute capabilities, default: 80 90 100",
    )
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument(
        "--output", type=flags.record_file, metavar="FILE", help="write the record as JSON"
    )
    args = parser.parse_args()
    unknown = [a for a in args.architectures if a not in kernels.CHIPS]
    if unknown:
        known = ", ".join(map(str, kernels.CHIPS))
        raise UsageError(f"--architectures {unknown[0]}: known are {known}")
    return args


def analyse(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """`kernels.figures` of every kernel; "phases": {phase: warps for an image}."""
    launches = kernels.launches(CHANNELS, STATES, DTYPE)
    wanted = args.kernels or [CUDA, *(launch.name for _, launch in launches)]
    path = folder / "kernel.cubin"
    rows: dict[tuple[int, str], dict[str, Any]] = {}

    def analysed(name: str, code: bytes, warps: int, capability: int, what: str) -> dict[str, Any]:
        key = capability, name + hashlib.sha256(code).hexdigest()
        if key not in rows:
            print(f"sm_{capability} {name}, {what}", file=sys.stderr, flush=True)
            path.write_bytes(code)
            found = kernels.figures(name, path, warps, capability, STATES)
            rows[key] = {"phases": {}, "constants": {}} | found
        return rows[key]

    for capability in args.architectures:
        for phase, launch in launches:
            if launch.name in wanted:
                code = compiling.compiled(launch, capability)
                row = analysed(launch.name, code, launch.warps, capability, str(phase))
                row["constants"] = launch.constants
                row["phases"][str(phase)] = launch.warps * math.prod(launch.grid) / phase.images
        if CUDA in wanted:
            code = cuda.program(DTYPE, False, divmod(capability, 10))
            row = analysed(CUDA, code, 1, capability, "training")
            for phase in kernels.PHASES:
                if phase.kind == "training":
                    row["phases"][str(phase)] = 2 * CHANNELS / 32
    return list(rows.values())


def scans_of(
    rows: list[dict[str, Any]], capability: int, names: tuple[str, ...], phase: str
) -> bounds.Scans:
    """Those of the kernels that a phase launches, as whole models are made of them."""
    return [
        bounds.Scan(
            row["sm_cycles"],
            row["alone"],
            row["warps_of_an_sm"],
            row["phases"][phase],
            joined=row["kernel"] == "scan_pieces",
        )
        for row in rows
        if row["kernel"] in names and phase in row["phases"] and row["capability"] == capability
    ]


def whole_models(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`bounds.models` of the capabilities that have all of the scan's kernels."""
    found = {}
    for capability in {row["capability"] for row in rows}:
        scans = partial(scans_of, rows, capability)
        evaluation = {
            phase.images: scans(FORWARD, str(phase))
            for phase in kernels.PHASES
            if phase.kind == "evaluation"
        }
        backward = scans((CUDA,), "training 256") or scans(("scan_backward",), "training 256")
        if all(evaluation.values()):
            forward = scans(FORWARD, "training 256")
            found[capability] = bounds.Kernels(evaluation, forward, backward)
    return bounds.models(found)


def flops_ratio() -> float:
    """Operations of Vim-S over those of DyVM-S, at the ratios that bounds.py takes."""
    dense = timm.create_model("vim_small")
    dynamic = timm.create_model("dyvm_vim_small", token_keep=bounds.TOKEN_KEEP)
    return count_flops(dense).exact / count_flops(dynamic, bounds.BLOCK_KEEP).exact


def shown(phases: dict[str, float]) -> str:
    """evaluation 1 32 256, training 256"""
    batches: dict[str, list[str]] = {}
    for phase in phases:
        kind, images = phase.split()
        batches.setdefault(kind, []).append(images)
    return ", ".join(f"{kind} {' '.join(images)}" for kind, images in batches.items())


def kernel_table(rows: list[dict[str, Any]]) -> str:
    headers = (
        "kernel", "pass and batch", "sm", "registers", "stack", "shared", "warps/SM", "per",
        "instructions", "special", "shared and global memory", "barriers", "issue bound",
        "SM-cycles, L2", "HBM", "one warp alone, cycles",
    )  # fmt: skip
    cells = [
        [
            row["kernel"].strip("_"),
            shown(row["phases"]),
            str(row["capability"]),
            *(str(row[name]) for name in ("registers", "stack", "shared", "warps_of_an_sm")),
            row["unit"],
            *(f"{row[name]:.0f}" for name in ("instructions", "special", "memory", "barriers")),
            *(f"{x:.0f}" for x in (row["issue_bound"], *row["sm_cycles"].values(), row["alone"])),
        ]
        for row in rows
    ]
    return markdown(cells, headers)


def model_table(rows: list[dict[str, Any]]) -> str:
    deit = {
        (r["card"], r["pixels"], r["batch"], r["pass"]): r["ms"]
        for r in rows
        if r["model"] == "DeiT-S"
    }
    cells = [
        [
            row["model"],
            row["pass"],
            row["card"],
            *(str(row[name]) for name in ("pixels", "batch")),
            f"{row['ms']:.2f}",
            f"{row['images_per_s']:,.0f}",
            f"{deit[row['card'], row['pixels'], row['batch'], row['pass']] / row['ms']:.2f}",
        ]
        for row in rows
    ]
    headers = ("model", "pass", "card", "pixels", "batch", "ms", "images/s", "x DeiT-S")
    return markdown(cells, headers)


def memory_table(peaks: dict[str, int]) -> str:
    first = next(iter(peaks.values()))
    cells = [[name, mebibytes(peak), f"{peak / first:.2f}"] for name, peak in peaks.items()]
    return markdown(cells, (f"step, batch {BATCH}", "MiB", "x first"))


def markdown(rows: list[list[str]], headers: tuple[str, ...]) -> str:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    args = parse_args()
    if (reason := triton_support.refusal(anywhere=True)) is not None:
        raise UserError(reason)
    if triton_support.interpreted():
        raise UserError("TRITON_INTERPRET is set, and interpreted kernels do not compile: unset it")
    with tempfile.TemporaryDirectory() as folder:
        rows = analyse(args, Path(folder))
    if not rows:
        raise UsageError(
            f"--kernels {' '.join(args.kernels)}: the host code launches no such kernel"
        )
    record = {"what": COMPUTED, **records.head("gpu_static/report.py", "cpu"), "kernels": rows}
    print(f"# Kernels of Vim-S in bf16: {COMPUTED}\n\n{kernel_table(rows)}")
    if models := whole_models(rows):
        record |= {"small_launches": bounds.SMALL_LAUNCHES, "models": models}
        record["mamba_ssm_us_of_an_image"] = bounds.MAMBA_SSM
        record["flops_ratio"] = flops_ratio()
        print("peak memory of a DyVM step", file=sys.stderr, flush=True)
        peaks = step_memory.dyvm_step(BATCH)
        record["dyvm_step_peak"] = {"batch": BATCH, "bytes": peaks}
        print(f"\n# Whole models: {COMPUTED}\n\n{model_table(models)}")
        print(f"\n# Peak memory of a DyVM-S training step: {COMPUTED}\n\n{memory_table(peaks)}")
    if args.output:
        write_json(args.output, record)


if __name__ == "__main__":
    run_main(main)
