"""What a report shows of trainings: arguments, versions, every number of their logs."""

from typing import Any

from markupsafe import Markup

from utils.logging import NOT_PLOTTED

from . import plots
from .page import svg
from .runs import RunFolder, is_number

GROUPS = ("Validation", "Loss terms", "Tokens kept and gates", "Optimisation")


def argument_rows(runs: list[RunFolder]) -> list[dict[str, Any]]:
    """Every argument with its value in each run, those that differ first."""
    names = sorted({name for run in runs for name in run.args})
    rows = []
    for name in names:
        values = [_argument(run.args[name]) if name in run.args else "–" for run in runs]
        rows.append({"name": name, "values": values, "differs": len(set(values)) > 1})
    return sorted(rows, key=lambda row: not row["differs"])


def _argument(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def environment_rows(runs: list[RunFolder]) -> list[dict[str, Any]]:
    """Versions and hardware of the training, and what the evaluation ran on."""
    rows: dict[str, list[str]] = {}
    # The most complete one sets the order.
    for run in sorted(runs, key=lambda run: -len(run.environment)):
        evaluated = run.evaluation or {}
        facts = run.environment | {
            f"evaluation: {key}": evaluated[key]
            for key in ("device", "backend", "precision", "batch_size")
            if evaluated.get(key) is not None
        }
        for key, value in facts.items():
            rows.setdefault(key, ["–"] * len(runs))[run.position] = str(value)
    return [
        {"name": name, "values": values, "differs": len(set(values) - {"–"}) > 1}
        for name, values in rows.items()
    ]


def group_of(name: str) -> str:
    """The section in which a quantity of log.txt is drawn."""
    if not name.startswith("train_"):
        return "Validation"
    if name.startswith(("train_keep", "train_gate")):
        return "Tokens kept and gates"
    return (
        "Optimisation"
        if name in ("train_lr", "train_skipped_steps", "train_grad_norm")
        else "Loss terms"
    )


def time_charts(runs: list[RunFolder]) -> dict[str, list[Markup]]:
    """Plots over the epochs of every number in log.txt, under its name there, by section."""
    names = dict.fromkeys(
        name for run in runs for record in run.log for name in record if name not in NOT_PLOTTED
    )
    charts: dict[str, list[Markup]] = {group: [] for group in GROUPS}
    for name in names:
        curves, ranges = {}, []
        for run in runs:
            points = [
                (record["epoch"] + 1, record[name])
                for record in run.log
                if is_number(record.get(name))
            ]
            if points:
                curves[run.position] = tuple(zip(*points, strict=True))
                ranges.append(f"{run.name} from {points[0][1]:.4g} to {points[-1][1]:.4g}")
        if curves:
            alt = f"{name} over the epochs: {'; '.join(ranges)}"
            charts[group_of(name)].append(Markup(svg(plots.over_epochs(name, curves), alt)))
    return {group: drawn for group, drawn in charts.items() if drawn}
