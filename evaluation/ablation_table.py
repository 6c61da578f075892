"""The results of an ablation: mean and spread over seeds, speeds, `ablation.md`, CSV, plots."""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawing import plots
from evaluation.columns import EXACT, SPEED
from evaluation.summary import forward_speeds
from loading.fingerprint import fingerprints
from models.build import ModelSpec, restore
from models.weights import load_weights
from tasks import Experiment, Measure, Task
from utils.checkpoint import BEST, load_checkpoint
from utils.environment import describe_environment, device_name
from utils.errors import UserError
from utils.files import atomic_file, sha256_of, write_csv, write_json
from utils.tables import text_table

DENSE = "dense"
RECORD = "ablation.json"


@dataclass(frozen=True)
class PlannedRun:
    """One training; `flags` are the words after main.py, `args` what they parse to."""

    variant: str
    seed: int
    folder: Path
    flags: list[str]
    args: argparse.Namespace

    def __str__(self) -> str:
        return f"{self.variant}/seed{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """The content of a complete run's eval.json."""

    run: PlannedRun
    dynamic: dict[str, Any]
    dense: dict[str, Any]

    @classmethod
    def read(cls, run: PlannedRun) -> "Outcome":
        path = run.folder / "eval.json"
        try:
            report = json.loads(path.read_bytes())
            return cls(run, report["dynamic"], report[DENSE])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error!r}); remove it, and the same command writes it anew"
            ) from None

    @property
    def variant(self) -> str:
        return self.run.variant

    @property
    def checkpoint(self) -> Path:
        return self.run.folder / BEST

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
    outcomes: Sequence[Outcome], dense_path: str, experiment: Experiment, seconds: float
) -> dict[str, Any]:
    """Images/s of the dense model and of one run per variant, timed in turn on the same batch.

    An earlier measurement in `ablation.json` is reused if checkpoints and conditions are the same.
    """
    first = {outcome.variant: outcome for outcome in reversed(outcomes)}
    files = {DENSE: dense_path} | {name: str(outcome.checkpoint) for name, outcome in first.items()}
    conditions = {
        "checkpoints_sha256": {name: sha256_of(path) for name, path in files.items()},
        "images_sha256": fingerprints(experiment.data, experiment.args.data_path)["val"],
        "batch_size": experiment.args.batch_size,
        "device": device_name(experiment.device),
        "precision": experiment.precision,
        "seconds": seconds,
    }
    recorded = _recorded_speeds(experiment.output / RECORD)
    if recorded.get("conditions") == conditions:
        return recorded
    dense = experiment.model(experiment.spec.dense())
    load_weights(dense, load_checkpoint(dense_path), dense_path)
    models = {DENSE: dense}
    for name, outcome in first.items():
        checkpoint, threshold = load_checkpoint(outcome.checkpoint), outcome.run.args.gate_threshold
        model = experiment.model(ModelSpec.from_checkpoint(checkpoint, files[name]))
        models[name] = restore(model, checkpoint, files[name], threshold=threshold)
    images_per_s, _ = forward_speeds(models, experiment, seconds / 2 * len(models))
    return {"conditions": conditions, "images_per_s": images_per_s}


def _recorded_speeds(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes())["speeds"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def summarise(
    variants: Mapping[str, Sequence[str]],
    outcomes: Sequence[Outcome],
    speeds: Mapping[str, Any],
    measure: Measure,
) -> list[dict[str, Any]]:
    """One row for the dense model and one per variant; None for what is unknown."""
    teacher, speed = outcomes[0].dense, speeds["images_per_s"]
    rows = [
        {
            "name": DENSE,
            "n": 1,
            measure.key: teacher[measure.key],
            "sd": None,
            f"{measure.key}_of_runs": [teacher[measure.key]],
            "flops": teacher["flops"]["exact"],
            "images_per_s": speed[DENSE],
            "patches_kept": 1.0,
            "scans_kept": 1.0,
        }
    ]
    for name in variants:
        runs = [outcome for outcome in outcomes if outcome.variant == name]
        values = [run.dynamic[measure.key] for run in runs]
        rows.append(
            {
                "name": name,
                "n": len(runs),
                measure.key: _mean(values),
                "sd": statistics.stdev(values) if len(runs) > 1 else None,
                f"{measure.key}_of_runs": values,
                "flops": _mean([run.flops for run in runs]),
                "images_per_s": speed.get(name),
                "patches_kept": _mean([run.patches_kept for run in runs]),
                "scans_kept": _mean([run.scans_kept for run in runs]),
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def table(rows: Sequence[Mapping[str, Any]], measure: Measure, form: str) -> str:
    """The rows in one of tabulate's formats; changes and speeds are relative to the dense model."""
    dense = rows[0]
    headers = [
        "variant",
        measure.label,
        "change",
        EXACT.label,
        "change",
        SPEED.label,
        "patches kept",
        "scans kept",
        "n",
    ]
    shown = [
        [row["name"], *_cells(row, dense, measure), "" if row is dense else str(row["n"])]
        if row["n"]
        else [row["name"], *["-"] * (len(headers) - 2), "0"]
        for row in rows
    ]
    return text_table(shown, headers, form)


def _cells(row: Mapping[str, Any], dense: Mapping[str, Any], measure: Measure) -> list[str]:
    score = measure.text(row[measure.key])
    if row["sd"] is not None:
        score += f" ± {measure.text(row['sd'])}"
    columns = [{**part, "flops": {"exact": part["flops"]}} for part in (dense, row)]
    flops = EXACT.cell(columns[1])
    if row is dense:
        return [score, "", flops, "", SPEED.cell(row), "100.0 %", "100.0 %"]
    return [
        score,
        measure.text(row[measure.key] - dense[measure.key], signed=True),
        flops,
        EXACT.changed(*columns),
        SPEED.changed(*columns) or "-",
        f"{100 * row['patches_kept']:.1f} %",
        f"{100 * row['scans_kept']:.1f} %",
    ]


def write(
    rows: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Outcome],
    failed: Mapping[str, str],
    about: Mapping[str, Any],
    speeds: Mapping[str, Any],
    task: Task,
    output: Path,
) -> None:
    """Write `ablation.json`, `ablation.md`, CSV files of variants and runs, and the plots."""
    environment = describe_environment()
    write_json(
        output / RECORD,
        {**about, "environment": environment, "rows": rows, "missing": failed, "speeds": speeds},
    )
    _write_variants(rows, task.best.key, output / "ablation.csv")
    _write_runs(outcomes, task, output / "ablation_runs.csv")
    with atomic_file(output / "ablation.md") as file:
        text = _document(rows, failed, about, environment, speeds, task.best)
        file.write(text.encode(errors="backslashreplace"))
    for axis, name in (("flops", "ablation_flops.png"), ("images_per_s", "ablation_speed.png")):
        figure = plots.variants(rows, axis, task.best)
        if figure is not None:
            plots.save(figure, output / name)


def _write_variants(rows: Sequence[Mapping[str, Any]], key: str, path: Path) -> None:
    columns = {
        "variant": "name",
        "runs": "n",
        f"{key}_mean": key,
        f"{key}_sd": "sd",
        "exact_flops": "flops",
        "images_per_s": "images_per_s",
        "patches_kept": "patches_kept",
        "scans_kept": "scans_kept",
    }
    write_csv(
        path,
        list(columns),
        (["" if row[name] is None else row[name] for name in columns.values()] for row in rows),
    )


def _write_runs(outcomes: Sequence[Outcome], task: Task, path: Path) -> None:
    scores = [*(measure.key for measure in task.measures), task.best.ema_key]
    costs = ["paper_flops", "exact_flops", "patches_kept", "scans_kept"]

    def row(outcome: Outcome) -> list[Any]:
        values = [outcome.dynamic[key] for key in scores]
        return [
            outcome.variant,
            outcome.run.seed,
            *("" if value is None else value for value in values),
            outcome.dynamic["flops"]["paper"],
            outcome.flops,
            outcome.patches_kept,
            outcome.scans_kept,
        ]

    write_csv(path, ["variant", "seed", *scores, *costs], map(row, outcomes))


def _document(
    rows: Sequence[Mapping[str, Any]],
    failed: Mapping[str, str],
    about: Mapping[str, Any],
    environment: Mapping[str, str],
    speeds: Mapping[str, Any],
    measure: Measure,
) -> str:
    conditions = speeds["conditions"]
    subset = f", {about['subset']:g} of the training images" if about["subset"] else ""
    timed = (
        "images/s: not measured"
        if not conditions["seconds"]
        else f"images/s: all models in turn on one batch of {conditions['batch_size']}, "
        f"{conditions['device']}, {conditions['precision']}; of each variant its first seed"
    )
    lines = [
        "# Ablation",
        "",
        table(rows, measure, "github"),
        "",
        f"{measure.title} of the best epoch's checkpoint: mean ± sample standard deviation over "
        "the n seeds. Changes and images/s are against the dense teacher. Patches kept: after the "
        "last stage. Scans kept: mean gate over layers and directions. `exact` counts both scan "
        "directions, each with its own gate, and the routers.",
        "",
        f"* {about['data_set']}{subset}; {about['model']}; epochs from the dense teacher: "
        f"{about['epochs']}; seeds: {', '.join(map(str, about['seeds']))}",
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
