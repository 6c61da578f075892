"""The results of a comparison at equal operations: `compare.md`, CSV, plots."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drawing.comparison import comparison
from drawing.trade_offs import save_all
from evaluation.budgets import TOLERANCE, Cell
from evaluation.columns import EXACT, speed_row
from evaluation.outcomes import DENSE, Outcome, how_timed, mean, of_missing, spread, write_results
from tasks import Measure, Task
from utils.environment import describe_environment
from utils.files import write_csv
from utils.tables import text_table

RECORD = "compare.json"
MARK = "(!)"  # of operations that are off the budget


def summarise(
    cells: Sequence[Cell],
    smaller: Mapping[str, str],
    outcomes: Sequence[Outcome],
    speeds: Mapping[str, Any],
    measure: Measure,
) -> list[dict[str, Any]]:
    """One row for the dense teacher, for each smaller model and each cell, budget by budget.

    smaller: {name: what it was trained for}. None stands for what is unknown, or has no meaning.
    """
    speed = speeds["images_per_s"]

    def row(name: str, runs: Sequence[Outcome], **more: Any) -> dict[str, Any]:
        values = [run.values[measure.key] for run in runs]
        seen = [run.values["object"] for run in runs if "object" in run.values]
        return {
            "name": name,
            "keep": None,
            "knob": None,
            "n": len(runs),
            measure.key: mean(values),
            "sd": spread(values),
            f"{measure.key}_of_runs": values,
            "flops": mean([run.flops for run in runs]),
            "deviation": None,
            "images_per_s": speed.get(name),
            "object_share": mean([of["share"][-1] for of in seen]),
            "object_mass": mean([of["mass"][-1] for of in seen]),
            **more,
        }

    def of(name: str) -> list[Outcome]:
        return [outcome for outcome in outcomes if outcome.variant == name]

    rows = []
    # A smaller model's report does not say what the teacher scores.
    teacher = next((found.dense for found in outcomes if found.variant not in smaller), None)
    if teacher is not None:
        score, flops = teacher[measure.key], teacher["flops"]["exact"]
        own = {"n": 1, measure.key: score, f"{measure.key}_of_runs": [score], "flops": flops}
        rows.append(row(DENSE, [], **own))
    rows += [row(name, of(name)) for name in smaller]
    for keep in dict.fromkeys(cell.keep for cell in cells):
        for cell in (cell for cell in cells if cell.keep == keep):
            found = row(cell.name, of(cell.name), keep=keep, knob=" ".join(cell.knob))
            rows.append(found | {"name": cell.method.name, "deviation": cell.deviation})
    return rows


def table(rows: Sequence[Mapping[str, Any]], task: Task, form: str) -> str:
    """The rows in one of tabulate's formats."""
    measure, speed = task.best, speed_row(None, task.example)
    columns = {
        "method": lambda row: row["name"],
        "keep": lambda row: "" if row["keep"] is None else f"{row['keep']:g}",
        measure.label: lambda row: _score(row, measure),
        EXACT.label: lambda row: EXACT.cell({"flops": {"exact": row["flops"]}}),
        "off budget": _deviation,
        speed.label: speed.cell,
        "kept on object": lambda row: _percent(row["object_share"]),
        "object kept": lambda row: _percent(row["object_mass"]),
        "n": lambda row: "" if row["name"] == DENSE else str(row["n"]),
    }
    if all(row["object_share"] is None for row in rows):
        del columns["kept on object"], columns["object kept"]
    shown = [[cell(row) if row["n"] else _missing(row, name) for name, cell in columns.items()]
             for row in rows]  # fmt: skip
    return text_table(shown, list(columns), form)


def _missing(row: Mapping[str, Any], column: str) -> str:
    known = {"method": row["name"], "n": "0"}
    if row["keep"] is not None:
        known["keep"] = f"{row['keep']:g}"
    return known.get(column, "-")


def _score(row: Mapping[str, Any], measure: Measure) -> str:
    score = measure.text(row[measure.key])
    return score if row["sd"] is None else f"{score} ± {measure.text(row['sd'])}"


def _deviation(row: Mapping[str, Any]) -> str:
    if row["deviation"] is None:
        return ""
    text = f"{100 * row['deviation']:+.1f} %"
    return f"{text} {MARK}" if abs(row["deviation"]) > TOLERANCE else text


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def equal_speed_table(
    rows: Sequence[Mapping[str, Any]], smaller: Collection[str], task: Task
) -> str:
    """What evenly spread tokens and smaller dense models score at each method's images/s, Markdown.

    Both on straight lines from the dense teacher on; `-` beyond their ends. Empty if the teacher
    has no speed, or there is no such line.
    """
    measure = task.best
    timed = [row for row in rows if row["n"] and row["images_per_s"] is not None]
    teacher = [row for row in timed if row["name"] == DENSE]
    lines = {
        "static": [row for row in timed if row["name"] == "static"],
        "smaller dense": [row for row in timed if row["name"] in smaller],
    }
    lines = {name: sorted(teacher + line, key=_speed) for name, line in lines.items() if line}
    if not teacher or not lines:
        return ""

    def at(line: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
        x, y = [_speed(point) for point in line], [point[measure.key] for point in line]
        value = float(np.interp(_speed(row), x, y, np.nan, np.nan))
        if np.isnan(value):
            return "-"
        return f"{measure.text(value)} ({measure.text(row[measure.key] - value, signed=True)})"

    shown = [
        [
            row["name"],
            f"{row['keep']:g}",
            f"{_speed(row):,.1f}",
            measure.text(row[measure.key]),
            *(at(line, row) for line in lines.values()),
        ]
        for row in timed
        if row["keep"] is not None and row["name"] != "static"
    ]
    headers = ["method", "keep", speed_row(None, task.example).label, measure.label]
    headers += [f"{name} (difference)" for name in lines]
    return text_table(shown, headers, "github")


def _speed(row: Mapping[str, Any]) -> float:
    return row["images_per_s"]


def write(
    rows: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Outcome],
    failed: Mapping[str, str],
    about: Mapping[str, Any],
    speeds: Mapping[str, Any],
    task: Task,
    output: Path,
) -> None:
    """Write `compare.json`, `compare.md`, CSV files of the rows and of the runs, and the plots."""
    environment = describe_environment()
    record = {**about, "environment": environment}
    record |= {"rows": rows, "missing": failed, "speeds": speeds}
    text = _document(rows, failed, about, environment, speeds, task)
    write_results(output, "compare", record, text, _columns(task.best.key))
    _write_runs(outcomes, task, output / "compare_runs.csv")
    save_all(output, "compare", lambda axis: comparison(rows, axis, task.best, task.example))


def _columns(key: str) -> dict[str, str]:
    """Columns of the CSV file of the rows; key: that of the best measure."""
    return {
        "method": "name",
        "keep": "keep",
        "knob": "knob",
        "runs": "n",
        f"{key}_mean": key,
        f"{key}_sd": "sd",
        "exact_flops": "flops",
        "off_budget": "deviation",
        "images_per_s": "images_per_s",
        "kept_on_object_percent": "object_share",
        "object_kept_percent": "object_mass",
    }


def _write_runs(outcomes: Sequence[Outcome], task: Task, path: Path) -> None:
    scores = [measure.key for measure in task.measures]
    header = ["run", "seed", *scores, "exact_flops", "kept_on_object", "object_kept"]

    def row(outcome: Outcome) -> list[Any]:
        seen = outcome.values.get("object")
        of_object = [None, None] if seen is None else [seen["share"][-1], seen["mass"][-1]]
        values = [*(outcome.values[key] for key in scores), outcome.flops, *of_object]
        cells = ("" if value is None else value for value in values)
        return [outcome.variant, outcome.run.seed, *cells]

    write_csv(path, header, map(row, outcomes))


def _document(
    rows: Sequence[Mapping[str, Any]],
    failed: Mapping[str, str],
    about: Mapping[str, Any],
    environment: Mapping[str, str],
    speeds: Mapping[str, Any],
    task: Task,
) -> str:
    measure = task.best
    subset = f", {about['subset']:g} of the training {task.example}s" if about["subset"] else ""
    seeds, epochs = ", ".join(map(str, about["seeds"])), about["epochs"]
    of_object = (
        " Kept on object: share of the patches left by the last stage that lie on the known "
        "object; object kept: share of its mass in them, where merged patches do not count."
    )
    knows_objects = any(row["object_share"] is not None for row in rows)
    untrained = ", ".join(about["training_free"])
    equal_speed = equal_speed_table(rows, about["smaller"], task)
    if equal_speed:
        equal_speed = (
            f"{measure.title} of each method, and of others at its {task.example}s/s: on the line "
            "from the dense teacher through the budgets of `static`, and on that through the "
            "smaller dense models (the teacher, and perhaps these, one training each):\n\n"
            f"{equal_speed}\n"
        )
    lines = [
        "# Comparison at equal operations",
        "",
        table(rows, task, "github"),
        "",
        f"{measure.title} of the best epoch's checkpoint: mean ± sample standard deviation over "
        "the n seeds. A budget is the `exact` operations of `static` at the token keep ratio "
        "`keep`; off budget: how far a method's own are from it, more than "
        f"{100 * TOLERANCE:.0f} % with {MARK}.{of_object if knows_objects else ''}",
        "",
        *([equal_speed] if equal_speed else []),
        f"* {about['data_set']}{subset}; {about['model']}; epochs from the dense teacher: "
        f"{epochs}; seeds: {seeds}",
        *(f"* {name} is left out at this budget: {why}" for name, why in about["left_out"].items()),
        *(f"* {name}: {told}" for name, told in about["smaller"].items()),
        *([f"* with the teacher's weights, not trained: {untrained}"] if untrained else []),
        f"* {how_timed(speeds['conditions'], 'of each row its first seed', task.example)}",
        "* " + ", ".join(f"{key} {value}" for key, value in environment.items()),
        "",
        "| method | flags of main.py | knob at each budget |",
        "|---|---|---|",
        *(
            f"| {name} | `{' '.join(flags)}` | {_knobs(rows, name)} |"
            for name, flags in about["methods"].items()
        ),
        "",
        "```bash",
        about["command"],
        "```",
        "",
    ]
    return "\n".join(lines + of_missing(failed))


def _knobs(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    own = [row for row in rows if row["name"] == name and row["knob"]]
    return ", ".join(f"{row['keep']:g}: `{row['knob']}`" for row in own) or "-"
