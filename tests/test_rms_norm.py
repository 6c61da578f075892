"""Residual add + RMSNorm against PyTorch's own, in value, gradient and type."""

import pytest
import torch

from ops.rms_norm import add_rms_norm


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
