"""One report of one or several runs: a single HTML file that needs nothing else, also on a phone
and on paper.

python report.py output/demo/dyvm                                 writes output/demo/dyvm/report.html
python report.py output/demo/dyvm output/demo/dyvm50 --output both.html
"""

import argparse
import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from drawing import plots
from drawing.pictures import flops_text
from drawing.runs import Run, read_run, run_names
from utils.arguments import OneLineParser
from utils.files import atomic_file, read_csv
from utils.program import run_main

PICTURE_WIDTH = 1600  # pixels; wider pictures are reduced
PNG_BYTES = 300_000  # pictures that take more as PNG are photographs, and become JPEG
NOT_PLOTTED = ("epoch", "n_parameters")


def argument_rows(runs: list[Run]) -> list[dict[str, Any]]:
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


def environment_rows(runs: list[Run]) -> list[dict[str, Any]]:
    """Versions and hardware of the training, and what the evaluation ran on."""
    rows: dict[str, list[str]] = {}
    for run in sorted(
        runs, key=lambda run: -len(run.environment)
    ):  # the most complete one sets the order
        evaluated = run.evaluation or {}
        told = run.environment | {
            f"evaluation: {key}": evaluated[key]
            for key in ("device", "backend", "precision")
            if key in evaluated
        }
        for key, value in told.items():
            rows.setdefault(key, ["–"] * len(runs))[run.position] = str(value)
    return [
        {"name": name, "values": values, "differs": len(set(values) - {"–"}) > 1}
        for name, values in rows.items()
    ]


GROUPS = ("Accuracy", "Loss terms", "Tokens kept and gates", "Optimisation")


def group_of(name: str) -> str:
    """The section in which a quantity of log.txt is drawn."""
    if not name.startswith("train_"):
        return "Accuracy"
    if name.startswith(("train_keep", "train_gate")):
        return "Tokens kept and gates"
    return (
        "Optimisation"
        if name in ("train_lr", "train_skipped_steps", "train_grad_norm")
        else "Loss terms"
    )


def time_charts(runs: list[Run]) -> dict[str, list[Markup]]:
    """Plots over the epochs of every number in log.txt, by section; each is named as it is there."""
    names = dict.fromkeys(
        name for run in runs for record in run.log for name in record if name not in NOT_PLOTTED
    )
    charts: dict[str, list[Markup]] = {group: [] for group in GROUPS}
    for name in names:
        curves, told = {}, []
        for run in runs:
            points = [
                (record["epoch"] + 1, record[name])
                for record in run.log
                if _is_number(record.get(name))
            ]
            if points:
                curves[run.position] = tuple(zip(*points, strict=True))
                told.append(f"{run.name} from {points[0][1]:.4g} to {points[-1][1]:.4g}")
        if curves:
            alt = f"{name} over the epochs: {'; '.join(told)}"
            charts[group_of(name)].append(Markup(plots.svg(plots.over_epochs(name, curves), alt)))
    return {group: found for group, found in charts.items() if found}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def evaluation_table(runs: list[Run]) -> dict[str, Any] | None:
    """Rows of measures; columns of each run's dense and dynamic model."""
    columns = [
        (run, kind, run.evaluation[kind])
        for run in runs
        if run.evaluation
        for kind in ("dense", "dynamic")
        if run.evaluation.get(kind)
    ]
    if not columns:
        return None
    measures = [
        ("top-1, %", lambda r, c: c.get("top1"), "{:.2f}"),
        ("top-1 of the EMA, %", lambda r, c: c.get("ema_top1"), "{:.2f}"),
        ("top-5, %", lambda r, c: c.get("top5"), "{:.2f}"),
        ("loss", lambda r, c: c.get("loss"), "{:.4f}"),
        ("MFLOPs, paper", lambda r, c: c["flops"]["paper"] / 1e6, "{:,.2f}"),
        ("MFLOPs, exact", lambda r, c: c["flops"]["exact"] / 1e6, "{:,.2f}"),
        (
            "reduction, paper",
            lambda r, c: r["reduction"]["paper"] if c is r["dynamic"] else None,
            "{:.1%}",
        ),
        (
            "reduction, exact",
            lambda r, c: r["reduction"]["exact"] if c is r["dynamic"] else None,
            "{:.1%}",
        ),
        ("images/s", lambda r, c: c.get("images_per_s"), "{:,.1f}"),
        ("speed-up", lambda r, c: r["speedup"] if c is r["dynamic"] else None, "× {:.2f}"),
        ("parameters", lambda r, c: c.get("parameters"), "{:,}"),
    ]
    rows = [
        {
            "name": name,
            "values": [_shown(read(run.evaluation, column), form) for run, _, column in columns],
        }
        for name, read, form in measures
    ]
    rows = [row for row in rows if set(row["values"]) != {"–"}]
    return {"columns": [{"run": run, "kind": kind} for run, kind, _ in columns], "rows": rows}


def _shown(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)


def sweep_section(runs: list[Run]) -> dict[str, Any] | None:
    """Curves of all runs in common plots, and a table for each."""
    swept = [run for run in runs if run.sweep and run.sweep.get("dense")]
    if not swept:
        return None
    curves = {run.position: run.sweep["points"] for run in swept}
    dense = {run.position: run.sweep["dense"] for run in swept}
    charts = []
    for axis, against in (("exact", "operations (exact)"), ("images_per_s", "measured images/s")):
        figure = plots.budget_curve(curves, axis, dense)
        if figure is not None:
            told = "; ".join(
                f"{run.name}: "
                + ", ".join(
                    f"ratio {point['token_keep_ratio']:g} gives {point['top1']:.2f} %"
                    for point in run.sweep["points"]
                )
                for run in swept
            )
            charts.append(
                Markup(
                    plots.svg(figure, f"top-1 against {against} at each token keep ratio: {told}")
                )
            )
    tables = []
    for run in swept:
        named = [(f"{p['token_keep_ratio']:g}", p) for p in run.sweep["points"]] + [
            ("dense", run.sweep["dense"])
        ]
        tables.append(
            {
                "run": run,
                "rows": [
                    {
                        "name": name,
                        "trained": point.get("trained", False),
                        "values": [
                            _shown(point.get("top1"), "{:.2f}"),
                            f"{point['flops']['exact'] / 1e6:,.2f}",
                            _shown(point.get("images_per_s"), "{:,.1f}"),
                        ],
                    }
                    for name, point in named
                ],
            }
        )
    return {"charts": charts, "tables": tables}


def decision_charts(run: Run) -> list[Markup]:
    """What the run's model decided over the data set, drawn from the numbers of its evaluation."""
    folder, charts = run.folder / "decisions", []
    try:
        if (folder / "gates.csv").exists():
            _layer, forward, backward, stage = read_csv(folder / "gates.csv").T
            gates = np.stack([forward, backward], axis=1)
            alt = f"Heat map of gate means by layer and direction; on average {gates.mean():.2f} of the scans run"
            charts.append((plots.gates(gates, np.flatnonzero(stage).tolist()), alt))
        if (folder / "keep_maps.csv").exists():
            keep = read_csv(folder / "keep_maps.csv")[:, 1:].T
            shares = ", ".join(f"{100 * share:.0f} %" for share in keep.mean(axis=1))
            charts.append(
                (
                    plots.keep_maps(keep),
                    f"Maps of how often each patch is kept after each stage: {shares}",
                )
            )
        if (folder / "costs.csv").exists():
            costs = read_csv(folder / "costs.csv")[:, 0]
            alt = (
                f"Histogram of operations an image: mean {flops_text(costs.mean())}, from "
                f"{flops_text(costs.min())} "
                f"to {flops_text(costs.max())}"
            )
            charts.append((plots.costs(costs), alt))
    except (OSError, ValueError, IndexError) as error:
        run.notes.append(f"decisions: a table cannot be read ({error})")
    return [Markup(plots.svg(figure, alt)) for figure, alt in charts]


def sample_pictures(run: Run) -> list[dict[str, Any]]:
    """Pictures that the run's evaluation left, as data URIs with their alternative text."""
    found = []
    for path in sorted(run.folder.glob("decisions/sample*.png")) + [
        run.folder / "kept_patches.png"
    ]:
        if not path.exists():
            continue
        alt = f"{run.name}, {path.stem}: image, tokens kept after each stage, likeliest classes, scans and cost"
        if path.name == "kept_patches.png":
            alt = f"{run.name}: validation images, and below each what every stage left of it, dropped patches dimmed"
        try:
            uri, size = picture_uri(path)
            found.append({"uri": uri, "alt": alt, "size": size, "strip": size[0] > 2.5 * size[1]})
        except (OSError, UnidentifiedImageError) as error:
            run.notes.append(f"{path.name} cannot be read ({error})")
    return found


def picture_uri(path: Path) -> tuple[str, tuple[int, int]]:
    """A picture as a data URI of bounded size; its width and height."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    if picture.width > PICTURE_WIDTH:
        height = round(picture.height * PICTURE_WIDTH / picture.width)
        picture = picture.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    content, kind = io.BytesIO(), "png"
    picture.save(content, format="PNG", optimize=True)
    if content.tell() > PNG_BYTES:
        content, kind = io.BytesIO(), "jpeg"
        picture.save(content, format="JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}", picture.size


def headlines(run: Run) -> list[dict[str, str]]:
    """The few numbers that a run is known by."""
    if not run.evaluation:
        best = max(
            (record["best_acc1"] for record in run.log if _is_number(record.get("best_acc1"))),
            default=None,
        )
        return [] if best is None else [{"value": f"{best:.2f} %", "what": "best top-1"}]
    dense, dynamic = run.evaluation["dense"], run.evaluation.get("dynamic")
    shown = dynamic or dense
    told = []
    if _is_number(shown.get("top1")):
        change = (
            f", {shown['top1'] - dense['top1']:+.2f} to dense"
            if dynamic and _is_number(dense.get("top1"))
            else ""
        )
        change = change.replace("-", "−")
        told.append({"value": f"{shown['top1']:.2f} %", "what": "top-1" + change})
    if dynamic:
        told.append(
            {
                "value": f"−{100 * run.evaluation['reduction']['exact']:.1f} %",
                "what": "operations (exact)",
            }
        )
        if _is_number(run.evaluation.get("speedup")):
            told.append(
                {"value": f"× {run.evaluation['speedup']:.2f}", "what": "images/s, measured"}
            )
    else:
        told.append({"value": flops_text(dense["flops"]["exact"]), "what": "an image (exact)"})
    return told


def render(runs: list[Run]) -> str:
    """The report as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "drawing"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    decided = [
        {"run": run, "charts": decision_charts(run), "pictures": sample_pictures(run)}
        for run in runs
    ]
    return environment.get_template("report.html").render(
        runs=[{"run": run, "headlines": headlines(run), "what": _what(run)} for run in runs],
        arguments=argument_rows(runs),
        environment=environment_rows(runs),
        charts=time_charts(runs),
        evaluation=evaluation_table(runs),
        sweep=sweep_section(runs),
        decided=[part for part in decided if part["charts"] or part["pictures"]],
        palette=Markup(plots.css_variables()),
    )


def _what(run: Run) -> str:
    evaluated = run.evaluation or {}
    model = evaluated.get("model") or run.args.get("model", "model")
    data_set = evaluated.get("data_set") or run.args.get("data_set", "data")
    epochs = f", {len(run.log)} {'epoch' if len(run.log) == 1 else 'epochs'}" if run.log else ""
    return f"{model} on {data_set}{epochs}"


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        prog="report.py",
        description="Write one HTML report of one or several runs.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="what a run had as --output_dir"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html in the first RUN_DIR"
    )
    args = parser.parse_args(argv)
    names = run_names(args.runs)
    runs = [
        read_run(folder, name, position)
        for position, (folder, name) in enumerate(zip(args.runs, names, strict=True))
    ]
    output = args.output or args.runs[0] / "report.html"
    text = render(runs)
    with atomic_file(output) as file:
        file.write(text.encode())
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(
        f"report of {len(runs)} {'run' if len(runs) == 1 else 'runs'}: {output} "
        f"({len(text) / 1e6:.1f} MB)"
    )


if __name__ == "__main__":
    run_main(main)
