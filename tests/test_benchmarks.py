"""What the benchmarks tell and refuse: flags, records, speeds, goals, rivals left out, what a save
loses.
"""

import argparse
import importlib
import json
import os
import shlex
import sys
from datetime import datetime, timezone

import pytest
import torch
from helpers.benchmarks import tiny_table

from benchmarks import (
    goals,
    hotspots,
    memory,
    model,
    ops,
    rearrange,
    records,
    rivals,
    saving,
    train,
)
from ops import selective_scan
from ops.selective_scan import torch_lean
from utils.checkpoint import save_checkpoint
from utils.environment import describe_environment
from utils.errors import UserError
from utils.program import run_main


def test_a_record_says_what_it_was_measured_with(monkeypatch, tmp_path):
    flags = ["--batch", "2", "--patches", "4", "--width", "8", "--rounds", "1"]
    flags += ["--output", str(tmp_path / "record file")]
    monkeypatch.setattr(sys, "argv", ["rearrange.py", *flags])
    rearrange.main()
    record = json.loads((tmp_path / "record file").read_text())
    environment = describe_environment()
    assert record["command"] == shlex.join(["python", "benchmarks/rearrange.py", *flags])
    assert (
        record["device"].startswith(environment["cpu"])
        and record["threads"] == torch.get_num_threads()
    )
    assert datetime.fromisoformat(record["date"]) <= datetime.now(timezone.utc)
    assert record["environment"] == environment and record["patches"] == 4
    assert records.head("ops.py", "cpu", "pytest")["environment"] == environment | {
        "pytest": pytest.__version__
    }


def tiny_scan(monkeypatch, tmp_path, compiled):
    """benchmarks/ops.py with another core for torch.compile; -> names in its record, forward."""
    monkeypatch.setenv("DYVM_BACKEND", "")  # put back behind the test
    monkeypatch.setattr(rivals, "compiled_chunks", lambda: compiled)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "ops.py",
            "--device",
            "cpu",
            "--batch",
            "2",
            "--tokens",
            "5",
            "--width",
            "16",
            "--rounds",
            "1",
            "--retries",
            "0",
            "--passes",
            "forward",
            "--output",
            str(tmp_path / "ops.json"),
        ],
    )
    ops.main()
    return json.loads((tmp_path / "ops.json").read_text())["forward"].keys()


@pytest.mark.parametrize(
    "error, complaint",
    [
        (RuntimeError("no compiler\nbehind a trace"), "torch.compile fails (no compiler)"),
        (RuntimeError(), "torch.compile fails (RuntimeError)"),
        (torch.OutOfMemoryError("CUDA out of memory"), "torch.compile does not fit the memory"),
        (None, "torch.compile does not fit the memory"),
    ],
    ids=["compiler", "silent", "GPU memory", "host memory"],
)
def test_a_rival_that_fails_is_left_out(error, complaint, monkeypatch, tmp_path, capsys):
    def core(*inputs):
        if error is None:
            torch.empty(2**60)
        raise error

    names = tiny_scan(monkeypatch, tmp_path, core)
    assert {
        "backend torch",
        "sequential loop",
        "chunked PyTorch",
    } <= names and "torch.compile" not in names
    assert [line for line in capsys.readouterr().err.splitlines() if "compile" in line] == [
        f"left out: {complaint}"
    ]


def test_an_error_of_our_own_backend_is_not_hidden(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(torch_lean, "ssm_branch", broken)
    with pytest.raises(RuntimeError, match="broken"):
        tiny_scan(monkeypatch, tmp_path, rivals.einsum_loop)


def test_a_scan_that_no_backend_fits_is_told(monkeypatch, tmp_path):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(selective_scan, "PREFERENCE", ("torch", "reference"))
    monkeypatch.setattr(torch_lean, "ssm_branch", too_large)
    with pytest.raises(UserError, match="forward: no backend fits the memory at --batch 2"):
        tiny_scan(monkeypatch, tmp_path, rivals.einsum_loop)


@pytest.mark.parametrize("gpu, sizes", [(False, ["S", "T"]), (True, ["S", "T", "B"])])
def test_size_b_is_measured_on_a_gpu(gpu, sizes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(sys, "argv", ["model.py"])
    assert model.parse_args().models == sizes


def test_what_a_save_loses_is_what_its_steps_took_beyond_their_neighbours():
    drifting = saving.lost_seconds([1.0] * 5, [1.5, 3.5, 1.5], [2.0] * 5)
    assert drifting == pytest.approx(2.0)  # the neighbours' median is 1.5
    windows = [
        {"kind": kind, "lost_s": lost}
        for kind, lost in [
            ("save", 0.5),
            ("control", 0.1),
            ("control", -0.1),
            ("save", 0.9),
            ("save", 0.7),
            ("control", 0.0),
        ]
    ]
    result = saving.summary(windows)
    assert result["quartiles_of_lost_s"]["difference"] == pytest.approx(
        [0.55, 0.7, 0.85]
    )  # of 0.4, 1.0, 0.7
    assert result["ratio"] == pytest.approx(
        {"median": 60 / 60.7, "upper_quartile_of_loss": 60 / 60.85}
    )


def test_a_save_that_is_damaged_or_differs_gets_no_ratio(tmp_path):
    path, state = (
        tmp_path / "checkpoint.pth",
        {"model": {"w": torch.arange(5.0)}, "step": 3, "ema": None},
    )
    save_checkpoint(state, path)
    saving.check_saved(path, state)
    with pytest.raises(UserError, match="no ratio is reported: model of checkpoint.pth"):
        saving.check_saved(path, state | {"model": {"w": torch.tensor([0.0, 1, 2, 3, 5])}})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="no ratio is reported"):
        saving.check_saved(path, state)


def test_the_record_of_the_cost_of_saving(monkeypatch, tmp_path, capsys):
    output = tmp_path / "saving.json"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "saving.py",
            "--model",
            "vim_micro",
            "--batch",
            "2",
            "--saves",
            "3",
            "--output",
            str(output),
        ],
    )
    saving.main()
    record = json.loads(output.read_text())
    kinds = [window["kind"] for window in record["windows"]]
    assert all(sorted(kinds[i : i + 2]) == ["control", "save"] for i in (0, 2, 4))
    assert all(
        (window["blocked_s"] > 0) == (window["kind"] == "save") for window in record["windows"]
    )
    assert 0 < record["ratio"]["upper_quartile_of_loss"] <= record["ratio"]["median"]
    assert f"{record['ratio']['median']:.4f} of the throughput without" in capsys.readouterr().out


BAD = [
    ("ops", "--batch 0", "--batch: '0' is no positive integer"),
    ("ops", "--rounds 0", "--rounds: '0' is no positive integer"),
    ("ops", "--threads 0", "--threads: '0' is no positive integer"),
    ("ops", "--precision int8", "invalid choice: 'int8'"),
    ("ops", "--output {tmp}/none/ops.json", "there is no folder"),
    ("ops", "--output {tmp}", "is a folder; name a file"),
    ("model", "--batch 16 0", "--batch: '0' is no positive integer"),
    ("model", "--seconds -1", "--seconds: -1 is no finite number of at least 0"),
    ("model", "--models X", "invalid choice: 'X'"),
    ("model", "--img-size 100", "100 is no multiple of 16"),
    ("model", "--device cpu --profile", "--profile needs --device cuda"),
    ("train", "--batch 0", "--batch: '0' is no positive integer"),
    ("train", "--seconds nan", "--seconds: nan is no finite number"),
    ("train", "--dyvm-model nope", "--dyvm-model: 'nope' is unknown; known are "),
    ("train", "--dyvm-model dyvm_vim_tiny", "dyvm_vim_tiny is dynamic; give vim_tiny"),
    ("rearrange", "--rounds 0", "--rounds: '0' is no positive integer"),
    ("saving", "--saves 1", "quartiles need 2 or more"),
    *(
        (name, f"--device {device}", complaint)
        for name in ("ops", "model", "train", "rearrange", "saving")
        for device, complaint in (
            ("cuda", "PyTorch sees no CUDA device"),
            ("tpu", "'tpu' is neither cpu nor cuda"),
        )
    ),
]


@pytest.mark.parametrize("name, flags, complaint", BAD, ids=lambda value: value.replace("--", ""))
def test_a_wrong_flag_is_told_in_one_line(name, flags, complaint, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = [] if "--output" in flags else ["--output", str(tmp_path / "record.json")]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.format(tmp=tmp_path).split(), *output])
    with pytest.raises(SystemExit) as end:
        run_main(importlib.import_module(f"benchmarks.{name}").main)
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert complaint in printed.err and len(printed.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_goals_are_read_from_the_records(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model, "SIZES", {"T": "tiny", "S": "tiny"})
    monkeypatch.setattr(goals, "BATCH", 3)
    part, _ = tiny_table(monkeypatch, tmp_path, "--models", "S", "--no-compile")
    # At batch 1 no graph was captured.
    parts = [part, part | {"batch": 1}, part | {"batch": 32, "share": 0.75}]
    record = {"parts": parts}
    (tmp_path / "model-s.json").write_text(json.dumps(record))
    steps = {"Vim-S": 10.0, "DeiT-S": 5.0, "Vim-S, mamba_ssm": 25.0}
    (tmp_path / "train.json").write_text(
        json.dumps(
            {
                "device": "NVIDIA H200",
                "release_checkpointing": True,
                "dense": {"batch": 3, "steps": {name: {"ms": ms} for name, ms in steps.items()}},
                "dyvm": {
                    "batch": 3,
                    "steps": {"DyVM": {"ms": 10.0}, "release-like, reference": {"ms": 20.0}},
                    "memory": {"DyVM": 30, "release-like, reference": 100},
                },
            }
        )
    )
    monkeypatch.setattr(
        sys, "argv", ["goals.py", str(tmp_path), "--output", str(tmp_path / "goals.json")]
    )
    goals.main()
    rows = {
        row["what"]: (row["measured"], row["met"])
        for row in json.loads((tmp_path / "goals.json").read_text())
    }
    speed = {name: row["images_per_s"] for name, row in part["models"].items()}
    assert rows["Vim-S forward, against DeiT-S"][0] == pytest.approx(
        speed["Vim-S"] / speed["DeiT-S"]
    )
    assert rows["Vim-S forward, against the mamba_ssm path"] == (None, None)
    assert rows["DyVM-S forward at 512 pixels, against DeiT-S"] == (None, None)
    assert rows["DyVM-S forward at batch 1, both in a graph, against DeiT-S"] == (None, None)
    what = "DyVM-S against Vim-S at batch {}, share of the gain in operations"
    assert rows[what.format(32)] == (0.75, False) and rows[what.format(256)] == (None, None)
    assert rows["Vim-S training step, against the mamba_ssm path"] == (pytest.approx(2.5), True)
    assert rows["DyVM-S training step, against the release-like step"] == (
        pytest.approx(2.0),
        False,
    )
    assert rows["peak memory of that step, against the release-like step"] == (
        pytest.approx(0.3),
        True,
    )
    assert rows["Vim-S training step, share of its limit of 5,000 images/s"] == (
        pytest.approx(300 / 5000),
        None,
    )
    printed = capsys.readouterr().out
    assert "not measured" in printed
    notes = printed.splitlines()[-2:]
    assert "batch that fits: dense 3, dyvm 3; without mamba_ssm" in notes[0]
    assert "~ computed for an H200 (gpu_static.json)" in notes[1]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b'{"dense": {"batch": 3, "st', "train.json cannot be read, and counts as not measured"),
        (b"\xff\xfe{", "train.json cannot be read, and counts as not measured"),
        (b"[1]", "train.json is no record of a benchmark, and counts as not measured"),
    ],
)
def test_a_record_that_is_cut_off_counts_as_not_measured(
    content, complaint, monkeypatch, tmp_path, capsys
):
    (tmp_path / "train.json").write_bytes(content)
    (tmp_path / "model-s.json").write_text('{"parts": []}')
    monkeypatch.setattr(sys, "argv", ["goals.py", str(tmp_path)])
    goals.main()
    printed = capsys.readouterr()
    assert complaint in printed.err and len(printed.err.splitlines()) == 1
    assert (
        printed.out.count("not measured") == len(goals.GOALS) + 1
        and "mamba_ssm the release-like" not in printed.out
    )


def test_a_batch_that_does_not_fit_is_halved(monkeypatch, capsys):
    asked = []

    def measure(name, args, keep):
        asked.append(args.batch)
        if args.batch > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"batch": args.batch}

    monkeypatch.setattr(train, "measure", measure)
    assert train.measure_fitting("dyvm", argparse.Namespace(batch=256)) == {
        "batch": 64
    } and asked == [256, 128, 64]
    assert "dyvm: out of memory at batch 256, going on at 128" in capsys.readouterr().err


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell peaks"
)
def test_peak_memory_on_a_cpu_is_what_a_call_touches():
    peak = memory.peak_memory(lambda: torch.ones(2**24), "cpu")
    assert 63 * 2**20 <= peak < 128 * 2**20  # 64 MiB; Linux counts pages in batches
    assert (
        memory.peak_memory(lambda: torch.empty(2**24), "cpu") < 32 * 2**20
    )  # reserved, not touched


def test_peak_memory_that_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "none")
    assert memory.peak_memory(lambda: None, "cpu") is None
    assert (memory.mebibytes(None), memory.mebibytes(3 * 2**20)) == ("-", "3")


def test_hotspots_are_shares_of_the_whole():
    a = torch.randn(256, 256)
    found = hotspots.hotspots(lambda: (a @ a).exp(), "cpu", count=50)
    assert {"aten::mm", "aten::exp"} <= {row["name"] for row in found}
    assert sum(row["share"] for row in found) == pytest.approx(1)
    assert [row["ms"] for row in found] == sorted((row["ms"] for row in found), reverse=True)
    assert "aten::mm" in hotspots.describe(found)
