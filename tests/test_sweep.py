"""The sweep over token budgets: the same numbers as the plain evaluation, resumable, measured in
turn.
"""

import csv
import json
import re

import pytest
from helpers.seeing import DYNAMIC, SMALL, save_model

import main
import options
from drawing.trade_offs import budget_curve, pareto_front
from evaluation import sweep
from tasks import task_named
from utils import timing
from utils.errors import UsageError

FLAGS = [*SMALL[-4:], "--data-set", "DIGITS", "--batch-size", "120"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dynamic model trained at 0.7, and a dense one."""
    folder = tmp_path_factory.mktemp("models")
    small = ["--input-size", "16"]
    return save_model(folder / "dynamic.pth", *DYNAMIC, *small), save_model(
        folder / "dense.pth", *small
    )


def evaluate(output, model, *flags):
    main.main(
        [
            "--eval",
            "--model-path",
            str(model),
            "--output_dir",
            str(output),
            *FLAGS,
            *map(str, flags),
        ]
    )


@pytest.fixture(scope="module")
def swept(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("swept")
    evaluate(
        output,
        models[0],
        "--dense-path",
        models[1],
        "--sweep",
        "0.5:1:0.1",
        "--throughput-seconds",
        0.1,
    )
    return output


def test_the_point_at_the_trained_budget_is_the_plain_evaluation(models, swept, tmp_path):
    evaluate(tmp_path, models[0], "--dense-path", models[1], "--throughput-seconds", 0)
    plain = json.loads((tmp_path / "eval.json").read_text())
    record = json.loads((swept / "sweep.json").read_text())
    [trained] = [point for point in record["points"] if point["trained"]]
    assert trained["token_keep_ratio"] == 0.7
    for key in ("top1", "top5", "loss", "flops", "parameters", "keep"):
        assert trained[key] == plain["dynamic"][key]
    for key in ("top1", "top5", "loss", "flops", "parameters"):
        assert record["dense"][key] == plain["dense"][key]
    assert not {"sweep.json", "sweep.csv"} & {path.name for path in tmp_path.iterdir()}


def test_files_and_order(swept):
    assert {"sweep.json", "sweep.csv", "sweep_flops.png", "sweep_speed.png"} <= {
        path.name for path in swept.iterdir()
    }
    rows = list(csv.DictReader((swept / "sweep.csv").open()))
    assert [row["token_keep_ratio"] for row in rows] == [
        "0.5",
        "0.6",
        "0.7",
        "0.8",
        "0.9",
        "1",
        "dense",
    ]
    flops = [float(row["exact_flops"]) for row in rows[:-1]]
    assert flops == sorted(flops) and len(set(flops)) == 6
    assert all(float(row["images_per_s"]) > 0 for row in rows)
    assert not any((swept / name).exists() for name in ("eval.json", "kept_patches.png"))


def test_an_interrupted_sweep_goes_on(models, swept, tmp_path, monkeypatch):
    record = json.loads((swept / "sweep.json").read_text())
    kept = record["points"].pop(2)
    for point in record["points"]:
        point["top1"] = -1.0  # marks what must not be evaluated again
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    calls = []
    original = sweep.validate
    monkeypatch.setattr(sweep, "validate", lambda *args: calls.append(args[-1]) or original(*args))
    evaluate(
        tmp_path,
        models[0],
        "--dense-path",
        models[1],
        "--sweep",
        "0.5:0.8:0.1",
        "--throughput-seconds",
        0.1,
    )
    assert calls == ["token keep ratio 0.7"]
    again = json.loads((tmp_path / "sweep.json").read_text())
    assert [point["token_keep_ratio"] for point in again["points"]] == [
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
        1.0,
    ]
    assert again["points"][2]["top1"] == kept["top1"] and again["points"][0]["top1"] == -1.0
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    "content, told",
    [
        ("{cut", "cannot be read"),
        ('{"points": []}', "cannot be read"),
        ({"flags": {"batch_size": 60}}, "--batch-size"),
        ({"images_sha256": "of others"}, "other images"),
        ({"checkpoint_sha256": "of another"}, "another checkpoint"),
        (
            {"flags": {"val_split": "test", "eval_crop_ratio": 1.0}},
            "--eval-crop-ratio, --val-split",
        ),
    ],
)
def test_a_sweep_of_something_else_starts_anew(
    content, told, models, swept, tmp_path, monkeypatch, capsys
):
    if isinstance(content, dict):
        record = json.loads((swept / "sweep.json").read_text())
        before = record["conditions"]
        record["conditions"] = before | content
        record["conditions"]["flags"] = before["flags"] | content.get("flags", {})
        # without --dense-path, which this sweep has not
        record["conditions"]["dense_sha256"] = None
        content = json.dumps(record)
    (tmp_path / "sweep.json").write_text(content)
    calls = []
    original = sweep.validate
    monkeypatch.setattr(sweep, "validate", lambda *args: calls.append(args[-1]) or original(*args))
    evaluate(tmp_path, models[0], "--sweep", "0.7", "--throughput-seconds", 0)
    assert calls == ["token keep ratio 0.7"]
    assert re.search(rf"sweep.json .*{told}\)?: starting anew", capsys.readouterr().out)
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert len(record["points"]) == 1 and record["batch_size"] is None
    assert (
        "top1" not in record["dense"] and record["dense"]["flops"]["exact"] > 0
    )  # its weights are not known


def test_speeds_of_all_budgets_are_measured_in_turn(models, tmp_path, monkeypatch):
    order, real = [], timing.seconds_of
    monkeypatch.setattr(
        timing, "seconds_of", lambda call, device: order.append(call) or real(call, device)
    )
    evaluate(tmp_path, models[0], "--sweep", "0.6:0.8:0.2", "--throughput-seconds", 1e-3)
    first = list(dict.fromkeys(order))
    assert len(first) == 3  # two budgets and the dense model
    assert order == first * (len(order) // 3) and len(order) >= 15


@pytest.mark.parametrize("method", ["dense", "block"])
def test_a_model_without_token_pruning_has_one_point(method, tmp_path, capsys):
    flags = ["--input-size", "16", *([] if method == "dense" else [*DYNAMIC, "--method", "block"])]
    model = save_model(tmp_path / "model.pth", *flags)
    evaluate(tmp_path, model, "--sweep", "0.5:1.0:0.25", "--throughput-seconds", 0)
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [point["token_keep_ratio"] for point in record["points"]] == (
        [] if method == "dense" else [1.0]
    )
    assert ("top1" in record["dense"]) == (method == "dense")
    assert "drops no tokens: there is no budget to sweep" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [
        ("0:1:0.1", r"lie in \(0, 1\]"),
        ("0.5:1.1:0.1", r"lie in \(0, 1\]"),
        ("0.9:0.5:0.1", "FIRST <= LAST"),
        ("0.5:1:0", "STEP > 0"),
        ("0.5:1:-0.1", "STEP > 0"),
        ("0.5:1", "FIRST:LAST:STEP"),
        ("a:b:c", "in numbers"),
        ("nan:1:0.1", "in numbers"),
        ("0.1:1:1e-9", "at most 100"),
        ("2", r"\(0, 1\]"),
        ("", "in numbers"),
    ],
)
def test_bad_ranges(text, message):
    with pytest.raises(UsageError, match=message) as error:
        options.parse(["--eval", "--model-path", "x", "--sweep", text])
    assert "\n" not in str(error.value)


def test_ranges():
    assert options.sweep_range("0.5:1.0:0.1") == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert options.sweep_range("0.7") == [0.7]
    assert options.sweep_range("0.5:0.99:0.2") == [0.5, 0.7, 0.9]
    with pytest.raises(UsageError, match="--sweep needs --eval"):
        options.parse(["--sweep", "0.7"])


def test_pareto_front():
    costs, gains = [1, 2, 3, 4, 4, 5], [50, 40, 60, 60, 70, 70]
    assert pareto_front(costs, gains) == [0, 2, 4]
    assert pareto_front([], []) == []


def test_a_plot_says_what_line_and_ring_are():
    """In no run's colour, once for all runs."""
    point = {"token_keep_ratio": 0.7, "trained": True, "top1": 50.0, "images_per_s": 9.0}
    point["flops"] = {"exact": 2e6}
    curves, dense = {0: [point], 1: [point | {"top1": 40.0}]}, {0: None, 1: None}
    best = task_named("classification").best
    for axis, label in ("exact", "MFLOPs per video, exact"), ("images_per_s", "videos/s, measured"):
        axes = budget_curve(curves, axis, dense, best, "video").axes[0]
        assert axes.get_xlabel() == label
        legend = axes.get_legend()
        names = [text.get_text() for text in legend.get_texts()]
        assert names == ["Pareto front", "trained budget"]
        assert legend.get_lines()[0].get_color() not in {line.get_color() for line in axes.lines}
