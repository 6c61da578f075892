"""What the runs of an ablation come to: means and spread over the seeds, speeds, `ablation.md`, CSV
files and plots.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from datasets import Data
from drawing import plots
from evaluation.summary import forward_speeds
from models.build import build_dense, restore_model
from models.weights import load_weights
from utils.checkpoint import BEST, load_checkpoint
from utils.distributed import Distributed
from utils.environment import describe_environment, device_name
from utils.errors import UserError
from utils.files import atomic_file, sha256_of, write_csv, write_json

if TYPE_CHECKING:
    from evaluation.ablation_table import PlannedRun

DENSE = "dense"
RECORD = "ablation.json"
COLUMNS = (
    "variant",
    "top-1, %",
    "change",
    "MFLOPs, exact",
    "change",
    "images/s",
    "patches kept",
    "scans kept",
    "n",
)


@dataclass(frozen=True)
class Outcome:
    """What a complete run says of itself in eval.json."""

    variant: str
    seed: int
    checkpoint: Path
    args: argparse.Namespace
    dynamic: dict[str, Any]
    dense: dict[str, Any]

    @classmethod
    def read(cls, run: "PlannedRun") -> "Outcome":
        path = run.folder / "eval.json"
        try:
            report = json.loads(path.read_bytes())
            return cls(
                run.variant, run.seed, run.folder / BEST, run.args, report["dynamic"], report[DENSE]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error!r}); remove it, and the same command writes it anew"
            ) from None

    @property
    def top1(self) -> float:
        return self.dynamic["top1"]

    @property
    def flops(self) -> float:
        return self.dynamic["flops"]["exact"]

    @property
    def patches_kept(self) -> float:
        """Fraction of the patches that the last stage leaves."""
        return self.dynamic["keep"][-1] if self.dynamic["keep"] else 1.0

    @property
    def scans_kept(self) -> float:
        """Mean of the gates over layers and directions."""
        return statistics.fmean(gate for layer in self.dynamic["gates"] for gate in layer)


def measure_speeds(
    outcomes: Sequence[Outcome],
    dense_path: str,
    data: Data,
    distributed: Distributed,
    seconds: float,
    output: Path,
) -> dict[str, Any]:
    """Images/s of the dense model and of one run of each variant, all timed in turn on the same
    batch.

    A measurement of the same checkpoints under the same conditions that `ablation.json` holds is
    taken from there.
    """
    first = {outcome.variant: outcome for outcome in reversed(outcomes)}
    files = {DENSE: dense_path} | {name: str(outcome.checkpoint) for name, outcome in first.items()}
    args = outcomes[0].args
    conditions = {
        "checkpoints_sha256": {name: sha256_of(path) for name, path in files.items()},
        "batch_size": args.batch_size,
        "device": device_name(distributed.device),
        "precision": "float32" if args.amp == "off" else args.amp,
        "seconds": seconds,
    }
    known = _recorded_speeds(output / RECORD)
    if known.get("conditions") == conditions:
        return known
    dense = build_dense(args, data.num_classes)
    load_weights(dense, load_checkpoint(dense_path), dense_path)
    models = {DENSE: dense}
    for name, outcome in first.items():
        at = argparse.Namespace(**vars(outcome.args) | {"model_path": files[name]})
        models[name] = restore_model(at, load_checkpoint(outcome.checkpoint), data.num_classes)
    models = {name: model.to(distributed.device) for name, model in models.items()}
    images_per_s = forward_speeds(models, data, args, distributed, seconds / 2 * len(models))
    return {"conditions": conditions, "images_per_s": images_per_s}


def _recorded_speeds(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes())["speeds"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def summarise(
    variants: Mapping[str, Sequence[str]], outcomes: Sequence[Outcome], speeds: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for the dense model and for each variant; None where nothing is known."""
    teacher, speed = outcomes[0].dense, speeds["images_per_s"]
    rows = [
        {
            "name": DENSE,
            "n": 1,
            "top1": teacher["top1"],
            "sd": None,
            "top1_of_runs": [teacher["top1"]],
            "flops": teacher["flops"]["exact"],
            "images_per_s": speed[DENSE],
            "patches_kept": 1.0,
            "scans_kept": 1.0,
        }
    ]
    for name in variants:
        runs = [outcome for outcome in outcomes if outcome.variant == name]
        top1 = [run.top1 for run in runs]
        rows.append(
            {
                "name": name,
                "n": len(runs),
                "top1": _mean(top1),
                "sd": statistics.stdev(top1) if len(runs) > 1 else None,
                "top1_of_runs": top1,
                "flops": _mean([run.flops for run in runs]),
                "images_per_s": speed.get(name),
                "patches_kept": _mean([run.patches_kept for run in runs]),
                "scans_kept": _mean([run.scans_kept for run in runs]),
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def table(rows: Sequence[Mapping[str, Any]], form: str) -> str:
    """The rows for a reader, in one of tabulate's formats; changes and speeds are against the dense
    model.
    """
    dense = rows[0]
    shown = [
        [row["name"], *_cells(row, dense), "" if row is dense else str(row["n"])] for row in rows
    ]
    return tabulate(
        shown,
        headers=COLUMNS,
        tablefmt=form,
        disable_numparse=True,
        colalign=("left", *["right"] * (len(COLUMNS) - 1)),
    )


def _cells(row: Mapping[str, Any], dense: Mapping[str, Any]) -> list[str]:
    if not row["n"]:
        return ["-"] * (len(COLUMNS) - 2)
    top1 = f"{row['top1']:.2f}" + (f" ± {row['sd']:.2f}" if row["sd"] is not None else "")
    flops = f"{row['flops'] / 1e6:,.2f}"
    if row is dense:
        speed = "-" if row["images_per_s"] is None else f"{row['images_per_s']:,.1f}"
        return [top1, "", flops, "", speed, "100.0 %", "100.0 %"]
    speed = (
        "-"
        if row["images_per_s"] is None
        else f"x {row['images_per_s'] / dense['images_per_s']:.2f}"
    )
    return [
        top1,
        f"{row['top1'] - dense['top1']:+.2f}",
        flops,
        f"{100 * (row['flops'] / dense['flops'] - 1):+.1f} %",
        speed,
        f"{100 * row['patches_kept']:.1f} %",
        f"{100 * row['scans_kept']:.1f} %",
    ]


def write(
    rows: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Outcome],
    failed: Mapping[str, str],
    about: Mapping[str, Any],
    speeds: Mapping[str, Any],
    output: Path,
) -> None:
    """`ablation.json`, `ablation.md`, a CSV file of the variants and one of the runs, and the
    plots.
    """
    environment = describe_environment()
    write_json(
        output / RECORD,
        {**about, "environment": environment, "rows": rows, "missing": failed, "speeds": speeds},
    )
    write_csv(
        output / "ablation.csv",
        (
            "variant",
            "runs",
            "top1_mean",
            "top1_sd",
            "exact_flops",
            "images_per_s",
            "patches_kept",
            "scans_kept",
        ),
        (
            [
                row["name"],
                row["n"],
                *(
                    "" if row[key] is None else row[key]
                    for key in ("top1", "sd", "flops", "images_per_s", "patches_kept", "scans_kept")
                ),
            ]
            for row in rows
        ),
    )
    write_csv(
        output / "ablation_runs.csv",
        (
            "variant",
            "seed",
            "top1",
            "top5",
            "loss",
            "ema_top1",
            "paper_flops",
            "exact_flops",
            "patches_kept",
            "scans_kept",
        ),
        map(_csv_row, outcomes),
    )
    with atomic_file(output / "ablation.md") as file:
        file.write(_document(rows, failed, about, environment, speeds).encode())
    for axis, name in (("flops", "ablation_flops.png"), ("images_per_s", "ablation_speed.png")):
        figure = plots.variants(rows, axis)
        if figure is not None:
            plots.save(figure, output / name)


def _csv_row(run: Outcome) -> list[Any]:
    ema = run.dynamic["ema_top1"]
    return [
        run.variant,
        run.seed,
        run.top1,
        run.dynamic["top5"],
        run.dynamic["loss"],
        "" if ema is None else ema,
        run.dynamic["flops"]["paper"],
        run.flops,
        run.patches_kept,
        run.scans_kept,
    ]


def _document(
    rows: Sequence[Mapping[str, Any]],
    failed: Mapping[str, str],
    about: Mapping[str, Any],
    environment: Mapping[str, str],
    speeds: Mapping[str, Any],
) -> str:
    conditions = speeds["conditions"]
    subset = f", {about['subset']:g} of the training images" if about["subset"] else ""
    timed = (
        "images/s: not measured"
        if not conditions["seconds"]
        else f"images/s: all models in turn on one batch of {conditions['batch_size']}, "
        f"{conditions['device']}, "
        f"{conditions['precision']}; of each variant its first seed"
    )
    lines = [
        "# Ablation",
        "",
        table(rows, "github"),
        "",
        "Top-1 of the best epoch's checkpoint: mean ± sample standard deviation over the n seeds. "
        "Changes and images/s "
        "are against the dense teacher. Patches kept: after the last stage. Scans kept: mean gate "
        "over layers and "
        "directions. `exact` counts both scan directions, each with its own gate, and the routers.",
        "",
        f"* {about['data_set']}{subset}; {about['model']}; epochs from the dense teacher: "
        f"{about['epochs']}; seeds: "
        f"{', '.join(map(str, about['seeds']))}",
        f"* {timed}",
        "* " + ", ".join(f"{key} {value}" for key, value in environment.items()),
        "",
        "| variant | flags of main.py |",
        "|---|---|",
        *(f"| {name} | `{' '.join(flags)}` |" for name, flags in about["variants"].items()),
        "",
        "```bash",
        about["command"],
        "```",
        "",
    ]
    if failed:
        lines += [
            "Missing runs:",
            "",
            *(f"* {run}: {reason}" for run, reason in failed.items()),
            "",
        ]
    return "\n".join(lines)


@dataclass(frozen=True)
class PlannedRun:
    """One training; `flags` are the words behind main.py, `args` what they mean."""

    variant: str
    seed: int
    folder: Path
    flags: list[str]
    args: argparse.Namespace

    def __str__(self) -> str:
        return f"{self.variant}/seed{self.seed}"
