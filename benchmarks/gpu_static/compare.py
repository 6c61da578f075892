"""Two records of report.py in one table: kernels and whole models, before and now. Computed, not
measured.

    python benchmarks/gpu_static/compare.py [--before FILE] [--now FILE]

Kernels are those of a layer of Vim-S in bf16; cycles of an SM for a warp step (one token, 32
channels, 16 states, one direction), with data from the L2 cache and from memory.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu_static.report import CUDA, markdown
from utils import arguments
from utils.errors import UsageError
from utils.program import run_main

RESULTS = Path(__file__).resolve().parents[1] / "results"
BEFORE, NOW = "before", "now"
KERNELS = (  # what, kernel, phase, records
    ("forward", "scan_forward", "evaluation 256", (BEFORE, NOW)),
    ("forward, keeping states", "scan_forward", "training 256", (BEFORE, NOW)),
    ("few images, first pass", "piece_ends", "evaluation 1", (NOW,)),
    ("few images, second pass", "scan_pieces", "evaluation 1", (NOW,)),
    ("backward in Triton", "scan_backward", "training 256", (BEFORE, NOW)),
    ("backward in CUDA C++", CUDA, "training 256", (NOW,)),
)
FIGURES = ("registers", "stack", "warps_of_an_sm", "instructions", "barriers")
Record = dict[str, Any]


def kernel_table(records: dict[str, Record]) -> str:
    headers = ("kernel", "sm", "", "registers", "stack", "warps/SM", "instructions", "barriers")
    headers += ("L2", "memory", "one warp alone")
    lines = []
    for capability in sorted({row["capability"] for row in records[NOW]["kernels"]}):
        for what, kernel, phase, when in KERNELS:
            for name in when:
                row = next(
                    row
                    for row in records[name]["kernels"]
                    if (row["kernel"], row["capability"]) == (kernel, capability)
                    and phase in row["phases"]
                )
                figures = [row[figure] for figure in FIGURES]
                figures += [*row["sm_cycles"].values(), row["alone"]]
                cells = [f"{figure:.0f}" for figure in figures]
                lines.append([what, str(capability), name, *cells])
    return markdown(lines, headers)


def model_table(records: dict[str, Record]) -> str:
    """Milliseconds, and how many times as fast as DeiT-S."""

    def times(record: Record) -> dict[tuple, float]:
        keys = ("model", "pass", "card", "pixels", "batch")
        return {tuple(row[key] for key in keys): row["ms"] for row in record["models"]}

    found = {name: times(record) for name, record in records.items()}
    lines = []
    for key, now in found[NOW].items():
        model, *size = key
        if model == "DeiT-S":
            continue
        both = {BEFORE: found[BEFORE].get(key), NOW: now}
        known = {name: ms for name, ms in both.items() if ms is not None}
        ms = [f"{known[name]:.2f}" if name in known else "" for name in both]
        deit = ("DeiT-S", *size)
        ratios = [
            f"{found[name][deit] / known[name]:.2f}" if name in known else "" for name in both
        ]
        lines.append([*map(str, key), *ms, *ratios])
    headers = ("model", "pass", "card", "pixels", "batch", "ms before", "ms now")
    return markdown(lines, (*headers, "x DeiT-S before", "x DeiT-S now"))


def read(path: Path, flag: str) -> Record:
    try:
        record = json.loads(path.read_bytes())
        whole = bool(record["kernels"] and record["models"])
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UsageError(f"{flag} {path} is no record of whole models by gpu_static/report.py")
    return record


def main() -> None:
    parser = arguments.OneLineParser(
        prog="benchmarks/gpu_static/compare.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, file in ((BEFORE, "gpu_static_before.json"), (NOW, "gpu_static.json")):
        parser.add_argument(
            f"--{name}", type=Path, default=RESULTS / file, metavar="FILE", help=f"default: {file}"
        )
    args = parser.parse_args()
    records = {BEFORE: read(args.before, "--before"), NOW: read(args.now, "--now")}
    print(kernel_table(records), model_table(records), sep="\n\n")


if __name__ == "__main__":
    run_main(main)
