"""Residual add + RMSNorm against PyTorch's own, in value, gradient and type."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ops import rms_norm
from ops.rms_norm import add_rms_norm
from ops.selective_scan import available


@pytest.mark.parametrize("first", ["both", "no residual", "no hidden"])
def test_add_rms_norm(first):
    tensors = [torch.randn(2, 5, 12, dtype=torch.float64) for _ in range(2)]
    hidden = None if first == "no hidden" else tensors[0].requires_grad_()
    residual = None if first == "no residual" else tensors[1].requires_grad_()
    weight = torch.rand(12, dtype=torch.float64, requires_grad=True)
    normed, total = add_rms_norm(hidden, residual, weight, 1e-5)
    expected = sum(t for t in (hidden, residual) if t is not None)
    assert torch.equal(total, expected)
    assert torch.allclose(normed, torch.nn.functional.rms_norm(expected, (12,), weight, 1e-5))
    with torch.no_grad():
        torch.testing.assert_close(add_rms_norm(hidden, residual, weight, 1e-5), (normed, total))
    leaves = [t for t in (hidden, residual, weight) if t is not None]
    assert torch.autograd.gradcheck(
        lambda *given: add_rms_norm(
            given[0] if hidden is not None else None,
            given[-2] if residual is not None else None,
            given[-1],
        ),
        leaves,
    )


def test_add_rms_norm_types():
    hidden, residual, weight = (
        torch.randn(2, 5, 12).bfloat16(),
        torch.randn(2, 5, 12),
        torch.rand(12),
    )
    normed, total = add_rms_norm(hidden, residual, weight)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        normed, total = add_rms_norm(residual, residual, weight)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="hidden, residual or both"):
        add_rms_norm(None, None, weight)
    with pytest.raises(ValueError, match="one shape"):
        add_rms_norm(hidden[:, :3], residual, weight)
    with pytest.raises(ValueError, match=r"weight must have shape \[12\]"):
        add_rms_norm(hidden, residual, weight[:5])


@pytest.mark.parametrize("width", [1, 5, 16, 192, 203])
@pytest.mark.parametrize("rows, threads", [(3, 1), (1400, 2)])
@pytest.mark.parametrize("with_hidden", [True, False])
def test_the_kernel_of_the_cpu(monkeypatch, width, rows, threads, with_hidden):
    """The same as PyTorch's operators, a row whatever stands beside it."""
    monkeypatch.delenv("DYVM_BACKEND", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    if not available("cpu"):
        pytest.skip("the CPU kernels cannot be built here")
    hidden = torch.randn(2, rows, width) if with_hidden else None
    residual, weight = torch.randn(2, rows, width) * 3, torch.rand(width)
    kernels = rms_norm._on_cpu(hidden, residual, weight, torch.float32)
    normed, total, scale = kernels.forward(hidden, residual, weight, 1e-5, torch.float32)
    expected = rms_norm._composed(hidden, residual, weight, 1e-5, torch.float32)
    assert torch.equal(total, expected[1])
    torch.testing.assert_close((normed, scale), (expected[0], expected[2]), rtol=1e-5, atol=1e-6)
    alone = add_rms_norm(None if hidden is None else hidden[1:, 2:3], residual[1:, 2:3], weight)
    assert torch.equal(alone[0], normed[1:, 2:3])


def test_the_kernel_leaves_the_rest_to_pytorch(monkeypatch):
    x, weight = torch.randn(2, 5, 12), torch.rand(12)
    whole = rms_norm._composed(None, x, weight, 1e-5, torch.float32)[0]
    with torch.no_grad():
        for given in x.transpose(0, 1), x[:, :, :6].double(), x[:, :0]:
            add_rms_norm(None, given, weight[: given.shape[-1]].to(given.dtype))
        found = torch.func.vmap(lambda each: add_rms_norm(None, each, weight)[0])(x[:, None])
        torch.testing.assert_close(found[:, 0], whole)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert add_rms_norm(None, mode.from_tensor(x), weight)[0].shape == x.shape
    assert rms_norm._on_cpu(None, x, torch.rand(12, device="meta"), torch.float32) is None
    monkeypatch.setenv("DYVM_BACKEND", "torch")
    assert rms_norm._on_cpu(None, x, weight, torch.float32) is None
    for bad in (float("nan"), float("inf")):
        monkeypatch.setenv("DYVM_BACKEND", "cpu")
        spoilt = x.clone()
        spoilt[0, 1, 3] = bad
        normed = add_rms_norm(None, spoilt, weight)[0]
        assert not normed[0, 1].isfinite().all()
        torch.testing.assert_close(normed[1], whole[1])
