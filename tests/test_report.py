"""The report: complete, readable in a real browser, and patient with damaged runs."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.browser import BROWSER, Browser
from helpers.seeing import DYNAMIC, SMALL
from helpers.shell import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
import report
from drawing.runs import read_run, run_names
from utils.errors import UserError

SECTIONS = ("evaluation", "budgets", "training", "decisions", "setting")
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / "output/screenshots"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a dense training and of a student from it, evaluated and swept, as the demo leaves
    them.
    """
    folder = tmp_path_factory.mktemp("runs")
    flags = [
        *SMALL,
        "--input-size",
        "16",
        "--subset",
        "64",
        "--batch-size",
        "32",
        "--epochs",
        "2",
        "--warmup-epochs",
        "0",
        "--throughput-seconds",
        "0.05",
        "--model-ema-decay",
        "0.9",
    ]
    dense, student = folder / "dense", folder / "dyvm"
    main.main([*flags, "--output_dir", str(dense)])
    student_flags = [*DYNAMIC, "--model-path", str(dense / "best_checkpoint.pth")]
    main.main([*flags, *student_flags, "--output_dir", str(student)])
    main.main(
        [
            "--eval",
            "--sweep",
            "0.5:1.0:0.25",
            "--model-path",
            str(student / "best_checkpoint.pth"),
            "--output_dir",
            str(student),
            "--throughput-seconds",
            "0.05",
            *SMALL[-4:],
        ]
    )
    return dense, student


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """The report of the two runs side by side."""
    output = tmp_path_factory.mktemp("report") / "report.html"
    report.main([*map(str, runs), "--output", str(output)])
    return output


class Elements(HTMLParser):
    """The elements of a page as (tag, attributes)."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def log_names(run):
    return {
        name for line in (run / "log.txt").read_text().splitlines() for name in json.loads(line)
    }


def test_everything_of_the_runs_is_in_it(runs, page):
    text = page.read_text()
    elements = Elements(text).found
    assert [attributes["id"] for tag, attributes in elements if tag == "h2"] == list(SECTIONS)
    drawn = {
        attributes["aria-label"].split(" over the epochs")[0]
        for tag, attributes in elements
        if tag == "svg" and " over the epochs" in attributes["aria-label"]
    }
    assert drawn == (log_names(runs[0]) | log_names(runs[1])) - {
        "epoch",
        "n_parameters",
        "best_epoch",
    }
    evaluated = json.loads((runs[1] / "eval.json").read_text())
    assert f"{evaluated['dynamic']['top1']:.2f}" in text
    assert f"{evaluated['dynamic']['flops']['exact'] / 1e6:,.2f}" in text
    assert "0.75" in text and "Arguments that differ" in text
    assert text.count('<img class="strip"') == 4  # samples of the student
    different = text[text.index("Arguments that differ") : text.index("<details")]
    assert re.findall(r'<th scope="row">(\w+)</th>', different) == [
        "lr",
        "method",
        "model",
        "model_path",
        "output_dir",
        "pruning_layers",
    ]
    for version in ("torch", "timm", "cpu"):
        assert f'<th scope="row">{version}</th>' in text


def test_results_of_another_checkpoint_are_left_out(runs, tmp_path, capsys):
    """A folder in which other weights were evaluated and swept later."""
    mixed = shutil.copytree(runs[1], tmp_path / "mixed")
    record = json.loads((mixed / "eval.json").read_text())
    record["checkpoint_sha256"] = "0" * 64
    (mixed / "eval.json").write_text(json.dumps(record))
    sweep = json.loads((mixed / "sweep.json").read_text())
    sweep["conditions"]["checkpoint_sha256"] = "0" * 64
    (mixed / "sweep.json").write_text(json.dumps(sweep))
    report.main([str(mixed)])
    text = (mixed / "report.html").read_text()
    assert "Heat map of gate means" not in text and "Accuracy" not in text
    assert f"{record['dynamic']['flops']['exact'] / 1e6:,.2f}" not in text
    notes = capsys.readouterr().out
    assert "eval.json and its pictures are of a checkpoint that is not in this folder" in notes
    assert "sweep.json is of a checkpoint that is not in this folder" in notes


def test_every_picture_has_a_text_and_nothing_lies_outside(page):
    text = page.read_text()
    pictures = 0
    for tag, attributes in Elements(text).found:
        if tag == "img":
            pictures += 1
            assert len(attributes["alt"]) > 10 and attributes["src"].startswith("data:image/")
        if tag == "svg":
            pictures += 1
            assert len(attributes["aria-label"]) > 10
        assert tag not in ("script", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert pictures > 20
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "url(http" not in text and "@import" not in text


def test_tensorboard_log_and_report_share_their_names(runs):
    for run in runs:
        events = EventAccumulator(str(run))
        events.Reload()
        assert set(events.Tags()["scalars"]) == log_names(run) - {
            "epoch",
            "n_parameters",
            "best_epoch",
        }


@pytest.mark.skipif(
    BROWSER is None, reason="no chromium on this machine (Debian: apt install chromium)"
)
def test_in_a_browser(page, tmp_path):
    browser = Browser(tmp_path)
    try:
        for name, width, height, dark in (
            ("desktop", 1280, 900, False),
            ("phone", 390, 844, False),
            ("dark", 1280, 900, True),
        ):
            browser.open(page, width, height, dark)
            assert browser.problems() == []
            assert browser.requests() == [page.resolve().as_uri()]
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            shown = browser.evaluate("""[...document.querySelectorAll('h2')].map(h => [
                h.id, h.offsetHeight, h.getBoundingClientRect().right <= innerWidth])""")
            assert [section for section, tall, inside in shown if tall > 10 and inside] == list(
                SECTIONS
            )
            sizes = browser.evaluate("""[...document.querySelectorAll('img, main svg')].map(p => {
                const box = p.getBoundingClientRect();
                const loaded = p.tagName == 'IMG' ? p.complete && p.naturalWidth > 0 : true;
                return [box.width, box.height, loaded]})""")
            assert len(sizes) > 20 and all(w > 150 and h > 60 and loaded for w, h, loaded in sizes)
            # Type in plots must be readable on a phone: at least 8 CSS pixels high.
            letters = browser.evaluate("""Math.min(
                ...[...document.querySelectorAll('main svg text')].map(
                    t => t.getBoundingClientRect().height))""")
            assert letters >= 8
            background, ink = browser.evaluate(
                "[document.body, document.querySelector('h1')].map((e, i) => "
                "getComputedStyle(e)[i ? 'color' : "
                "'backgroundColor'].match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0))"
            )
            assert background < 100 < 600 < ink if dark else ink < 150 < 700 < background
            browser.screenshot(SCREENSHOTS / f"report-{name}.png")
        assert browser.pdf().startswith(b"%PDF")
    finally:
        browser.close()


def test_one_run_goes_into_its_own_folder(runs, capsys):
    report.main([str(runs[0])])
    text = (runs[0] / "report.html").read_text()
    assert "Arguments that differ" not in text and "No <code>sweep.json</code> yet" in text
    assert "a dense model drops nothing" in text
    assert "report of 1 run:" in capsys.readouterr().out


def damaged(tmp_path, **files):
    tmp_path.mkdir(exist_ok=True)
    for name, content in files.items():
        (tmp_path / name.replace("_", ".")).write_text(content)
    return tmp_path


def test_a_log_cut_in_the_middle_of_a_line(tmp_path, capsys):
    lines = (
        '{"epoch": 0, "test_acc1": 50.0, "train_loss": null}\n'
        '{"epoch": 1, "test_acc1": 60.0}\n'
        '{"epoch": 2, "te'
    )
    run = damaged(tmp_path / "cut", log_txt=lines)
    assert [record["epoch"] for record in read_run(run, "cut", 0).log] == [0, 1]
    report.main([str(run)])
    assert "cut: log.txt: 1 line was cut off or damaged and left out" in capsys.readouterr().out
    assert "test_acc1 over the epochs: cut from 50 to 60" in (run / "report.html").read_text()


def test_a_run_without_a_log(tmp_path):
    run = damaged(tmp_path / "run", args_json='{"model": "<script>alert(1)</script>", "lr": 0.1}')
    report.main([str(run)])
    text = (run / "report.html").read_text()
    assert (
        "no log.txt: nothing is known of its training" in text
        and "No training was logged here" in text
    )
    assert "<script>" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize(
    "files",
    [
        dict(log_txt='[1]\n{"epoch": "x"}\n', args_json="{}"),
        dict(args_json="{cut"),
        dict(eval_json="[]"),
        {},
    ],
)
def test_folders_that_are_no_runs(files, tmp_path):
    with pytest.raises(UserError, match="not the folder of a run"):
        report.main([str(damaged(tmp_path / "run", **files))])


def test_unreadable_parts_are_named(runs, tmp_path):
    run = damaged(tmp_path / "run", args_json='{"lr": 1}', sweep_json="{cut", log_txt="")
    (run / "kept_patches.png").write_bytes(b"no picture")
    (run / "decisions").mkdir()
    (run / "decisions/gates.csv").write_text("layer,forward\n0,1\n")
    report.main([str(run)])
    text = (run / "report.html").read_text()
    for note in (
        "sweep.json cannot be read",
        "log.txt holds no epoch",
        "kept_patches.png cannot be read",
        "a table cannot be read",
    ):
        assert note in text


def test_folders_and_their_names(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="given twice"):
        run_names([tmp_path, tmp_path])
    assert run_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
