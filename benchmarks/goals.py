"""Measurements of Vim-S and DyVM-S (`scripts/gpu_check.sh`) beside goals and hardware limits.

    python benchmarks/goals.py FOLDER --output FOLDER/goals.json

FOLDER holds model-s.json, model-s-512.json and train.json; what is missing or wrong counts as not
measured. Of the ways to run one model (eager, compiled, in a CUDA graph) the fastest counts, for
DeiT too.

The limits are those of an H200 at 224 pixels in bf16, computed for fused kernels: matrix products
at 790 TFLOP/s (measured), 16 special functions per clock and SM for the exponentials of the scan,
memory at 4.3 TB/s.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.arguments import OneLineParser
from utils.errors import UsageError
from utils.files import write_json
from utils.program import run_main
from utils.tables import text_table

BATCH = 256
# Images per second at most: a forward pass, and a training step of the dense models.
LIMITS = {
    "forward": {"Vim-S": 18_000, "DyVM-S": 32_000, "DeiT-S": 37_700},
    "train": {"Vim-S": 5_000, "DeiT-S": 12_500},
}
OURS = ("", ", graph")
DEIT = ("", ", graph", ", compiled", ", compiled, graph")


def read_record(path: Path) -> dict[str, Any]:
    """A benchmark's record; empty if it is missing, cut off or something else."""
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        print(f"{path} cannot be read, and counts as not measured ({error})", file=sys.stderr)
        return {}
    if not isinstance(record, dict):
        print(f"{path} is no record of a benchmark, and counts as not measured", file=sys.stderr)
        return {}
    return record


class Records(NamedTuple):
    """The JSON records. Its methods raise KeyError for what was not measured."""

    model: dict[str, Any]
    model_512: dict[str, Any]
    train: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> "Records":
        paths = (folder / name for name in ("model-s.json", "model-s-512.json", "train.json"))
        return Records(*map(read_record, paths))

    def forward(
        self, name: str, forms: tuple[str, ...], batch: int | None = None, pixels: int = 224
    ) -> float:
        """Images per second of the fastest of a model's `forms`."""
        parts = (self.model if pixels == 224 else self.model_512)["parts"]
        rows = {
            form: row
            for part in parts
            if part["batch"] == (batch or BATCH)
            for form, row in part["models"].items()
        }
        speeds = [rows[name + form]["images_per_s"] for form in forms if name + form in rows]
        if not speeds:
            raise KeyError(name)
        return max(speeds)

    def step(self, part: str, name: str) -> float:
        """Images per second of training."""
        return 1e3 * self.train[part]["batch"] / self.train[part]["steps"][name]["ms"]

    def memory(self, name: str) -> float:
        """Bytes of a DyVM training step at its peak."""
        return self.train["dyvm"]["memory"][name]

    @property
    def release(self) -> str:
        """Name of the release-like step."""
        return (
            "release-like, mamba_ssm"
            if "release-like, mamba_ssm" in self.train["dyvm"]["steps"]
            else "release-like, reference"
        )


class Goal(NamedTuple):
    what: str
    least: float | None  # None: there is no goal
    measure: Callable[[Records], float]
    most: float | None = None


GOALS = [
    Goal(
        "Vim-S forward, against the mamba_ssm path",
        3.0,
        lambda r: r.forward("Vim-S", OURS) / r.forward("Vim-S, mamba_ssm", OURS),
    ),
    Goal(
        "Vim-S training step, against the mamba_ssm path",
        2.0,
        lambda r: r.step("dense", "Vim-S") / r.step("dense", "Vim-S, mamba_ssm"),
    ),
    Goal(
        "Vim-S forward, against DeiT-S",
        0.45,
        lambda r: r.forward("Vim-S", OURS) / r.forward("DeiT-S", DEIT),
    ),
    Goal(
        "DyVM-S forward, against DeiT-S",
        0.8,
        lambda r: r.forward("DyVM-S", OURS) / r.forward("DeiT-S", DEIT),
    ),
    Goal(
        "DyVM-S forward at 512 pixels, against DeiT-S",
        1.3,
        lambda r: r.forward("DyVM-S", OURS, pixels=512) / r.forward("DeiT-S", DEIT, pixels=512),
    ),
    Goal(
        "DyVM-S forward at batch 1, both in a graph, against DeiT-S",
        1.0,
        lambda r: (
            r.forward("DyVM-S", (", graph",), 1)
            / r.forward("DeiT-S", (", graph", ", compiled, graph"), 1)
        ),
    ),
    Goal(
        "Vim-S training step, against DeiT-S",
        None,
        lambda r: r.step("dense", "Vim-S") / r.step("dense", "DeiT-S"),
    ),
    Goal(
        "DyVM-S training step, against the release-like step",
        3.0,
        lambda r: r.step("dyvm", "DyVM") / r.step("dyvm", r.release),
    ),
    Goal(
        "peak memory of that step, against the release-like step",
        None,
        lambda r: r.memory("DyVM") / r.memory(r.release),
        most=0.5,
    ),
]


def shares(records: Records) -> dict[str, Callable[[], float]]:
    """{what: share of the limit}, where the limits are known."""
    if not any("H200" in record.get("device", "") for record in records):
        return {}
    forward, train = LIMITS["forward"], LIMITS["train"]
    rows: dict[str, Callable[[], float]] = {}
    for name, limit in forward.items():
        rows[f"{name} forward, share of its limit of {limit:,} images/s"] = (
            lambda name=name, limit=limit: records.forward(name, DEIT) / limit
        )
    for name, limit in train.items():
        rows[f"{name} training step, share of its limit of {limit:,} images/s"] = (
            lambda name=name, limit=limit: records.step("dense", name) / limit
        )
    return rows


def measured(measure: Callable[[], float]) -> float | None:
    try:
        return measure()
    except KeyError:
        return None


def judge(records: Records) -> list[dict[str, Any]]:
    """[{"what", "goal", "measured", "met"}]; None without a goal or a measurement."""
    rows = []
    for goal in GOALS:
        value, met = measured(lambda goal=goal: goal.measure(records)), None
        if value is not None and goal.least is not None:
            met = value >= goal.least
        if value is not None and goal.most is not None:
            met = value <= goal.most
        text = f">= {goal.least:g}" if goal.least else f"<= {goal.most:g}" if goal.most else None
        rows.append({"what": goal.what, "goal": text, "measured": value, "met": met})
    return rows + [
        {"what": what, "goal": None, "measured": measured(share), "met": None}
        for what, share in shares(records).items()
    ]


def closing(records: Records) -> str:
    """Notes needed to read the table."""
    batches = [
        f"{part} {record['batch']}"
        for part, record in records.train.items()
        if isinstance(record, dict) and "batch" in record
    ]
    text = (
        f"batch {BATCH} unless said otherwise; training at the batch that fits: "
        f"{', '.join(batches) or 'not measured'}"
    )
    if records.train.get("release_checkpointing"):
        text += (
            "; without mamba_ssm the release-like step recomputes its layers (gradient "
            "checkpointing): the ratio of times flatters DyVM, that of memory is stricter"
        )
    return text


def main() -> None:
    parser = OneLineParser(
        prog="benchmarks/goals.py", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table as JSON")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise UsageError(
            f"{args.folder} is no folder; name the one that scripts/gpu_check.sh wrote to"
        )
    records = Records.read(args.folder)
    rows = judge(records)
    print(
        text_table(
            [
                [
                    row["what"],
                    row["goal"] or "",
                    "not measured" if row["measured"] is None else f"{row['measured']:.2f}",
                    {True: "yes", False: "no", None: ""}[row["met"]],
                ]
                for row in rows
            ],
            ["", "goal", "measured", "met"],
        )
    )
    print(closing(records))
    if args.output:
        write_json(args.output, rows)


if __name__ == "__main__":
    run_main(main)
