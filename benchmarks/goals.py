"""Measurements of Vim-S and DyVM-S (`scripts/gpu_check.sh`) beside goals and hardware limits.

    python benchmarks/goals.py FOLDER --output FOLDER/goals.json
    python benchmarks/goals.py    # without a GPU: what is computed alone

FOLDER holds model-s.json, model-s-512.json and train.json, or some of them; what is missing or
wrong counts as not measured. Of the ways to run one model (eager, compiled, in a CUDA graph) the
fastest counts, for DeiT too. What is not measured is shown as computed, where it is, by
gpu_static/report.py: marked by ~, and neither met nor missed.

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

from benchmarks import flags
from utils.arguments import OneLineParser
from utils.errors import UsageError, UserError
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
MAMBA_SSM_CARD = "H200"  # that the mamba_ssm path is computed for
RECORDS = ("model-s.json", "model-s-512.json", "train.json")
COMPUTED = Path(__file__).parent / "results/gpu_static.json"


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
        """Raises UserError for a folder without any."""
        records = Records(*(read_record(folder / name) for name in RECORDS))
        if not any(records):
            raise UserError(
                f"{folder} holds no record to read, none of {', '.join(RECORDS)}; "
                "scripts/gpu_check.sh writes them"
            )
        return records

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

    def dynamic_share(self, batch: int) -> float:
        """DyVM-S' speed in Vim-S', as a share of the gain in operations."""
        return {part["batch"]: part for part in self.model["parts"]}[batch]["share"]

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


class Computed(NamedTuple):
    """The record of gpu_static/report.py, for one card. Its methods raise KeyError for what is not
    computed.
    """

    record: dict[str, Any]
    card: str

    def us(self, name: str, kind: str = "forward", batch: int = 256, pixels: int = 224) -> float:
        """Of an image."""
        wanted = (self.card, name, kind, batch, pixels)
        for row in self.record["models"]:
            if tuple(row[key] for key in ("card", "model", "pass", "batch", "pixels")) == wanted:
                return 1e6 / row["images_per_s"]
        raise KeyError(name)

    def against_deit(self, name: str, *how: Any) -> float:
        return self.us("DeiT-S", *how) / self.us(name, *how)

    def mamba_ssm_us(self, kind: str) -> float:
        """Vim-S on the mamba_ssm path, of an image."""
        if self.card != MAMBA_SSM_CARD:
            raise KeyError(self.card)
        return self.record["mamba_ssm_us_of_an_image"][kind]

    def against_mamba_ssm(self, kind: str) -> float:
        return self.mamba_ssm_us(kind) / self.us("Vim-S", kind)

    def dynamic_share(self, batch: int) -> float:
        dense, dynamic = (self.us(name, "forward", batch) for name in ("Vim-S", "DyVM-S"))
        return dense / dynamic / self.record["flops_ratio"]

    def against_release(self) -> float:
        """Of the release-like step Vim-S on mamba_ssm alone counts, student and teacher."""
        release = self.mamba_ssm_us("train") + self.mamba_ssm_us("forward")
        return release / self.us("DyVM-S", "train")

    def memory_against_release(self) -> float:
        peaks = self.record["dyvm_step_peak"]["bytes"]
        return peaks["DyVM"] / peaks["release-like, mamba_ssm"]


class Goal(NamedTuple):
    what: str
    least: float | None  # None: there is no goal
    measure: Callable[[Records], float]
    compute: Callable[[Computed], float] | None = None
    most: float | None = None


GOALS = [
    Goal(
        "Vim-S forward, against the mamba_ssm path",
        3.0,
        lambda r: r.forward("Vim-S", OURS) / r.forward("Vim-S, mamba_ssm", OURS),
        lambda c: c.against_mamba_ssm("forward"),
    ),
    Goal(
        "Vim-S training step, against the mamba_ssm path",
        2.0,
        lambda r: r.step("dense", "Vim-S") / r.step("dense", "Vim-S, mamba_ssm"),
        lambda c: c.against_mamba_ssm("train"),
    ),
    Goal(
        "Vim-S forward, against DeiT-S",
        0.45,
        lambda r: r.forward("Vim-S", OURS) / r.forward("DeiT-S", DEIT),
        lambda c: c.against_deit("Vim-S"),
    ),
    Goal(
        "DyVM-S forward, against DeiT-S",
        0.8,
        lambda r: r.forward("DyVM-S", OURS) / r.forward("DeiT-S", DEIT),
        lambda c: c.against_deit("DyVM-S"),
    ),
    Goal(
        "DyVM-S forward at 512 pixels, against DeiT-S",
        1.3,
        lambda r: r.forward("DyVM-S", OURS, pixels=512) / r.forward("DeiT-S", DEIT, pixels=512),
        lambda c: c.against_deit("DyVM-S", "forward", 256, 512),
    ),
    Goal(
        "DyVM-S forward at batch 1, both in a graph, against DeiT-S",
        1.0,
        lambda r: (
            r.forward("DyVM-S", (", graph",), 1)
            / r.forward("DeiT-S", (", graph", ", compiled, graph"), 1)
        ),
        lambda c: c.against_deit("DyVM-S", "forward", 1),
    ),
    *(
        Goal(
            f"DyVM-S against Vim-S at batch {batch}, share of the gain in operations",
            0.9,
            lambda r, batch=batch: r.dynamic_share(batch),
            lambda c, batch=batch: c.dynamic_share(batch),
        )
        for batch in (256, 32)
    ),
    Goal(
        "Vim-S training step, against DeiT-S",
        None,
        lambda r: r.step("dense", "Vim-S") / r.step("dense", "DeiT-S"),
        lambda c: c.against_deit("Vim-S", "train"),
    ),
    Goal(
        "DyVM-S training step, against the release-like step",
        3.0,
        lambda r: r.step("dyvm", "DyVM") / r.step("dyvm", r.release),
        lambda c: c.against_release(),
    ),
    Goal(
        "peak memory of that step, against the release-like step",
        None,
        lambda r: r.memory("DyVM") / r.memory(r.release),
        lambda c: c.memory_against_release(),
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


def judge(records: Records, computed: Computed) -> list[dict[str, Any]]:
    """[{"what", "goal", "measured", "met", "computed"}]; None without a goal or a measurement, and
    for what is measured or not computed.
    """
    rows = []
    for goal in GOALS:
        value, met = measured(lambda goal=goal: goal.measure(records)), None
        if value is not None and goal.least is not None:
            met = value >= goal.least
        if value is not None and goal.most is not None:
            met = value <= goal.most
        text = f">= {goal.least:g}" if goal.least else f"<= {goal.most:g}" if goal.most else None
        row = {"what": goal.what, "goal": text, "measured": value, "met": met, "computed": None}
        if value is None and goal.compute is not None:
            row["computed"] = measured(lambda goal=goal: goal.compute(computed))
        rows.append(row)
    return rows + [
        {"what": what, "goal": None, "measured": measured(share), "met": None, "computed": None}
        for what, share in shares(records).items()
    ]


def card_of(records: Records) -> str:
    """The card that figures are computed for: the one measured on, if it is one of them."""
    devices = " ".join(record.get("device", "") for record in records)
    return next((card for card in ("H200", "H100") if card in devices), "H200")


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
    parser.add_argument("folder", type=Path, nargs="?", help="default: nothing is measured")
    parser.add_argument(
        "--computed",
        type=Path,
        default=COMPUTED,
        metavar="FILE",
        help=f"record of gpu_static/report.py, default: results/{COMPUTED.name}",
    )
    parser.add_argument(
        "--output", type=flags.record_file, metavar="FILE", help="write the table as JSON"
    )
    args = parser.parse_args()
    if args.folder is not None and not args.folder.is_dir():
        raise UsageError(
            f"{args.folder} is not a folder; name the one that scripts/gpu_check.sh wrote to"
        )
    if not args.computed.is_file():
        raise UsageError(f"--computed {args.computed}: there is no such file")
    records = Records({}, {}, {}) if args.folder is None else Records.read(args.folder)
    card = card_of(records)
    rows = judge(records, Computed(read_record(args.computed), card))
    print(
        text_table(
            [
                [
                    row["what"],
                    row["goal"] or "",
                    "not measured" if row["measured"] is None else f"{row['measured']:.2f}",
                    {True: "yes", False: "no", None: ""}[row["met"]],
                    "" if row["computed"] is None else f"~{row['computed']:.2f}",
                ]
                for row in rows
            ],
            ["", "goal", "measured", "met", "computed"],
        )
    )
    print(closing(records))
    if any(row["computed"] is not None for row in rows):
        print(
            f"~ computed for an {card} ({args.computed.name}), on paper and within about 25 %; "
            "DeiT and mamba_ssm at their ideal speed"
        )
    if args.output:
        write_json(args.output, rows)


if __name__ == "__main__":
    run_main(main)
