"""One report on one or several runs: a single, self-contained HTML file.

python report.py output/demo/dyvm                    writes output/demo/dyvm/report.html
python report.py output/demo/dyvm output/demo/dyvm50 --output both.html
"""

from utils.startup import prepare

prepare()

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from drawing.page import css_variables
from drawing.report_training import argument_rows, environment_rows, time_charts
from drawing.runs import RunFolder, read_run, run_names
from evaluation.report_decisions import decision_charts, sample_pictures
from evaluation.report_scores import evaluation_table, headlines, sweep_section, task_part
from utils.arguments import HelpFormatter, OneLineParser
from utils.files import atomic_file
from utils.program import run_main


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
        palette=Markup(css_variables()),
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
