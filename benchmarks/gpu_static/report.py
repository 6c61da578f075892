"""What the compiler makes of the GPU kernels, and what a GPU would take for them: computed, not
measured. Needs Triton, no GPU.

    python benchmarks/gpu_static/report.py --output benchmarks/results/gpu_static.json
    python benchmarks/gpu_static/report.py --architectures 90 --kernels scan_forward
    python benchmarks/gpu_static/report.py --cubin scan_backward FILE    # by another compiler

Every kernel is compiled as the host code launches it for a layer of Vim-S in bf16, its loops run on
a model of an SM (simulator.py), and whole models are put together from that (bounds.py). Read the
times as +-25 %. The kernels' interpreter (TRITON_INTERPRET) must be off.
"""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import records
from benchmarks.gpu_static import bounds, compiling, kernels
from ops import triton_support
from utils import arguments
from utils.errors import UsageError, UserError
from utils.files import write_json
from utils.program import run_main

COMPUTED = "computed, not measured"
CHANNELS, STATES, DTYPE, IMAGES = 768, 16, torch.bfloat16, 2
# Which kernels of which phase the whole models are made of.
SCANS = {
    "forward": ("scan_forward", "evaluation"),
    "keeping": ("scan_forward", "training"),
    "backward": ("scan_backward", "training"),
}


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
        "--cubin",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FILE"),
        help="a kernel of sm_90 compiled elsewhere, of one warp a block; it takes the place of "
        "Triton's kernel of that name",
    )
    parser.add_argument(
        "--small-launches",
        nargs=2,
        type=arguments.whole,
        metavar=("VIM", "DYVM"),
        help="kernels of a layer that only prepare weights and routing, default: "
        + " ".join(map(str, bounds.SMALL_LAUNCHES.values())),
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the record as JSON")
    args = parser.parse_args()
    unknown = [a for a in args.architectures if a not in kernels.CHIPS]
    if unknown:
        known = ", ".join(map(str, kernels.CHIPS))
        raise UsageError(f"--architectures {unknown[0]}: known are {known}")
    return args


def analyse(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """`kernels.figures` of every kernel, with its phases, constants and warps for an image."""
    launches = kernels.launches(CHANNELS, STATES, DTYPE)
    wanted = args.kernels or [launch.name for _, launch in launches]
    given = {name for name, _ in args.cubin}
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for capability in args.architectures:
        for phase, launch in launches:
            if launch.name not in wanted or (capability == 90 and launch.name in given):
                continue
            code = compiling.compiled(launch, capability)
            key = capability, launch.name + hashlib.sha256(code).hexdigest()
            if key not in rows:
                path = folder / "kernel.cubin"
                path.write_bytes(code)
                rows[key] = {"phases": []} | kernels.figures(
                    launch.name, path, launch.warps, capability, STATES
                )
                rows[key]["constants"] = launch.constants
                warps = launch.warps * torch.tensor(launch.grid).prod().item()
                rows[key]["warps_of_an_image"] = warps / IMAGES
                print(f"sm_{capability} {launch.name}, {phase}", file=sys.stderr, flush=True)
            if phase not in rows[key]["phases"]:
                rows[key]["phases"].append(phase)
    return [*rows.values(), *(from_elsewhere(name, Path(path)) for name, path in args.cubin)]


def from_elsewhere(name: str, path: Path) -> dict[str, Any]:
    """The figures of a compiled kernel of sm_90, one warp a block for 32 channels of a direction;
    this is where kernels that are not Triton's come in.
    """
    if not path.is_file():
        raise UsageError(f"--cubin {name} {path}: there is no such file")
    phases = [phase for kernel, phase in SCANS.values() if kernel == name] or ["training"]
    return (
        {"phases": phases}
        | kernels.figures(name, path, 1, 90, STATES)
        | {"constants": {}, "warps_of_an_image": 2 * CHANNELS / 32}
    )


def scans_of(rows: list[dict[str, Any]]) -> dict[str, bounds.Scan]:
    """Those of sm_90 that the whole models need; of several in one phase the cheapest."""
    found = {}
    for use, (name, phase) in SCANS.items():
        fitting = [
            row
            for row in rows
            if row["kernel"] == name and phase in row["phases"] and row["capability"] == 90
        ]
        if fitting:
            row = min(fitting, key=lambda row: row["sm_cycles"]["HBM"])
            found[use] = bounds.Scan(
                row["sm_cycles"], row["alone"], row["warps_of_an_sm"], row["warps_of_an_image"]
            )
    return found


def kernel_table(rows: list[dict[str, Any]]) -> str:
    headers = (
        "kernel", "phase", "sm", "registers", "stack", "shared", "warps/SM", "per",
        "instructions", "special", "shared and global memory", "barriers", "issue bound",
        "SM-cycles, L2", "HBM", "one warp alone, cycles",
    )  # fmt: skip
    cells = [
        [
            row["kernel"].strip("_"),
            ", ".join(row["phases"]),
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
    scans = scans_of(rows)
    if "forward" in scans:
        small = bounds.SMALL_LAUNCHES
        if args.small_launches:
            small = dict(zip(small, args.small_launches, strict=True))
        record |= {"small_launches": small, "models": bounds.models(scans, small)}
        record["mamba_ssm_us_of_an_image"] = bounds.MAMBA_SSM
        print(f"\n# Whole models: {COMPUTED}\n\n{model_table(record['models'])}")
    if args.output:
        write_json(args.output, record)


if __name__ == "__main__":
    run_main(main)
