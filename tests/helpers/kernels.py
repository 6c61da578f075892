"""What tests of the GPU kernels share: where they run, inputs, comparison with the definition."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops.selective_scan import BranchParams

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def kernel(test):
    """A test that runs on a GPU, and also in the interpreter."""
    return pytest.mark.gpu(
        pytest.mark.skipif(
            not INTERPRETED and DEVICE == "cpu", reason="runs in test_in_the_interpreter"
        )(test)
    )


def gpu(test):
    """A test that needs a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")(test))


def draw(*shape, scale=1.0):
    """The same numbers on every device, so that errors are those of the kernels."""
    return torch.randn(*shape).to(DEVICE) * scale


def draw_params(E, N, R):
    return BranchParams(
        draw(E, 4, scale=0.4),
        draw(E, scale=0.1),
        draw(R + 2 * N, E, scale=E**-0.5),
        draw(E, R, scale=R**-0.5),
        draw(E) - 3,
        -torch.exp(2 * torch.rand(E, N)).to(DEVICE),
        draw(E),
    )


def error(value, wanted):
    """Relative; the absolute one where zero is wanted."""
    scale = wanted.norm()
    return ((value.double() - wanted).norm() / (scale if scale > 0 else 1)).item()


def compare(function, inputs: dict, tolerance, monkeypatch, dtypes=None):
    """function(**inputs) on the backend in the given dtypes, and on the reference in float64 from
    the same values.
    """
    dtypes = dtypes or {}
    results = []
    for backend in ("triton", "reference"):

        def convert(name, value, backend=backend):
            if isinstance(value, BranchParams):
                return BranchParams(*(convert(name, tensor) for tensor in value))
            if value is None or not value.is_floating_point():
                return value
            value = value.detach().to(dtypes.get(name, torch.float32))
            return value.to(
                value.dtype if backend == "triton" else torch.float64, copy=True
            ).requires_grad_()

        converted = {name: convert(name, value) for name, value in inputs.items()}
        monkeypatch.setenv("DYVM_BACKEND", backend)
        y = function(**converted)
        torch.manual_seed(1)
        y.backward(
            torch.randn(y.shape)
            .to(inputs["xz"].device, dtypes.get("xz", torch.float32))
            .to(y.dtype)
        )
        gradients = {}
        for name, value in converted.items():
            if isinstance(value, BranchParams):
                gradients |= {
                    f"{name}.{field}": t.grad for field, t in zip(value._fields, value, strict=True)
                }
            elif value is not None and value.is_floating_point():
                gradients[name] = value.grad
        results.append({"output": y.detach()} | gradients)
    errors = {name: error(results[0][name], wanted) for name, wanted in results[1].items()}
    assert all(value < tolerance for value in errors.values()), errors
    assert results[0]["output"].dtype == dtypes.get("xz", torch.float32)


def run_interpreted(file: Path, chosen: str) -> str:
    """Output of a test file's chosen tests in Triton's interpreter."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        str(file),
    ]
    run = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=file.parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout
    return run.stdout
