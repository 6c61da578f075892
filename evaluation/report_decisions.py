"""What a report shows of decisions: plots over the data set, pictures of single images."""

from typing import Any

import numpy as np
from markupsafe import Markup

from drawing import plots
from drawing.page import embedded, svg
from drawing.pictures import flops_text
from drawing.runs import RunFolder
from evaluation.decisions import read_keep_maps
from utils.files import read_csv

GIF_BYTES = 2_000_000  # larger animations are not embedded


def decision_charts(run: RunFolder) -> list[Markup]:
    """The model's decisions over the data set, drawn from the numbers of its evaluation."""
    folder, charts = run.folder / "decisions", []
    try:
        if (folder / "gates.csv").exists():
            _layer, forward, backward, stage = read_csv(folder / "gates.csv").T
            gates = np.stack([forward, backward], axis=1)
            alt = (
                f"Heat map of gate means by layer and direction; on average {gates.mean():.2f} of "
                "the scans run"
            )
            charts.append((plots.gates(gates, np.flatnonzero(stage).tolist()), alt))
        if (folder / "keep_maps.csv").exists():
            keep, grid = read_keep_maps(folder / "keep_maps.csv")
            shares = ", ".join(f"{100 * share:.0f} %" for share in keep.mean(axis=1))
            charts.append(
                (
                    plots.keep_maps(keep, grid),
                    f"Maps of how often each patch is kept after each stage: {shares}",
                )
            )
            if len(grid or ()) == 3:
                alt = "Share of each frame's patches that every stage keeps, on average"
                charts.append((plots.kept_per_frame(keep, grid[0]), alt))
        if (folder / "costs.csv").exists():
            costs = read_csv(folder / "costs.csv")[:, 0]
            alt = (
                f"Histogram of operations an image: mean {flops_text(costs.mean())}, from "
                f"{flops_text(costs.min())} to {flops_text(costs.max())}"
            )
            charts.append((plots.costs(costs), alt))
    except (OSError, ValueError, IndexError) as error:
        run.notes.append(f"decisions: a table cannot be read ({error})")
    return [Markup(svg(figure, alt)) for figure, alt in charts]


def sample_pictures(run: RunFolder) -> list[dict[str, Any]]:
    """Pictures of decisions that the run's evaluation left."""
    pictures = []
    for path in [
        *sorted(run.folder.glob("decisions/sample*.gif")),
        *sorted(run.folder.glob("decisions/sample*.png")),
        run.folder / "kept_patches.png",
    ]:
        if not path.exists():
            continue
        if path.suffix == ".gif" and path.stat().st_size > GIF_BYTES:
            run.notes.append(f"{path.name} is left out, {path.stat().st_size / 1e6:.1f} MB")
            continue
        alt = (
            f"{run.name}, {path.stem}: image, tokens kept after each stage, likeliest classes, "
            "scans and cost"
        )
        if path.suffix == ".gif":
            alt = f"{run.name}, {path.stem} in motion: what each stage keeps of every frame"
        if path.name == "kept_patches.png":
            alt = (
                f"{run.name}: validation images, and below each what every stage left of it, "
                "dropped patches dimmed"
            )
        pictures.append((path, alt))
    return embedded(run, pictures)
