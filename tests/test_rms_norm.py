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


@pytest.mark.parametrize("width", [1, 5, 16, 192, 203])
@pytest.mark.parametrize("rows", [3, 1400])
@pytest.mark.parametrize("with_stream", [True, False])
def test_the_gradient_by_the_kernel(monkeypatch, width, rows, with_stream):
    """The same as PyTorch's operators, with any number of threads to the last bit."""
    monkeypatch.delenv("DYVM_BACKEND", raising=False)
    if not available("cpu"):
        pytest.skip("the CPU kernels cannot be built here")
    total, weight, grad_normed = (
        torch.randn(rows, width) * 3,
        torch.rand(width),
        torch.randn(rows, width),
    )
    stream = torch.randn(rows, width) if with_stream else None
    scale = (total.square().mean(-1, keepdim=True) + 0.01).rsqrt()
    given = grad_normed, stream, total, scale, weight, torch.float32
    assert rms_norm._on_cpu(None, total, weight, torch.float32) is not None
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(rms_norm._backward(*given))
    assert all(map(torch.equal, *found))
    monkeypatch.setattr(rms_norm, "_on_cpu", lambda *given: None)
    wide = (None if each is None else each.double() for each in given[:-1])
    grad, _, grad_weight = rms_norm._backward(*wide, torch.float64)
    torch.testing.assert_close(found[0][0].double(), grad, rtol=1e-5, atol=1e-5)
    size = (grad_normed * total * scale).abs().sum(0).double()
    assert ((found[0][2] - grad_weight).abs() <= 1e-6 * size).all()


def test_other_types_go_back_through_pytorch():
    hidden = torch.randn(2, 5, 12, dtype=torch.bfloat16, requires_grad=True)
    residual, weight = torch.randn(2, 5, 12, requires_grad=True), torch.rand(12, requires_grad=True)
    normed, total = add_rms_norm(hidden, residual, weight)
    (normed.sum() + total.sum()).backward()
    assert hidden.grad.dtype == torch.bfloat16 and residual.grad.dtype == torch.float32
    torch.testing.assert_close(hidden.grad.float(), residual.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap's, in PyTorch's form
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
