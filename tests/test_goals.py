"""benchmarks/goals.py where nothing is measured: what gpu_static/report.py computed."""

import json
import sys

import pytest

from benchmarks import goals
from utils.errors import UserError


def test_the_goals_without_a_gpu(monkeypatch, tmp_path, capsys):
    def row(model, images_per_s, kind="forward", card="H200", batch=256, pixels=224):
        return {
            "card": card,
            "model": model,
            "pass": kind,
            "batch": batch,
            "pixels": pixels,
            "images_per_s": images_per_s,
        }

    rows = [
        row("DeiT-S", 30_000.0),
        row("DeiT-S", 1.0, card="H100"),
        row("Vim-S", 10_000.0),
        row("DyVM-S", 12_000.0),
        row("Vim-S", 2_000.0, "train"),
        row("DyVM-S", 1_600.0, "train"),
        row("Vim-S", 6_000.0, batch=32),
        row("DyVM-S", 6_600.0, batch=32),
        row("DeiT-S", 900.0, batch=1),
        row("DyVM-S", 450.0, batch=1),
    ]
    record = {
        "models": rows,
        "mamba_ssm_us_of_an_image": {"forward": 250.0, "train": 750.0},
        "flops_ratio": 1.5,
        "dyvm_step_peak": {"batch": 256, "bytes": {"DyVM": 3, "release-like, mamba_ssm": 10}},
    }
    (tmp_path / "static.json").write_text(json.dumps(record))
    words = ["--computed", str(tmp_path / "static.json"), "--output", str(tmp_path / "goals.json")]
    monkeypatch.setattr(sys, "argv", ["goals.py", *words])
    goals.main()
    found = {row["what"]: row for row in json.loads((tmp_path / "goals.json").read_text())}
    assert {
        what: row["computed"] for what, row in found.items() if row["computed"] is not None
    } == {
        "Vim-S forward, against the mamba_ssm path": pytest.approx(2.5),
        "Vim-S training step, against the mamba_ssm path": pytest.approx(1.5),
        "Vim-S forward, against DeiT-S": pytest.approx(1 / 3),
        "DyVM-S forward, against DeiT-S": pytest.approx(0.4),
        "DyVM-S forward at batch 1, both in a graph, against DeiT-S": pytest.approx(0.5),
        "DyVM-S against Vim-S at batch 256, share of the gain in operations": pytest.approx(0.8),
        "DyVM-S against Vim-S at batch 32, share of the gain in operations": pytest.approx(
            1.1 / 1.5
        ),
        "DyVM-S training step, against the release-like step": pytest.approx(1.6),
        "peak memory of that step, against the release-like step": pytest.approx(0.3),
    }
    assert {row["measured"] for row in found.values()} == {row["met"] for row in found.values()}
    printed = capsys.readouterr().out
    assert "~0.40" in printed and "~ computed for an H200 (static.json)" in printed


def test_a_record_without_models_computes_nothing(monkeypatch, tmp_path, capsys):
    (tmp_path / "static.json").write_text('{"kernels": []}')
    monkeypatch.setattr(sys, "argv", ["goals.py", "--computed", str(tmp_path / "static.json")])
    goals.main()
    printed = capsys.readouterr().out
    assert printed.count("not measured") == len(goals.GOALS) + 1 and "~" not in printed


def test_the_table_of_the_docs(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["goals.py", "--output", str(tmp_path / "goals.json")])
    goals.main()
    rows = json.loads((tmp_path / "goals.json").read_text())
    text = (goals.COMPUTED.parents[2] / "docs/gpu.md").read_text().partition("goals.py` prints")[2]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "][2:]
    assert lines == [
        [row["what"], row["goal"], f"{row['computed']:.2f}"] for row in rows if row["goal"]
    ]


def test_the_mamba_ssm_path_is_computed_for_one_card():
    record = json.loads(goals.COMPUTED.read_text())
    of_an_h100 = goals.Computed(record, "H100")
    assert of_an_h100.against_deit("Vim-S") > 0
    for compute in (of_an_h100.against_release, lambda: of_an_h100.against_mamba_ssm("train")):
        with pytest.raises(KeyError, match="H100"):
            compute()


@pytest.mark.parametrize("content", [None, "[]", "{"], ids=["missing", "no record", "cut off"])
def test_a_folder_without_records_is_told(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "train.json").write_text(content)
    output = tmp_path / "goals.json"
    monkeypatch.setattr(sys, "argv", ["goals.py", str(tmp_path), "--output", str(output)])
    with pytest.raises(UserError, match="holds no record to read.*train.json") as told:
        goals.main()
    assert told.value.exit_code == 1 and not output.exists()
