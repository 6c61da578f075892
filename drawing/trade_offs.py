"""Plots of a measure against what it costs, operations or time: sweeps, ablations."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from .palette import ACCENT, INK, MUTED, PAPER, SERIES
from .plots import WIDTH, save, styled

# Around the budget that a model was trained for.
RING = {
    "marker": "o",
    "markersize": 11,
    "markerfacecolor": "none",
    "markeredgecolor": ACCENT,
    "markeredgewidth": 1.4,
    "linestyle": "none",
}


class Scored(Protocol):
    """The part of a task's measure that plots use."""

    key: str
    label: str
    title: str
    higher_is_better: bool


def label_against(axes: Axes, measure: Scored, speed: bool, convention: str, example: str) -> None:
    """Labels of a plot of a measure against measured speed or operations.

    example: what an entry of the data set is called.
    """
    axes.set_ylabel(measure.label)
    per = f"MFLOPs per {example}, {convention}"
    axes.set_xlabel(f"{example}s/s, measured" if speed else per)
    axes.set_title(f"{measure.title} against {'speed' if speed else 'operations'}")


def pareto_front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Points that none beats at equal or lower cost in gain: indexes by ascending cost."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i])):
        if not front or gains[index] > gains[front[-1]]:
            front.append(index)
    return front


def save_all(output: Path, name: str, draw: Callable[[str], Figure | None]) -> None:
    """Write what `draw` makes of operations and of speed as NAME_flops.png and NAME_speed.png.

    draw: "flops" or "images_per_s" -> a figure; None: there is nothing to show.
    """
    for axis, ending in (("flops", "flops"), ("images_per_s", "speed")):
        figure = draw(axis)
        if figure is not None:
            save(figure, output / f"{name}_{ending}.png")


def _draw_budget(
    axes: Axes, where: tuple[float, float], point: dict, colour: str, named: bool
) -> None:
    """A point of a sweep with its ratio, ringed if trained; a diamond for the dense model."""
    if "token_keep_ratio" not in point:
        axes.plot(*where, "D", markersize=7, color=colour)
        text, below = "dense", True
    else:
        axes.plot(*where, "o", markersize=5.5, color=colour)
        text, below = f"{point['token_keep_ratio']:g}", False
        if point["trained"]:
            axes.plot(*where, **RING)
    if named:
        axes.annotate(
            text,
            where,
            xytext=(0, -15 if below else 8),
            textcoords="offset points",
            fontsize=8,
            color=MUTED if below else INK,
            ha="center",
            path_effects=[withStroke(linewidth=3, foreground=PAPER)],
        )


@styled
def budget_curve(
    curves: Mapping[int, Sequence[dict]],
    axis: str,
    dense: Mapping[int, dict | None],
    measure: Scored,
    example: str,
) -> Figure | None:
    """A measure against operations (`axis` "exact" or "paper") or speed; None without points.

    curves: {position of the run: points of its sweep}; dense: the dense model's point of each run;
    example: what an entry of the data set is called.
    """
    speed = axis == "images_per_s"

    def place(point: dict) -> float | None:
        return point["images_per_s"] if speed else point["flops"][axis] / 1e6

    figure = Figure(figsize=(WIDTH, 3.1))
    axes = figure.subplots()
    drawn = False
    for run, points in curves.items():
        placed = [point for point in points if place(point) is not None]
        reference = dense.get(run)
        everything = list(placed)
        if reference and reference.get(measure.key) is not None and place(reference) is not None:
            everything.append(reference)
        drawn = drawn or bool(everything)
        where = [place(point) for point in everything]
        values = [point[measure.key] for point in everything]
        front = pareto_front(
            [-x for x in where] if speed else where,
            values if measure.higher_is_better else [-value for value in values],
        )
        colour = SERIES[run % len(SERIES)]
        line = [where[i] for i in front], [values[i] for i in front]
        axes.plot(*line, color=colour, zorder=1)
        for point, x, y in zip(everything, where, values, strict=True):
            # With several curves there is only room to name their ends and the trained budget.
            named = len(curves) == 1 or point.get("trained") or point in (placed[0], placed[-1])
            _draw_budget(axes, (x, y), point, colour, named)
    axes.margins(0.12, 0.18)
    label_against(axes, measure, speed, axis, example)
    front = Line2D([], [], color=MUTED, label="Pareto front")
    axes.legend(handles=[front, Line2D([], [], label="trained budget", **RING)])
    return figure if drawn else None


@styled
def variants(rows: Sequence[Mapping], axis: str, measure: Scored, example: str) -> Figure | None:
    """A measure of an ablation against operations (`axis` "flops") or speed; None without data.

    A marker and a bar for mean and standard deviation over the seeds, a dot for each run; the first
    row is the dense model, with a line across at its value. example: as of `label_against`.
    """
    drawn = [row for row in rows if row["n"] and row[axis] is not None]
    if not drawn:
        return None
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.subplots()
    scale = 1e6 if axis == "flops" else 1
    for index, row in enumerate(drawn):
        x, dense, mean = row[axis] / scale, row is rows[0], row[measure.key]
        colour = INK if dense else SERIES[(index - 1) % len(SERIES)]
        marker = "D" if dense else "os^vPX*"[(index - 1) % 7]
        values = row[f"{measure.key}_of_runs"]
        axes.plot([x] * row["n"], values, ".", markersize=4, color=colour, alpha=0.5)
        axes.errorbar(
            x,
            mean,
            yerr=row["sd"],
            fmt=marker,
            markersize=6,
            capsize=3,
            linewidth=1.2,
            color=colour,
            label=row["name"],
        )
        if dense:
            axes.axhline(mean, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.margins(0.08, 0.12)
    label_against(axes, measure, axis != "flops", "exact", example)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
