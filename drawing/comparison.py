"""Plot of ways to reduce tokens at several budgets, beside dense models."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from .palette import INK, MUTED, SERIES
from .plots import styled
from .trade_offs import Scored, label_against, pareto_front

MARKERS = "os^vPX*d"
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # for more methods than there are colours


@styled
def comparison(rows: Sequence[Mapping], axis: str, measure: Scored, example: str) -> Figure | None:
    """A measure against operations (`axis` "flops") or speed; None without data.

    One line per method through its budgets, with bars for the standard deviation over the seeds.
    Rows without a `keep` are dense models: the teacher, with a line across at its value, and
    smaller ones. The broad grey line is the Pareto front of all points. example: as of
    `label_against`.
    """
    drawn = [row for row in rows if row["n"] and row[axis] is not None]
    if not drawn:
        return None
    figure = Figure(figsize=(6.8, 3.8))
    axes = figure.subplots()
    scale = 1e6 if axis == "flops" else 1

    def places(chosen: Sequence[Mapping]) -> tuple[list[float], list[float]]:
        return [row[axis] / scale for row in chosen], [row[measure.key] for row in chosen]

    dense = [row for row in drawn if row["keep"] is None]
    for index, row in enumerate(dense):
        x, y = places([row])
        teacher = row["name"] == "dense"
        axes.errorbar(
            x,
            y,
            yerr=row["sd"],
            fmt="D" if teacher else "ph<>"[index % 4],
            markersize=7,
            capsize=3,
            linewidth=1,
            color=INK,
            markerfacecolor=INK if teacher else "none",
            label=row["name"],
        )
        if teacher:
            axes.axhline(y[0], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    methods = dict.fromkeys(row["name"] for row in drawn if row["keep"] is not None)
    for index, name in enumerate(methods):
        points = [row for row in drawn if row["name"] == name and row["keep"] is not None]
        points.sort(key=lambda row: -row["keep"])
        axes.errorbar(
            *places(points),
            yerr=[row["sd"] or 0 for row in points],
            marker=MARKERS[index % len(MARKERS)],
            linestyle=DASHES[index // len(SERIES) % len(DASHES)],
            markersize=5,
            capsize=3,
            linewidth=1.4,
            elinewidth=1,
            color=SERIES[index % len(SERIES)],
            label=name,
        )
    x, y = places(drawn)
    front = pareto_front(
        [-value for value in x] if axis != "flops" else x,
        y if measure.higher_is_better else [-value for value in y],
    )
    axes.plot(
        [x[i] for i in front],
        [y[i] for i in front],
        color=MUTED,
        alpha=0.25,
        linewidth=6,
        zorder=0,
        label="Pareto front",
    )
    axes.margins(0.08, 0.12)
    label_against(axes, measure, axis != "flops", "exact", example)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
