"""What a report shows of scores: measures, budgets, what the task itself drew, headlines."""

from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from datasets import DATA_SETS
from drawing.page import embedded, svg, wide_chart
from drawing.pictures import flops_text
from drawing.runs import RunFolder, is_number
from drawing.trade_offs import budget_curve
from evaluation.columns import EXACT, PAPER, PARAMETERS, Row, measure_row, measure_rows, speed_row
from evaluation.sweep import named_points
from tasks import CLASSIFICATION, TASKS, Measure, Task


def task_of_run(run: RunFolder) -> Task | None:
    """The task that a run records, or else that of its data set (earlier versions only classified).

    None, with a note, if it is unknown here.
    """
    row = DATA_SETS.get(str((run.evaluation or {}).get("data_set")))
    name = str(run.args.get("task") or (row.task if row else CLASSIFICATION.name))
    if name not in TASKS:
        note = f"task {name!r} is unknown here: its measures are left out"
        run.notes += [] if note in run.notes else [note]
    return TASKS.get(name)


def tasks_of(runs: Iterable[RunFolder]) -> list[Task]:
    """The tasks of the runs, each once."""
    return [task for task in dict.fromkeys(map(task_of_run, runs)) if task is not None]


def _example(runs: Iterable[RunFolder]) -> str:
    """What an entry of the runs' data sets is called."""
    words = {task.example for task in tasks_of(runs)}
    return words.pop() if len(words) == 1 else "image"


def evaluation_table(runs: list[RunFolder]) -> dict[str, Any] | None:
    """Rows of measures; columns of each run's dense and dynamic model."""
    evaluated = [run for run in runs if run.evaluation]
    columns = [
        (run, kind, _with_savings(run.evaluation, kind))
        for run in evaluated
        for kind in ("dense", "dynamic")
        if run.evaluation.get(kind)
    ]
    if not columns:
        return None
    measures = {row.label: row for task in tasks_of(evaluated) for row in measure_rows(task)}
    speed = speed_row(None, _example(evaluated))
    wanted = [*measures.values(), PAPER, EXACT, *REDUCTIONS, speed, SPEED_UP, PARAMETERS]
    rows = [
        {"name": row.label, "values": [row.cell(column, "–") for _, _, column in columns]}
        for row in wanted
    ]
    rows = [row for row in rows if set(row["values"]) != {"–"}]
    return {"columns": [{"run": run, "kind": kind} for run, kind, _ in columns], "rows": rows}


def _with_savings(evaluation: dict[str, Any], kind: str) -> dict[str, Any]:
    """A column of eval.json, that of the dynamic model with what it saves."""
    if kind == "dense":
        return evaluation[kind]
    return evaluation[kind] | {key: evaluation.get(key) for key in ("reduction", "speedup")}


def _reduction(kind: str) -> Row:
    return Row(f"reduction, {kind}", lambda column: column.get("reduction", {}).get(kind), "{:.1%}")


REDUCTIONS = [_reduction(kind) for kind in ("paper", "exact")]
SPEED_UP = Row("speed-up", lambda column: column.get("speedup"), "× {:.2f}")


def sweep_section(runs: list[RunFolder]) -> dict[str, Any] | None:
    """For each task the curves of its runs in common plots; a table for each run."""
    swept = [run for run in runs if run.sweep and run.sweep.get("dense")]
    if not swept:
        return None
    charts = [
        chart
        for task in tasks_of(swept)
        for chart in sweep_charts([run for run in swept if task_of_run(run) is task], task.best)
    ]
    return {"charts": charts, "tables": [sweep_table(run) for run in swept]}


def sweep_charts(runs: list[RunFolder], measure: Measure) -> list[Markup]:
    """Curves of a measure against operations and against speed, as far as these were measured."""
    curves = {run.position: run.sweep["points"] for run in runs}
    dense = {run.position: run.sweep["dense"] for run in runs}
    budgets = "; ".join(f"{run.name}: {_budgets_text(run, measure)}" for run in runs)
    charts = []
    example = _example(runs)
    for axis, against in (("exact", "operations (exact)"), ("images_per_s", f"{example}s/s")):
        figure = budget_curve(curves, axis, dense, measure, example)
        if figure is not None:
            alt = f"{measure.name} against {against} at each token keep ratio: {budgets}"
            charts.append(Markup(svg(figure, alt)))
    return charts


def _budgets_text(run: RunFolder, measure: Measure) -> str:
    return ", ".join(
        f"ratio {point['token_keep_ratio']:g} gives {measure.with_unit(point[measure.key])}"
        for point in run.sweep["points"]
    )


def sweep_table(run: RunFolder) -> dict[str, Any]:
    """A row for each budget of a run and for the dense model."""
    task = task_of_run(run)
    speed = speed_row(run.sweep.get("batch_size"), _example([run]))
    columns = [*([measure_row(task.best)] if task else []), EXACT, speed]
    rows = [
        {
            "name": name,
            "trained": point.get("trained", False),
            "values": [column.cell(point, "–") for column in columns],
        }
        for name, point in named_points(run.sweep)
    ]
    return {"run": run, "columns": [column.label for column in columns], "rows": rows}


def task_part(run: RunFolder) -> dict[str, Any]:
    """What the run's task itself drew of the evaluation."""
    task, charts, pictures = task_of_run(run), [], []
    if task is not None:
        try:
            charts, pictures = task.drawn_evaluation(run.folder)
        except (OSError, ValueError) as error:
            run.notes.append(f"{task.name}: a table cannot be read ({error})")
    return {
        "run": run,
        "charts": [wide_chart(figure, alt) for figure, alt in charts],
        "pictures": embedded(run, [(path, f"{run.name}, {alt}") for path, alt in pictures]),
    }


def headlines(run: RunFolder) -> list[dict[str, str]]:
    """The few numbers that a run is known by."""
    task = task_of_run(run)
    if not run.evaluation:
        return [_best_so_far(run, task.best)] if task and _logged(run, task.best) else []
    dense, dynamic = run.evaluation["dense"], run.evaluation.get("dynamic")
    shown, lines = dynamic or dense, []
    if task and is_number(shown.get(task.best.key)):
        lines.append(_score(shown, dense if dynamic else {}, task.best))
    if not dynamic:
        cost = flops_text(dense["flops"]["exact"])
        return [*lines, {"value": cost, "what": f"per {_example([run])} (exact)"}]
    reduction = f"−{100 * run.evaluation['reduction']['exact']:.1f} %"
    lines.append({"value": reduction, "what": "operations (exact)"})
    if is_number(run.evaluation.get("speedup")):
        speedup = f"× {run.evaluation['speedup']:.2f}"
        lines.append({"value": speedup, "what": f"{_example([run])}s/s, measured"})
    return lines


def _score(shown: dict[str, Any], dense: dict[str, Any], measure: Measure) -> dict[str, str]:
    """A measure, with its change from `dense` where that is known."""
    value, before = shown[measure.key], dense.get(measure.key)
    change = ""
    if is_number(before):
        difference = measure.text(value - before, signed=True).replace("-", "−")
        change = f", {difference} to dense"
    return {"value": measure.with_unit(value), "what": measure.name + change}


def _logged(run: RunFolder, measure: Measure) -> list[float]:
    """The best values so far, epoch by epoch."""
    values = (record.get(f"best_{measure.log_name}") for record in run.log)
    return [value for value in values if is_number(value)]


def _best_so_far(run: RunFolder, measure: Measure) -> dict[str, str]:
    value = _logged(run, measure)[-1]
    return {"value": measure.with_unit(value), "what": f"best {measure.name}"}
