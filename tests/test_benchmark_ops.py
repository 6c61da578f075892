"""benchmarks/ops.py: which rivals run, and what is kept of a run that ends early."""

import json
import sys

import pytest
import torch

from benchmarks import ops as benchmark
from benchmarks import rivals
from ops.selective_scan import BranchParams


def test_torch_compile_may_be_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(rivals, "compiled_chunks", pytest.fail)
    monkeypatch.setattr(rivals, "mambapy_scan", lambda: None)
    monkeypatch.setattr(rivals, "transformers_mixer", lambda *params: None)
    E = 8
    sizes = ((E, 4), (E,), (1 + 2 * 4, E), (E, 1), (E,), (E, 4), (E,))
    params = BranchParams(*(torch.zeros(size) for size in sizes))
    monkeypatch.setenv("DYVM_BACKEND", "")  # put back behind the test
    found = benchmark.all_rivals(torch.zeros(1, 2, 2 * E), params, params, compiled=False)
    assert {"backend torch", "sequential loop"} <= found.keys()


def test_the_first_pass_is_kept_if_the_second_does_not_end(monkeypatch, tmp_path):
    def measure(args, train):
        if train:
            raise KeyboardInterrupt
        return {
            "backend torch": {"error": 0.0, "ms": 1.0, "cpu_ms": 1.0, "samples": 1, "disturbed": 0}
        }

    monkeypatch.setattr(benchmark, "measure", measure)
    output = tmp_path / "ops.json"
    monkeypatch.setattr(sys, "argv", ["ops.py", "--device", "cpu", "--output", str(output)])
    with pytest.raises(KeyboardInterrupt):
        benchmark.main()
    assert json.loads(output.read_text())["forward"]["backend torch"]["ms"] == 1.0
