"""The registered operators under PyTorch's own checks: schema, fake kernels, gradients, tracing."""

import pytest
import torch
from helpers.scans import params_of

import ops.rms_norm  # noqa: F401 (registers an operator)
from ops import operators, selective_scan
from ops.selective_scan import BranchParams
from ops.selective_scan.params import flatten


def weights(grad: bool = True) -> list[BranchParams]:
    return [
        BranchParams(*(t.float().requires_grad_(grad) for t in params_of(6, 3, 1, seed)))
        for seed in (0, 1)
    ]


def scan_inputs(tokens: int = 18) -> dict[str, torch.Tensor]:
    """Two images; the first has few visible tokens, the second a hole."""
    torch.manual_seed(0)
    mask = torch.ones(2, tokens)
    mask[0, 3:] = mask[1, 1] = 0
    return {
        "xz": torch.randn(2, tokens, 12).requires_grad_(),
        "mask": mask.requires_grad_(),
        "gates": torch.rand(2, 2).requires_grad_(),
        "active": torch.tensor([[True, False], [True, True]]),
        "lengths": torch.tensor([tokens // 2, tokens]),
    }


def passes(name: str, arguments: tuple) -> None:
    torch.library.opcheck(getattr(torch.ops.dyvm, name).default, arguments)


def skip_without_kernels() -> None:
    reason = selective_scan.cpu.available()
    if reason is not None:
        pytest.skip(f"cpu: {reason}")


def test_cpu():
    skip_without_kernels()
    given, (forward, backward) = scan_inputs(), weights()
    xz, mask, gates, active, lengths = given.values()
    both = flatten((forward, backward))
    passes("cpu_scan", (xz, mask, gates, None, None, *both, 0.5, False))
    passes("cpu_scan", (xz, mask, gates, active, lengths, *both, 0.5, True))
    passes("cpu_scan", (xz, None, None, active, lengths, *flatten((None, backward)), 1.0, False))


def test_cpu_without_gradient():
    skip_without_kernels()
    xz, mask, _, active, lengths = (t.detach() for t in scan_inputs().values())
    both = flatten(weights(grad=False))
    for in_place in (False, True):
        passes("cpu_infer", (xz, mask, None, active, lengths, *both, 0.5, in_place))


@pytest.mark.parametrize("reverse", [False, True])
def test_torch(reverse):
    torch.manual_seed(0)
    delta, inputs = (torch.rand(11, 2, 6).requires_grad_() for _ in range(2))
    B, C = (torch.randn(11, 2, 3).requires_grad_() for _ in range(2))
    A = (-torch.rand(3, 6)).requires_grad_()
    passes("torch_scan", (delta, inputs, A, B, C, reverse, True))


@pytest.mark.parametrize("reverse", [False, True])
def test_window_conv(reverse):
    xz, mask, *_ = scan_inputs().values()
    x = xz.detach()[..., :6].requires_grad_()  # strided
    passes("window_conv", (x, mask, *weights()[0][:2], reverse))


def test_reference():
    xz, mask, _, active, lengths = scan_inputs(tokens=4).values()
    passes("reference_branch", (xz, *weights()[0], mask, active[:, 0], lengths, True, False))
    passes("reference_branch", (xz, *weights()[0], mask, active[:, 0], lengths, True, True))
    passes("reference_branch", (xz, *weights()[0], None, None, None, False, False))


@pytest.mark.parametrize("hidden", [None, torch.float32, torch.bfloat16])
def test_add_rms_norm(hidden):
    torch.manual_seed(0)
    residual, weight = torch.randn(2, 3, 8).requires_grad_(), torch.rand(8).requires_grad_()
    given = None if hidden is None else torch.randn(2, 3, 8).to(hidden).requires_grad_()
    passes("add_rms_norm", (given, residual, weight, 1e-5, hidden or torch.float32))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_forward_mode_derivatives_are_refused(backend, trained, monkeypatch):
    """They would be 0 without a word."""
    if backend == "cpu":
        skip_without_kernels()
    monkeypatch.setenv("DYVM_BACKEND", backend)
    xz, (forward, _) = scan_inputs()["xz"].detach(), weights(trained)
    for call in (
        lambda x: selective_scan.ssm_branch(x, forward),
        lambda x: ops.rms_norm.add_rms_norm(None, x, torch.ones(12, requires_grad=trained))[0],
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(call, (xz,), (xz,))


def test_compiled_programs_of_other_versions_are_not_found(tmp_path):
    """PyTorch's cache on disk knows an operator by its name, whatever its results are."""
    assert f"dyvm {operators._version()}" in torch.compiler.config.cache_key_tag
    (tmp_path / "a.py").write_text("1")
    before = operators._version(tmp_path)
    assert before == operators._version(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert operators._version(tmp_path) != before
