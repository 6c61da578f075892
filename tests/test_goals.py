"""benchmarks/goals.py where nothing is measured: what gpu_static/report.py computed."""

import json
import sys

import pytest

from benchmarks import goals


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
        row("DeiT-S", 900.0, batch=1),
        row("DyVM-S", 450.0, batch=1),
    ]
    record = {"models": rows, "mamba_ssm_us_of_an_image": {"forward": 250.0, "train": 750.0}}
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


KERNELS = {
    "forward": ("scan_forward", "evaluation 256"),
    "forward that keeps states": ("scan_forward", "training 256"),
    "few images, first pass": ("piece_ends", "evaluation 1"),
    "few images, second pass": ("scan_pieces", "evaluation 1"),
    "backward": ("scan_backward", "training 256"),
    "backward in Triton": ("scan_backward", "training 256"),
    "backward in CUDA C++": ("scan_backward_cuda", "training 256"),
}


def test_the_tables_of_the_docs_are_those_of_the_records():
    """docs/gpu.md, on sm_90 and an H100."""
    results = goals.COMPUTED.parent
    before, now = (
        json.loads((results / name).read_text())
        for name in ("gpu_static_before.json", "gpu_static.json")
    )
    text = (results.parents[1] / "docs/gpu.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cells = {line[0]: line[1:] for line in lines}
    compared = 0
    for what, shown in cells.items():
        name, _, when = what.partition(", before")
        if name not in KERNELS:
            continue
        kernel, phase = KERNELS[name]
        (row,) = (
            row
            for row in (before if what.endswith(", before") else now)["kernels"]
            if (row["kernel"], row["capability"]) == (kernel, 90) and phase in row["phases"]
        )
        values = ("registers", "stack", "instructions", "barriers")
        found = [*(row[value] for value in values), *row["sm_cycles"].values(), row["alone"]]
        assert [f"{value:.0f}" for value in found] == shown, what
        compared += 1
    assert compared == 9

    def ms(record, model, pixels, batch, kind):
        return next(
            row["ms"]
            for row in record["models"]
            if (row["model"], row["pixels"], row["batch"], row["pass"], row["card"])
            == (model, pixels, batch, kind, "H100")
        )

    for what, shown in cells.items():
        if not what.startswith(("Vim-S, ", "DyVM-S, ")):
            continue
        model = what.split(",")[0]
        pixels, batch = 512 if "512 pixels" in what else 224, int(what.split("batch ")[1])
        kind = "train" if "training step" in what else "forward"
        sizes = pixels, batch, kind
        times = [ms(record, model, *sizes) for record in (before, now)]
        ratios = [
            ms(r, "DeiT-S", *sizes) / time for r, time in zip((before, now), times, strict=True)
        ]
        for value, cell in zip((*times, *ratios), shown, strict=True):
            digits = len(cell.partition(".")[2])
            assert float(cell) == pytest.approx(value, abs=0.51 * 10**-digits), (what, cell, value)
        compared += 1
    assert compared == 17
