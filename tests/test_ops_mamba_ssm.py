"""The `mamba_ssm` backend around stand-ins for the two packages, which check what they are given
and compute by the reference functions; on a GPU with the packages installed, around the real ones.
"""

import sys
from types import ModuleType

import pytest
import torch

from ops import selective_scan
from ops.selective_scan import (
    BackendError,
    BranchParams,
    bidirectional_ssm,
    mamba_ssm,
    reference,
    ssm_branch,
)


@pytest.fixture
def calls(monkeypatch):
    """Installs the stand-ins on the CPU; the calls that they receive."""
    seen = []

    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        assert x.stride(2) == 1 or x.stride(1) == 1
        assert x.dtype == weight.dtype == bias.dtype and weight.is_contiguous()
        seen.append(("conv", x.dtype))
        return reference.causal_conv1d(x, weight, bias, activation)

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        inputs = [t for t in (u, delta, B, C, z) if t is not None]
        weights = [t for t in (A, D, delta_bias) if t is not None]
        assert all(t.is_contiguous() and t.dtype == u.dtype for t in inputs)
        assert all(t.is_contiguous() and t.dtype == torch.float32 for t in weights)
        assert delta_softplus and B.shape == C.shape == (u.shape[0], A.shape[1], u.shape[2])
        seen.append(("scan", u.dtype))
        return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)[0].to(
            u.dtype
        )

    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    conv = ModuleType("causal_conv1d")
    conv.causal_conv1d_fn = causal_conv1d_fn
    for name, module in (
        ("mamba_ssm", ModuleType("mamba_ssm")),
        ("mamba_ssm.ops", ModuleType("mamba_ssm.ops")),
        (interface.__name__, interface),
        (conv.__name__, conv),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(mamba_ssm, "_DEVICE", "cpu")
    return seen


def draw_params(E, N, R, device="cpu"):
    sizes = dict(
        conv_weight=(E, 4),
        conv_bias=(E,),
        x_proj_weight=(R + 2 * N, E),
        dt_proj_weight=(E, R),
        dt_proj_bias=(E,),
        A=(E, N),
        D=(E,),
    )
    params = BranchParams(
        **{name: 0.4 * torch.randn(size, device=device) for name, size in sizes.items()}
    )
    return params._replace(A=-torch.exp(params.A))


def error(value, wanted):
    return ((value.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def results(backend, inputs, options):
    """Output and gradients of every floating-point tensor."""
    inputs = [
        BranchParams(*(t.clone().requires_grad_() for t in value))
        if isinstance(value, BranchParams)
        else value.clone().requires_grad_()
        for value in inputs
    ]
    xz, params, mask = inputs
    y = backend.ssm_branch(xz, params, mask=mask, **options)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype))
    return [y.detach(), xz.grad, mask.grad, *(t.grad for t in params)]


@pytest.mark.parametrize("reverse", [False, True])
def test_agrees_with_the_reference(calls, reverse):
    torch.manual_seed(0)
    B, L, E = 3, 17, 12
    inputs = torch.randn(B, L, 2 * E), draw_params(E, 4, 2), torch.rand(B, L)
    options = {
        "reverse": reverse,
        "active": torch.tensor([True, False, True]),
        "lengths": torch.tensor([17, 9, 5]),
    }
    values = results(mamba_ssm, inputs, options)
    exact = results(
        reference,
        (inputs[0].double(), BranchParams(*(t.double() for t in inputs[1])), inputs[2].double()),
        options,
    )
    assert max(map(error, values, exact)) < 5e-6
    assert [kind for kind, _ in calls] == ["conv", "scan"]


def test_operator(calls):
    """PyTorch's checks of the registered operator, around the stand-ins."""
    xz = torch.randn(2, 4, 12, requires_grad=True)
    params = [tensor.requires_grad_() for tensor in draw_params(6, 3, 1)]
    mask, active = torch.rand(2, 4, requires_grad=True), torch.tensor([True, False])
    lengths = torch.tensor([4, 2])
    arguments = (xz, *params, mask, active, lengths, True, False)
    torch.library.opcheck(torch.ops.dyvm.mamba_ssm_branch.default, arguments)
    assert calls


def test_half_precision_reaches_the_kernels(calls):
    torch.manual_seed(0)
    xz, params = torch.randn(2, 7, 16).bfloat16(), draw_params(8, 4, 2)
    y = mamba_ssm.ssm_branch(xz, params)
    assert (
        calls == [("conv", torch.bfloat16), ("scan", torch.bfloat16)] and y.dtype == torch.bfloat16
    )
    assert (
        error(y, reference.ssm_branch(xz.double(), BranchParams(*(t.double() for t in params))))
        < 2e-2
    )


def test_empty(calls):
    assert mamba_ssm.ssm_branch(torch.zeros(0, 3, 16), draw_params(8, 4, 2)).shape == (0, 3, 8)
    assert mamba_ssm.ssm_branch(torch.zeros(2, 0, 16), draw_params(8, 4, 2)).shape == (2, 0, 8)
    assert not calls


def test_available_calls_the_kernels(calls, monkeypatch):
    assert mamba_ssm.available() is None
    assert [kind for kind, _ in calls] == ["conv", "scan"]

    def fail(*args, **kwargs):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(sys.modules["causal_conv1d"], "causal_conv1d_fn", fail)
    assert "no kernel image" in mamba_ssm.available()
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    assert "do not run here (ModuleNotFoundError" in mamba_ssm.available()


def test_a_mask_in_place_goes_to_the_next_backend(calls, monkeypatch):
    monkeypatch.delenv("DYVM_BACKEND", raising=False)
    monkeypatch.setattr(selective_scan, "PREFERENCE", ("mamba_ssm", "torch"))
    selective_scan._unavailable.cache_clear()
    xz, params, mask = torch.randn(1, 5, 16), draw_params(8, 4, 2), torch.ones(1, 5)
    ssm_branch(xz, params, mask=mask)
    ssm_branch(xz, params, in_place=True)  # no mask: nothing to do in place
    used = len(calls)
    assert used
    y = bidirectional_ssm(xz, params, params, mask=mask, in_place=True)
    assert len(calls) == used
    torch.testing.assert_close(y, bidirectional_ssm(xz, params, params), rtol=1e-5, atol=1e-5)
    selective_scan._unavailable.cache_clear()


def test_a_mask_in_place_is_refused_by_name(calls, monkeypatch):
    monkeypatch.setenv("DYVM_BACKEND", "mamba_ssm")
    xz, params, mask = torch.zeros(1, 2, 16), draw_params(8, 4, 2), torch.ones(1, 2)
    with pytest.raises(BackendError, match="DYVM_BACKEND=mamba_ssm: has no in-place form of the"):
        ssm_branch(xz, params, mask=mask, in_place=True)
    with pytest.raises(ValueError, match="mamba_ssm has no in-place form of the mask"):
        mamba_ssm.ssm_branch(xz, params, mask=mask, in_place=True)
    assert not calls


def test_takes_names_what_it_refuses(monkeypatch):
    xz, params = torch.zeros(1, 2, 16), draw_params(8, 4, 2)
    monkeypatch.setenv("DYVM_BACKEND", "mamba_ssm")
    with pytest.raises(
        BackendError, match="DYVM_BACKEND=mamba_ssm: runs on CUDA tensors, not on cpu"
    ):
        ssm_branch(xz, params)
    monkeypatch.setattr(mamba_ssm, "_DEVICE", "cpu")
    assert mamba_ssm.takes(xz, params) is None
    assert "float64" in mamba_ssm.takes(xz.double(), params)
    assert "width 2 to 4, not 5" in mamba_ssm.takes(
        xz, params._replace(conv_weight=torch.zeros(8, 5))
    )
    assert "not 257" in mamba_ssm.takes(xz, params._replace(A=torch.zeros(8, 257)))


def test_packages_without_their_cuda_part(calls, monkeypatch):
    """They import, and what they call is missing."""
    absent = {"selective_scan_cuda", "causal_conv1d_cuda"}
    for name in absent:
        monkeypatch.delitem(sys.modules, name, raising=False)
    missing = AttributeError("'NoneType' object has no attribute 'fwd'")

    def fails(*args, **kwargs):
        raise missing

    monkeypatch.setattr(
        sys.modules["mamba_ssm.ops.selective_scan_interface"], "selective_scan_fn", fails
    )
    reason = mamba_ssm.available()
    assert "(AttributeError: 'NoneType' object has no attribute 'fwd'); mamba-ssm and " in reason
    assert reason.endswith(
        "mamba-ssm and causal-conv1d installed without the CUDA part: rebuild with "
        "MAMBA_KEEP_CUDA_BUILD=TRUE, see requirements-cuda.txt"
    )
    monkeypatch.setitem(sys.modules, "causal_conv1d_cuda", ModuleType("causal_conv1d_cuda"))
    assert "; mamba-ssm installed without the CUDA part" in mamba_ssm.available()
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
    assert mamba_ssm.available().endswith("has no attribute 'fwd')")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_packages(monkeypatch):
    reason = mamba_ssm.available()
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    monkeypatch.setenv("DYVM_BACKEND", "mamba_ssm")
    xz, params = (
        torch.randn(2, 197, 256, device="cuda"),
        [draw_params(128, 16, 8, "cuda") for _ in range(2)],
    )
    mask = (torch.arange(197, device="cuda") < 150).float().expand(2, 197)
    y = bidirectional_ssm(xz, *params, mask=mask, scale=0.5)
    exact = [BranchParams(*(t.double() for t in branch)) for branch in params]
    monkeypatch.setenv("DYVM_BACKEND", "reference")
    assert error(y, bidirectional_ssm(xz.double(), *exact, mask=mask, scale=0.5)) < 1e-5
