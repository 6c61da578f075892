"""How the scan is laid out on a GPU (ops/selective_scan/gpu/plan.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from ops.selective_scan.gpu import plan as plans  # noqa: E402

H100 = 132
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("tokens", [50, 197, 1025])
@pytest.mark.parametrize("channels", [384, 768])
def test_few_images_are_cut_into_pieces_and_many_are_not(tokens, channels):
    pieces = [plans.best_pieces(images, channels, tokens, 2, H100) for images in (1, 2, 8, 32, 512)]
    assert pieces[0] > 1 and pieces[-1] == 0
    cut = [count for count in pieces if count]
    assert cut == sorted(cut, reverse=True), "the fewer images, the more pieces"


def test_the_choice_is_the_fastest():
    for images in (1, 3, 16, 64, 200):
        chosen = plans.best_pieces(images, 768, 197, 2, H100)
        sizes = images, 768, 197, 2, H100
        others = (0, 1, 2, 4, 8, 16)
        assert plans.cycles(chosen, *sizes) == min(plans.cycles(n, *sizes) for n in others)


@pytest.mark.parametrize("tokens", [1, 3, 8, 63, 197, 1569])
def test_pieces_cover_all_tokens_and_none_is_empty(tokens, monkeypatch):
    for wanted in (1, 2, 3, 16, 64):
        monkeypatch.setattr(plans, "best_pieces", lambda *sizes, wanted=wanted: wanted)
        chosen = plans.plan(torch.device("cpu"), 2, 96, tokens, 2)
        assert chosen.width * chosen.pieces >= tokens
        assert chosen.width * (chosen.pieces - 1) < tokens
        assert chosen.pieces == 1 or chosen.width % plans.STEPS == 0


def test_its_cycles_are_those_of_the_machine_code():
    """Of the record that benchmarks/gpu_static/report.py wrote, for an H100."""
    record = json.loads((ROOT / "benchmarks/results/gpu_static.json").read_text())
    rows = {
        row["kernel"]: row
        for row in record["kernels"]
        if row["capability"] == 90 and "training 256" not in row["phases"]
    }
    for kernel, alone, busy in (
        ("scan_forward", plans._ALONE, plans._BUSY),
        ("scan_pieces", plans._ALONE_PIECES, plans._BUSY_PIECES),
        ("piece_ends", plans._ALONE_ENDS, plans._BUSY_ENDS),
    ):
        assert alone == pytest.approx(rows[kernel]["alone"], rel=0.15)
        assert busy == pytest.approx(rows[kernel]["sm_cycles"]["L2"], rel=0.15)


def test_programs_fill_processors_that_take_few(monkeypatch):
    """An A10's processors (sm_86) take 16 programs: of two warps each."""

    class Properties:
        multi_processor_count, major, minor = 72, 8, 6

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert plans.plan(torch.device("cuda"), 64, 768, 197, 2)[:2] == (64, 2)
    Properties.major, Properties.minor = 9, 0
    assert plans.plan(torch.device("cuda"), 64, 768, 197, 2)[:2] == (32, 1)


def test_the_benchmark_compares_all_pieces(tmp_path):
    """In the interpreter: what it tells, not how fast it is."""
    flags = "--device cpu --batch 1 2 --tokens 17 --channels 32 --active 0.8 --rounds 1 --seconds 0"
    record = tmp_path / "plan.json"
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu_plan.py", *flags.split(), "--output", record],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "all results equal within 1e-05" in run.stdout
    cases = json.loads(record.read_text())["cases"]
    assert [(case["batch"], set(case["us"])) for case in cases] == [
        (1, {"0", "1", "2"}),
        (2, {"0", "1", "2"}),
    ]
    assert all(0 < case["share_of_best"] <= 1 for case in cases)


def test_the_benchmark_without_a_gpu():
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu_plan.py", "--device", "cpu"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run.returncode == 1 and "needs a CUDA GPU" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
