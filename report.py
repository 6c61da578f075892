"""One report on one or several runs: a single, self-contained HTML file.

python report.py output/demo/dyvm                    writes output/demo/dyvm/report.html
python report.py output/demo/dyvm output/demo/dyvm50 --output both.html
"""

from utils.startup import prepare

prepare()

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from datasets import DATA_SETS
from drawing import plots
from drawing.pictures import flops_text
from drawing.runs import RunFolder, read_run, run_names
from evaluation.columns import (
    EXACT,
    PAPER,
    PARAMETERS,
    SPEED,
    Row,
    measure_row,
    measure_rows,
    speed_row,
)
from evaluation.decisions import read_keep_maps
from evaluation.sweep import named_points
from tasks import CLASSIFICATION, TASKS, Measure, Task
from utils.arguments import HelpFormatter, OneLineParser
from utils.files import atomic_file, read_csv
from utils.logging import NOT_PLOTTED
from utils.program import run_main

PICTURE_WIDTH = 1600  # pixels; wider pictures are reduced
PNG_BYTES = 300_000  # pictures that take more as PNG are photographs, and become JPEG
GIF_BYTES = 2_000_000  # larger animations are not embedded


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


GROUPS = ("Validation", "Loss terms", "Tokens kept and gates", "Optimisation")


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
                if _is_number(record.get(name))
            ]
            if points:
                curves[run.position] = tuple(zip(*points, strict=True))
                ranges.append(f"{run.name} from {points[0][1]:.4g} to {points[-1][1]:.4g}")
        if curves:
            alt = f"{name} over the epochs: {'; '.join(ranges)}"
            charts[group_of(name)].append(Markup(plots.svg(plots.over_epochs(name, curves), alt)))
    return {group: drawn for group, drawn in charts.items() if drawn}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


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


def tasks_of(runs: list[RunFolder]) -> list[Task]:
    """The tasks of the runs, each once."""
    return [task for task in dict.fromkeys(map(task_of_run, runs)) if task is not None]


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
    wanted = [*measures.values(), PAPER, EXACT, *REDUCTIONS, SPEED, SPEED_UP, PARAMETERS]
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
    for axis, against in (("exact", "operations (exact)"), ("images_per_s", "measured images/s")):
        figure = plots.budget_curve(curves, axis, dense, measure)
        if figure is not None:
            alt = f"{measure.name} against {against} at each token keep ratio: {budgets}"
            charts.append(Markup(plots.svg(figure, alt)))
    return charts


def _budgets_text(run: RunFolder, measure: Measure) -> str:
    return ", ".join(
        f"ratio {point['token_keep_ratio']:g} gives {measure.with_unit(point[measure.key])}"
        for point in run.sweep["points"]
    )


def sweep_table(run: RunFolder) -> dict[str, Any]:
    """A row for each budget of a run and for the dense model."""
    task = task_of_run(run)
    speed = speed_row(run.sweep.get("batch_size"))
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
    return [Markup(plots.svg(figure, alt)) for figure, alt in charts]


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


def embedded(run: RunFolder, pictures: list[tuple[Path, str]]) -> list[dict[str, Any]]:
    """Pictures as data URIs with their alternative texts; a note for those that are damaged."""
    shown = []
    for path, alt in pictures:
        try:
            uri, size = picture_uri(path)
            shown.append({"uri": uri, "alt": alt, "size": size, "strip": size[0] > 2.5 * size[1]})
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            run.notes.append(f"{path.name} cannot be read ({error})")
    return shown


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


def wide_chart(figure: Figure, alt: str) -> dict[str, Any]:
    """A plot as SVG with the width in CSS pixels at which its type is still readable."""
    inches = figure.get_figwidth()
    return {
        "svg": Markup(plots.svg(figure, alt)),
        "least": round(80 * inches) if inches > plots.WIDTH else 0,
        "full": inches > 1.5 * plots.WIDTH,
    }


def picture_uri(path: Path) -> tuple[str, tuple[int, int]]:
    """A picture as a data URI of bounded size; its width and height."""
    with Image.open(path) as image:
        if path.suffix == ".gif":
            return _data_uri("gif", path.read_bytes()), image.size
        picture = image.convert("RGB")
    if picture.width > PICTURE_WIDTH:
        height = round(picture.height * PICTURE_WIDTH / picture.width)
        picture = picture.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    content, kind = io.BytesIO(), "png"
    picture.save(content, format="PNG", optimize=True)
    if content.tell() > PNG_BYTES:
        content, kind = io.BytesIO(), "jpeg"
        picture.save(content, format="JPEG", quality=88)
    return _data_uri(kind, content.getvalue()), picture.size


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def headlines(run: RunFolder) -> list[dict[str, str]]:
    """The few numbers that a run is known by."""
    task = task_of_run(run)
    if not run.evaluation:
        return [_best_so_far(run, task.best)] if task and _logged(run, task.best) else []
    dense, dynamic = run.evaluation["dense"], run.evaluation.get("dynamic")
    shown, lines = dynamic or dense, []
    if task and _is_number(shown.get(task.best.key)):
        lines.append(_score(shown, dense if dynamic else {}, task.best))
    if not dynamic:
        cost = flops_text(dense["flops"]["exact"])
        return [*lines, {"value": cost, "what": "an image (exact)"}]
    reduction = f"−{100 * run.evaluation['reduction']['exact']:.1f} %"
    lines.append({"value": reduction, "what": "operations (exact)"})
    if _is_number(run.evaluation.get("speedup")):
        speedup = f"× {run.evaluation['speedup']:.2f}"
        lines.append({"value": speedup, "what": "images/s, measured"})
    return lines


def _score(shown: dict[str, Any], dense: dict[str, Any], measure: Measure) -> dict[str, str]:
    """A measure, with its change from `dense` where that is known."""
    value, before = shown[measure.key], dense.get(measure.key)
    change = ""
    if _is_number(before):
        difference = measure.text(value - before, signed=True).replace("-", "−")
        change = f", {difference} to dense"
    return {"value": measure.with_unit(value), "what": measure.name + change}


def _logged(run: RunFolder, measure: Measure) -> list[float]:
    """The best values so far, epoch by epoch."""
    values = (record.get(f"best_{measure.log_name}") for record in run.log)
    return [value for value in values if _is_number(value)]


def _best_so_far(run: RunFolder, measure: Measure) -> dict[str, str]:
    value = _logged(run, measure)[-1]
    return {"value": measure.with_unit(value), "what": f"best {measure.name}"}


def render(runs: list[RunFolder]) -> str:
    """The report as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "drawing"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = [run for run in runs if run.decided]
    of_tasks = [task_part(run) for run in own]
    decided = [
        {"run": run, "charts": decision_charts(run), "pictures": sample_pictures(run)}
        for run in own
    ]
    return environment.get_template("report.html").render(
        runs=[{"run": run, "headlines": headlines(run), "what": _what(run)} for run in runs],
        arguments=argument_rows(runs),
        environment=environment_rows(runs),
        charts=time_charts(runs),
        evaluation=evaluation_table(runs),
        sweep=sweep_section(runs),
        of_tasks=[part for part in of_tasks if part["charts"] or part["pictures"]],
        decided=[part for part in decided if part["charts"] or part["pictures"]],
        palette=Markup(plots.css_variables()),
    )


def _what(run: RunFolder) -> str:
    evaluated = run.evaluation or {}
    model = evaluated.get("model") or run.args.get("model", "model")
    data_set = evaluated.get("data_set") or run.args.get("data_set", "data")
    epochs = f", {len(run.log)} {'epoch' if len(run.log) == 1 else 'epochs'}" if run.log else ""
    return f"{model} on {data_set}{epochs}"


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        prog="report.py",
        description="Write one HTML report on one or several runs.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="--output_dir of a run"
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
        file.write(text.encode(errors="backslashreplace"))
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(
        f"report of {len(runs)} {'run' if len(runs) == 1 else 'runs'}: {output} "
        f"({len(text) / 1e6:.1f} MB)"
    )


if __name__ == "__main__":
    run_main(main)
