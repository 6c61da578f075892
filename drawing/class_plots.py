"""Plots of what a segmenter scores class by class.

C classes.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .palette import ACCENT, BLUE, INK, MUTED, PAPER
from .plots import SHARE, WIDTH, styled

COLUMN = 50  # bars below each other; more classes take another column
MOST_COLUMNS = 4
WORST = 8  # classes whose confusion is shown
CONFUSED = 3  # other classes shown for each of them
# On the colours of SHARE, which are the same in light and dark pages; the palette's are not.
DARK, LIGHT = "#14202e", "#fdfefe"


@styled
def iou_bars(iou: np.ndarray, names: Sequence[str]) -> Figure:
    """IoU of each class [C] in percent, the best first; NaN: a class that does not occur, left out.

    Many classes take several columns.
    """
    occurring = np.flatnonzero(~np.isnan(iou))
    order = occurring[np.argsort(-iou[occurring], kind="stable")]
    columns = min(MOST_COLUMNS, max(1, -(-len(order) // COLUMN)))
    rows = max(1, -(-len(order) // columns))
    dense = rows > 25
    pitch = 0.15 if dense else 0.2
    width = WIDTH if columns == 1 else 2.9 * columns
    figure = Figure(figsize=(width, 0.9 + pitch * max(rows, 3)))
    panels = figure.subplots(1, columns, squeeze=False)[0]
    mean = iou[occurring].mean() if len(occurring) else float("nan")
    for index, axes in enumerate(panels):
        part = order[index * rows : (index + 1) * rows]
        places = np.arange(len(part))
        axes.barh(places, iou[part], height=0.72, color=BLUE)
        axes.axvline(mean, color=ACCENT, linewidth=1.2, zorder=1.5)
        for place, label in enumerate(part):
            axes.text(
                iou[label] + 1.5,
                place,
                f"{iou[label]:.1f}",
                va="center",
                fontsize=6.5 if dense else 7.5,
                color=INK,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6},
            )
        axes.set_yticks(places, [_short(names[label], 18) for label in part])
        axes.tick_params(axis="y", length=0, labelsize=6.5 if dense else 8)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_xlim(0, 112)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
    missing = len(iou) - len(occurring)
    left_out = f"; without pixels: {missing}" if missing else ""
    panels[0].set_xlabel(f"%  (line: mean {mean:.1f}{left_out})")
    panels[0].set_title("IoU of each class")
    return figure


def worst_classes(confusion: np.ndarray, iou: np.ndarray, count: int = WORST) -> list[int]:
    """The classes with the lowest IoU among those with labelled pixels, the lowest first."""
    labelled = np.flatnonzero(confusion.sum(axis=1))
    return labelled[np.argsort(iou[labelled], kind="stable")][:count].tolist()


@styled
def confusion_of_worst(confusion: np.ndarray, iou: np.ndarray, names: Sequence[str]) -> Figure:
    """What the pixels of the worst classes were predicted as, from a confusion matrix [C, C] with
    labels in rows: a cell for the class itself, for the others most often predicted, for the rest.
    """
    worst = worst_classes(confusion, iou)
    figure = Figure(figsize=(6.4, 0.75 + 0.34 * max(len(worst), 2)))
    axes = figure.subplots()
    axes.grid(False)
    for row, label in enumerate(worst):
        shares = confusion[label] / confusion[label].sum()
        others = [other for other in np.argsort(-shares, kind="stable") if other != label]
        shown = [other for other in others[:CONFUSED] if shares[other]]
        cells = [("", shares[label])] + [(names[other], shares[other]) for other in shown]
        for column, (name, share) in enumerate(cells):
            _cell(axes, row, column, name, share)
        rest = 1 - sum(share for _, share in cells)
        if rest > 5e-4:
            _cell(axes, row, CONFUSED + 1, "", rest)
    columns = ["rightly", *("taken for" for _ in range(CONFUSED)), "others"]
    axes.set_xlim(0, CONFUSED + 2)
    axes.set_ylim(max(len(worst), 1), 0)
    axes.set_xticks(np.arange(CONFUSED + 2) + 0.5, columns)
    axes.xaxis.tick_top()
    labels = [f"{_short(names[label], 18)}  {iou[label]:.1f}" for label in worst]
    axes.set_yticks(np.arange(len(worst)) + 0.5, labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Pixels of the classes with the lowest IoU", pad=10)
    axes.set_ylabel("class, IoU in %", color=MUTED)
    return figure


def _cell(axes, row: int, column: int, name: str, share: float) -> None:
    x = (column, column + 0.96)
    axes.fill_between(x, row + 0.04, row + 0.96, color=SHARE(share), linewidth=0)
    text = f"{_short(name, 11)} {100 * share:.0f} %".strip()
    colour = LIGHT if share > 0.5 else DARK
    axes.text(column + 0.48, row + 0.5, text, ha="center", va="center", fontsize=7.5, color=colour)


def _short(name: str, limit: int) -> str:
    """A name cut off at a length; matplotlib would set what is between $ as a formula."""
    cut = name if len(name) <= limit else name[: limit - 1] + "…"
    return cut.replace("$", r"\$")
