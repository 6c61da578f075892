"""Plots of decisions and of training, and the style of all plots.

M patches, S stages, C classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.files import atomic_file

from .palette import ACCENT, BLUE, GRID, INK, MUTED, PAPER, SERIES

STYLE = {
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "font.family": "DejaVu Sans",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "dyvm",
    "image.cmap": "viridis",
}
# From never to always; the same for gates and for patches. None of the colours is in the palette,
# whose colours a page in dark mode replaces.
SHARE = LinearSegmentedColormap.from_list("share", ["#edf2f7", "#9cc3e6", "#2d6db1", "#123a63"])
MANY_CLASSES = 40  # from here on the names of classes no longer fit beside their rows
MAP_COLUMNS = 16  # maps of slots beside each other
WIDTH = 4.4  # inches; small, so that type is readable when a phone shrinks the plot to its width

styled = matplotlib.rc_context(STYLE)


def _figure(
    width: float, height: float, columns: int = 1, rows: int = 1, **kwargs
) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


@styled
def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _mark_stages(axes: Axes, pruning_layers: Sequence[int]) -> None:
    for layer in pruning_layers:
        axes.axvline(layer - 0.5, color=ACCENT, linewidth=1.2, linestyle=(0, (2, 2)))


@styled
def gates(means: np.ndarray, pruning_layers: Sequence[int] = ()) -> Figure:
    """Heat map of gate means [depth, 2]: layers across, directions down."""
    figure, [[axes]] = _figure(WIDTH, 2.0)
    axes.grid(False)
    mesh = axes.pcolormesh(
        np.arange(len(means) + 1) - 0.5,
        [0, 1, 2],
        means.T,
        cmap=SHARE,
        vmin=0,
        vmax=1,
        edgecolors=PAPER,
        linewidth=1,
    )
    axes.set_yticks([0.5, 1.5], ["forward", "backward"])
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.set_xlabel(
        "layer" + (" (dashed: before it, patches are dropped)" if pruning_layers else "")
    )
    axes.set_title("Share of images whose scan runs")
    _mark_stages(axes, pruning_layers)
    bar = figure.colorbar(mesh, ax=axes, ticks=[0, 0.5, 1], aspect=8, pad=0.02)
    bar.outline.set_visible(False)
    return figure


@styled
def gates_per_class(means: np.ndarray, names: Sequence[str]) -> Figure:
    """Heat maps of gate means [C, depth, 2], one a direction: layers across, classes down."""
    named = len(names) <= MANY_CLASSES
    figure, [panels] = _figure(
        6.4, max(2.4, min(9.0, 1.1 + 0.22 * len(names))), columns=2, sharey=True
    )
    for direction, (axes, title) in enumerate(zip(panels, ("forward", "backward"), strict=True)):
        axes.grid(False)
        image = axes.imshow(
            means[:, :, direction],
            cmap=SHARE,
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    if named:
        panels[0].set_yticks(range(len(names)), [name[:24] for name in names])
    panels[0].set_ylabel("class")
    figure.colorbar(
        image, ax=list(panels), ticks=[0, 0.5, 1], aspect=30, pad=0.02
    ).outline.set_visible(False)
    return figure


@styled
def costs(flops: np.ndarray) -> Figure:
    """Histogram of the operations of each image [N]."""
    factor, unit = (1e9, "GFLOPs") if flops.mean() >= 1e9 else (1e6, "MFLOPs")
    figure, [[axes]] = _figure(WIDTH, 2.6)
    axes.hist(
        flops / factor,
        bins=min(40, max(1, len(np.unique(flops)))),
        color=BLUE,
        edgecolor=PAPER,
        linewidth=0.5,
    )
    axes.axvline(flops.mean() / factor, color=ACCENT, linewidth=1.4)
    axes.set_title("Cost of an image")
    axes.set_xlabel(f"{unit}, exact  (line: mean {flops.mean() / factor:.2f})")
    axes.set_ylabel("images")
    axes.grid(axis="x", visible=False)
    return figure


@styled
def keep_maps(keep: np.ndarray, grid: tuple[int, ...] | None = None) -> Figure:
    """Maps [S, M] of how often each stage keeps each patch, on a grid (h, w), square by default, or
    on that of clips (s, h, w).
    """
    grid = grid or (round(keep.shape[1] ** 0.5),) * 2
    if len(grid) == 3:
        return _keep_strips(keep, grid)
    columns = max(3, len(keep))  # fewer would be drawn larger than the other plots of a page
    figure, [panels] = _figure(0.8 + 1.2 * columns, 1.8, columns=columns)
    for axes in panels[len(keep) :]:
        axes.set_visible(False)
    for stage, (axes, values) in enumerate(zip(panels, keep, strict=False)):
        axes.grid(False)
        image = axes.imshow(
            values.reshape(grid), cmap=SHARE, vmin=0, vmax=1, interpolation="nearest"
        )
        axes.set_title(f"stage {stage + 1}: {100 * values.mean():.0f} %")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(
        image, ax=list(panels), ticks=[0, 0.5, 1], aspect=12, shrink=0.8, pad=0.03
    )
    bar.outline.set_visible(False)
    return figure


def _keep_strips(keep: np.ndarray, grid: tuple[int, ...]) -> Figure:
    """A row for each stage [S, M]: the maps of a clip's slots, and above each its share. Of many
    slots every second, third, ... one is shown.
    """
    stages, shown = len(keep), range(0, grid[0], -(-grid[0] // MAP_COLUMNS))
    figure, panels = _figure(
        max(WIDTH, 0.7 * len(shown)), 0.4 + 0.9 * stages, rows=stages, columns=len(shown)
    )
    for stage, (row, values) in enumerate(zip(panels, keep.reshape(stages, *grid), strict=True)):
        for slot, axes in zip(shown, row, strict=True):
            axes.grid(False)
            axes.imshow(values[slot], cmap=SHARE, vmin=0, vmax=1, interpolation="nearest")
            share = f"{100 * values[slot].mean():.0f} %"
            title = share if len(shown) == grid[0] else f"{slot + 1}: {share}"
            axes.set_title(title, loc="center", fontsize=7)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(f"stage {stage + 1}")
    return figure


@styled
def kept_per_frame(keep: np.ndarray, slots: int) -> Figure:
    """Curves [S, M] of the share of each frame's (or slot's) patches that a stage keeps."""
    figure, [[axes]] = _figure(3.4, 2.1)
    shares = 100 * keep.reshape(len(keep), slots, -1).mean(axis=2)
    places = np.arange(1, slots + 1)
    for stage, values in enumerate(shares):
        colour = SERIES[stage % len(SERIES)]
        axes.plot(places, values, color=colour, marker="o" if slots <= 16 else None, markersize=3)
        axes.annotate(
            f"stage {stage + 1}",
            (places[-1], values[-1]),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    axes.set_title("Patches kept in each frame")
    axes.set_xlabel("frame, or tubelet, of the clip")
    axes.set_ylabel("%")
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure


@styled
def over_epochs(name: str, runs: Mapping[int, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """One quantity over time; runs: {position of the run, its colour: (epochs, values)}."""
    figure, [[axes]] = _figure(3.4, 2.1)
    for position, (epochs, values) in runs.items():
        marker = "o" if len(epochs) < 3 else None
        axes.plot(epochs, values, color=SERIES[position % len(SERIES)], marker=marker, markersize=4)
    axes.set_title(name)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure
