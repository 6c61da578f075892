"""The results of an ablation: mean and spread over seeds, `ablation.md`, CSV, plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drawing import trade_offs
from evaluation.columns import EXACT, SPEED, speed_row
from evaluation.outcomes import DENSE, Outcome, how_timed, mean, of_missing, spread, write_results
from tasks import Measure, Task
from utils.environment import describe_environment
from utils.files import write_csv
from utils.tables import text_table

RECORD = "ablation.json"


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
        values = [run.values[measure.key] for run in runs]
        rows.append(
            {
                "name": name,
                "n": len(runs),
                measure.key: mean(values),
                "sd": spread(values),
                f"{measure.key}_of_runs": values,
                "flops": mean([run.flops for run in runs]),
                "images_per_s": speed.get(name),
                "patches_kept": mean([run.patches_kept for run in runs]),
                "scans_kept": mean([run.scans_kept for run in runs]),
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]], task: Task, form: str) -> str:
    """The rows in one of tabulate's formats; changes and speeds are relative to the dense model."""
    dense, measure = rows[0], task.best
    headers = [
        "variant",
        measure.label,
        "change",
        EXACT.label,
        "change",
        speed_row(None, task.example).label,
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
    record = {**about, "environment": environment}
    record |= {"rows": rows, "missing": failed, "speeds": speeds}
    text = _document(rows, failed, about, environment, speeds, task)
    write_results(output, "ablation", record, text, _columns(task.best.key))
    _write_runs(outcomes, task, output / "ablation_runs.csv")
    trade_offs.save_all(
        output, "ablation", lambda axis: trade_offs.variants(rows, axis, task.best, task.example)
    )


def _columns(key: str) -> dict[str, str]:
    """Columns of the CSV file of the variants; key: that of the best measure."""
    return {
        "variant": "name",
        "runs": "n",
        f"{key}_mean": key,
        f"{key}_sd": "sd",
        "exact_flops": "flops",
        "images_per_s": "images_per_s",
        "patches_kept": "patches_kept",
        "scans_kept": "scans_kept",
    }


def _write_runs(outcomes: Sequence[Outcome], task: Task, path: Path) -> None:
    scores = [*(measure.key for measure in task.measures), task.best.ema_key]
    costs = ["paper_flops", "exact_flops", "patches_kept", "scans_kept"]

    def row(outcome: Outcome) -> list[Any]:
        values = [outcome.values[key] for key in scores]
        return [
            outcome.variant,
            outcome.run.seed,
            *("" if value is None else value for value in values),
            outcome.values["flops"]["paper"],
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
    task: Task,
) -> str:
    subset = f", {about['subset']:g} of the training {task.example}s" if about["subset"] else ""
    timed = how_timed(speeds["conditions"], "of each variant its first seed", task.example)
    lines = [
        "# Ablation",
        "",
        table(rows, task, "github"),
        "",
        f"{task.best.title} of the best epoch's checkpoint: mean ± sample standard deviation over "
        f"the n seeds. Changes and {task.example}s/s are against the dense teacher. Patches kept: "
        "after the last stage. Scans kept: mean gate over layers and directions. `exact` counts "
        "both scan directions, each with its own gate, and the routers.",
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
    return "\n".join(lines + of_missing(failed))
