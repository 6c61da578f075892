"""The Triton kernels against the plain definitions in float64: outputs and every gradient.

Without a GPU the kernels run in Triton's interpreter, which must be switched on before they are
imported: `test_in_the_interpreter` runs this file's kernel tests in a process of their own. On a
GPU they run directly.
"""

from pathlib import Path

import pytest
import torch
from helpers import golden
from helpers.kernels import (
    DEVICE,
    INTERPRETED,
    compare,
    draw,
    draw_params,
    error,
    gpu,
    kernel,
    run_interpreted,
)

from ops.selective_scan import BackendError, BranchParams, KeptParams, bidirectional_ssm, ssm_branch

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")


def in_pieces(pieces, monkeypatch):
    """The scan cut into so many pieces of time, 0: one program for both directions."""
    from ops.selective_scan.gpu import plan

    monkeypatch.setattr(plan, "best_pieces", lambda *sizes: pieces)


@kernel
@pytest.mark.parametrize(
    "L, E, N, R, masks, pieces",
    [
        (17, 72, 16, 4, "general", 0),
        (17, 72, 16, 4, "general", 2),
        (33, 20, 16, 3, "prefix", 0),
        (33, 20, 16, 3, "prefix", 1),
        (1, 8, 8, 2, "none", 0),
        (1, 8, 8, 2, "none", 3),
        (17, 72, 16, 4, "general, in place", 0),
        (37, 20, 8, 3, "in place", 4),
        (1, 8, 8, 2, "in place", 1),
    ],
)
def test_kernel_bidirectional(L, E, N, R, masks, pieces, poisoned, monkeypatch):
    """Awkward sizes; `general` adds gates, lengths and directions that are off."""
    torch.manual_seed(0)
    in_pieces(pieces, monkeypatch)
    in_place = masks.endswith("in place")
    B = 2 if "general" in masks else 1
    mask = active = lengths = gates = None
    if "general" in masks:
        mask, gates = torch.rand(B, L, device=DEVICE), torch.rand(B, 2, device=DEVICE)
        lengths = torch.tensor([L - 4, L], device=DEVICE)
        active = torch.tensor([[True, True], [False, True]], device=DEVICE)
    elif masks == "prefix":
        mask = (torch.arange(L, device=DEVICE) < L - 7).float().expand(B, L).contiguous()
    if in_place:
        mask = (torch.rand(B, L, device=DEVICE) < 0.6).float()
    inputs = {
        "xz": draw(B, L, 2 * E),
        "forward": draw_params(E, N, R),
        "backward": draw_params(E, N, R),
        "mask": mask,
        "gates": gates,
    }
    compare(
        lambda **given: bidirectional_ssm(
            **given, active=active, lengths=lengths, scale=0.5, in_place=in_place
        ),
        inputs,
        5e-6,
        monkeypatch,
    )


@kernel
@pytest.mark.parametrize(
    "reverse, in_place, pieces",
    [(False, False, 0), (True, False, 0), (True, True, 0), (True, False, 1), (False, True, 2)],
)
def test_kernel_one_direction(reverse, in_place, pieces, poisoned, monkeypatch):
    """Images that are off, lengths of zero and beyond L; xz and lengths that are not contiguous."""
    torch.manual_seed(0)
    in_pieces(pieces, monkeypatch)
    B, L, E = 4, 5, 24
    active = torch.tensor([1, 0, 1, 1], device=DEVICE)
    lengths = torch.tensor([3, 5, 0, 9], device=DEVICE, dtype=torch.int32)
    lengths = torch.stack((lengths, lengths - 2), 1)[:, 0]
    inputs = {
        "xz": draw(B, 2 * E, L).mT,
        "params": draw_params(E, 16, 4),
        "mask": torch.rand(B, L, device=DEVICE),
    }
    compare(
        lambda **given: ssm_branch(
            **given, reverse=reverse, active=active, lengths=lengths, in_place=in_place
        ),
        inputs,
        5e-6,
        monkeypatch,
    )


@kernel
@pytest.mark.parametrize(
    "dtype, in_place, pieces",
    [
        (torch.bfloat16, False, 0),
        (torch.float16, False, 0),
        (torch.bfloat16, True, 0),
        (torch.bfloat16, False, 1),
        (torch.float16, False, 2),
    ],
)
def test_kernel_half_precision(dtype, in_place, pieces, poisoned, monkeypatch):
    """Float32's error of 5e-7, times how much coarser the type is."""
    torch.manual_seed(0)
    in_pieces(pieces, monkeypatch)
    tolerance = 5e-7 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    inputs = {
        "xz": draw(2, 6, 64),
        "forward": draw_params(32, 16, 4),
        "backward": draw_params(32, 16, 4),
        "gates": torch.ones(2, 2, device=DEVICE),
    }
    if in_place:
        inputs["mask"] = (torch.rand(2, 6, device=DEVICE) < 0.6).float()
    compare(
        lambda **given: bidirectional_ssm(**given, in_place=in_place),
        inputs,
        tolerance,
        monkeypatch,
        {"xz": dtype},
    )


@kernel
def test_kernel_in_pieces_is_the_same_scan(poisoned, monkeypatch):
    """However time is cut, also into pieces that an image of few tokens does not reach, and whether
    B and C are read word by word or number by number.
    """
    torch.manual_seed(0)
    monkeypatch.setenv("DYVM_BACKEND", "triton")
    L, E = 37, 24
    directions = draw_params(E, 16, 4), draw_params(E, 16, 4)
    odd = draw_params(E, 16, 3), draw_params(E, 16, 3)
    xz = draw(2, L, 2 * E)
    routing = {
        "lengths": torch.tensor([L, 5], device=DEVICE),
        "active": torch.tensor([[True, True], [False, True]], device=DEVICE),
        "gates": torch.rand(2, 2, device=DEVICE),
    }
    for params, cuts in ((directions, (1, 5)), (odd, (3,))):
        in_pieces(0, monkeypatch)
        with torch.no_grad():
            wanted = bidirectional_ssm(xz, *params, **routing, scale=0.5).double()
        for pieces in cuts:
            in_pieces(pieces, monkeypatch)
            with torch.no_grad():
                found = bidirectional_ssm(xz, *params, **routing, scale=0.5)
            assert error(found, wanted) < 5e-7, pieces


@kernel
@pytest.mark.parametrize("in_place, pieces", [(False, 0), (True, 0), (False, 2)])
def test_kernel_without_gradient(in_place, pieces, poisoned, monkeypatch):
    """The path that keeps nothing gives the same numbers, and nothing runs over an image that is
    off, nor back.
    """
    torch.manual_seed(0)
    in_pieces(pieces, monkeypatch)
    monkeypatch.setenv("DYVM_BACKEND", "triton")
    forward, backward = (
        BranchParams(*(t.requires_grad_() for t in draw_params(16, 16, 2))) for _ in range(2)
    )
    xz = draw(2, 5, 32)
    xz[1] = float("nan")
    routing = {"active": torch.tensor([[True, True], [False, False]], device=DEVICE)}
    if in_place:
        routing |= {"mask": torch.tensor([[0.0, 1, 0, 1, 1]] * 2, device=DEVICE), "in_place": True}
    kept = bidirectional_ssm(xz.clone().requires_grad_(), forward, backward, **routing)
    with torch.no_grad():
        free = bidirectional_ssm(xz, forward, backward, **routing)
    grads = torch.autograd.grad(kept.sum(), (*forward, *backward))
    assert all(grad.isfinite().all() and grad.any() for grad in grads)
    assert torch.equal(free, kept.detach())
    assert torch.equal(free[1], torch.zeros_like(free[1])) and free[0].isfinite().all()


@kernel
@torch.no_grad()
def test_kernel_weights_are_made_once(monkeypatch):
    """For weights that stay as they are a second call computes nothing of them, and the same."""
    monkeypatch.setenv("DYVM_BACKEND", "triton")
    given = draw_params(16, 16, 2), draw_params(16, 16, 2)
    xz = draw(2, 5, 32).bfloat16()
    wanted = bidirectional_ssm(xz, *given)
    directions = [KeptParams(*params) for params in given]
    assert torch.equal(bidirectional_ssm(xz, *directions), wanted)
    with torch.profiler.profile() as profile:
        assert torch.equal(bidirectional_ssm(xz, *directions), wanted)
    made = {"aten::stack", "aten::cat", "aten::_to_copy", "aten::clone"}
    assert not made & {event.key for event in profile.key_averages()}
    other = [KeptParams(*params) for params in reversed(given)]
    assert torch.equal(bidirectional_ssm(xz, *other), bidirectional_ssm(xz, *reversed(given)))
    mixed = directions[0], other[0]
    assert torch.equal(bidirectional_ssm(xz, *mixed), bidirectional_ssm(xz, given[0], given[1]))


@kernel
def test_kernel_nan_and_empty(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("DYVM_BACKEND", "triton")
    params, xz = draw_params(16, 8, 2), draw(2, 3, 32)
    xz[0, 0, 0] = float("nan")
    y = ssm_branch(xz, params)
    assert y[0].isnan().any() and y[1].isfinite().all()
    for B, L in ((0, 3), (2, 0)):
        empty = ssm_branch(draw(B, L, 32).requires_grad_(), params)
        assert empty.shape == (B, L, 16)
        empty.sum().backward()


@kernel
@pytest.mark.parametrize(
    "hidden, residual", [(torch.bfloat16, True), (torch.float32, False), (None, True)]
)
def test_kernel_add_rms_norm(hidden, residual, poisoned):
    from ops.rms_norm import _add_rms_norm, _fused

    torch.manual_seed(0)
    given = [
        None if hidden is None else draw(2, 3, 40).to(hidden),
        draw(2, 3, 40) if residual else None,
        draw(40),
    ]
    assert _fused(given[0], given[0] if given[1] is None else given[1], given[2])
    fast = [None if t is None else t.clone().requires_grad_() for t in given]
    plain = [None if t is None else t.double().requires_grad_() for t in given]
    normed, total = _add_rms_norm(*fast, 1e-5, torch.float32)
    wanted_total = sum(t for t in plain[:2] if t is not None)
    wanted = (
        wanted_total * torch.rsqrt(wanted_total.square().mean(-1, keepdim=True) + 1e-5) * plain[2]
    )
    grads = draw(2, 3, 40), draw(2, 3, 40)
    torch.autograd.backward((normed, total), grads)
    torch.autograd.backward((wanted, wanted_total), [g.double() for g in grads])
    assert error(normed, wanted) < 1e-6 and error(total, wanted_total) < 1e-6
    for value, correct in zip(fast, plain, strict=True):
        if value is not None:
            assert error(value.grad, correct.grad) < (
                4e-3 if value.dtype == torch.bfloat16 else 1e-6
            )


@kernel
@pytest.mark.parametrize("wanted", [(True, False), (True, True)])
def test_kernel_add_rms_norm_only_the_sum_has_a_gradient(wanted):
    """And the residual stream may want none, as behind frozen blocks."""
    from ops.rms_norm import _add_rms_norm

    hidden, residual = (draw(2, 3, 40).requires_grad_(w) for w in wanted)
    _, total = _add_rms_norm(hidden, residual, draw(40), 1e-5, torch.float32)
    grad = draw(2, 3, 40)
    total.backward(grad)
    assert torch.equal(hidden.grad, grad)
    assert torch.equal(residual.grad, grad) if wanted[1] else residual.grad is None


@kernel
def test_kernel_add_rms_norm_first_block():
    """No residual yet, and only the sum has a gradient."""
    from ops.rms_norm import _add_rms_norm

    hidden, grad = draw(2, 3, 40).requires_grad_(), draw(2, 3, 40)
    _add_rms_norm(hidden, None, draw(40), 1e-5, torch.float32)[1].backward(grad)
    assert torch.equal(hidden.grad, grad)


@kernel
def test_kernel_operator():
    """PyTorch's checks of the registered operator: sizes, types and gradients."""
    from ops.selective_scan import gpu
    from ops.selective_scan.params import flatten

    params = [BranchParams(*(t.requires_grad_() for t in draw_params(8, 4, 1))) for _ in range(2)]
    xz, mask = draw(2, 3, 16).requires_grad_(), draw(2, 3).requires_grad_()
    lengths = torch.tensor([3, 1], device=DEVICE)
    gates = draw(2, 2).requires_grad_()
    for in_place in (False, True):
        arguments = (xz, mask, gates, None, lengths, *flatten(params), 0.5, in_place, True)
        torch.library.opcheck(gpu.operator, arguments)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernel tests run in this process")
def test_in_the_interpreter():
    run_interpreted(Path(__file__), "test_kernel")


@pytest.mark.skipif(
    INTERPRETED or DEVICE == "cuda", reason="the recorded cases run on the GPU itself"
)
@pytest.mark.skipif(
    not golden.GOLDEN_DIR.is_dir(), reason=f"no recorded cases at {golden.GOLDEN_DIR}"
)
@pytest.mark.parametrize("kind", ["eval_", "train_"])
def test_a_recorded_case_in_the_interpreter(kind):
    """A whole model, evaluated or trained; the smallest case, as the interpreter is slow."""
    name = min(
        golden.names(kind),
        key=lambda name: (golden.GOLDEN_DIR / f"{name}.safetensors").stat().st_size,
    )
    found = run_interpreted(Path(__file__).with_name("test_golden.py"), f"triton-{name}]")
    assert "1 passed" in found


def test_takes_names_what_it_refuses(monkeypatch):
    from ops.selective_scan import gpu

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    E, N, R = 8, 16, 2
    xz, params = torch.zeros(1, 2, 2 * E), BranchParams(*(t.cpu() for t in draw_params(E, N, R)))
    assert gpu.takes(xz, params) is None
    assert "xz is torch.float64" in gpu.takes(xz.double(), params)
    assert "A is torch.float64" in gpu.takes(xz, params._replace(A=params.A.double()))
    assert "width 4, not 3" in gpu.takes(xz, params._replace(conv_weight=torch.zeros(E, 3)))
    assert "not 12" in gpu.takes(xz, params._replace(A=torch.zeros(E, 12)))
    assert "not 128" in gpu.takes(xz, params._replace(A=torch.zeros(E, 128)))
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("DYVM_BACKEND", "triton")
    with pytest.raises(BackendError, match="DYVM_BACKEND=triton: runs on CUDA tensors, not on cpu"):
        ssm_branch(xz, params)


@gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("L, E", [(63, 200), (197, 384)])
def test_gpu_sizes(L, E, dtype, tolerance, poisoned, monkeypatch):
    torch.manual_seed(0)
    inputs = {
        "xz": draw(3, L, 2 * E),
        "forward": draw_params(E, 16, 24),
        "backward": draw_params(E, 16, 24),
        "mask": (torch.arange(L, device=DEVICE) < L - 20).float().expand(3, L).contiguous(),
        "gates": torch.ones(3, 2, device=DEVICE),
    }
    compare(
        lambda **given: bidirectional_ssm(**given, scale=0.5),
        inputs,
        tolerance,
        monkeypatch,
        {"xz": dtype},
    )


@gpu
def test_gpu_graph(monkeypatch):
    """A forward pass never waits for the device, and its capture replays with new routing."""
    monkeypatch.setenv("DYVM_BACKEND", "triton")
    xz, params = draw(2, 50, 128).bfloat16(), (draw_params(64, 16, 4), draw_params(64, 16, 4))
    active, lengths = (
        torch.ones(2, 2, dtype=torch.bool, device=DEVICE),
        torch.tensor([50, 20], device=DEVICE),
    )
    bidirectional_ssm(xz, *params, active=active, lengths=lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bidirectional_ssm(xz, *params, active=active, lengths=lengths)
    active[1] = False
    lengths.fill_(33)
    graph.replay()
    assert torch.equal(y, bidirectional_ssm(xz, *params, active=active, lengths=lengths))
    torch.cuda.set_sync_debug_mode("error")
    try:
        bidirectional_ssm(xz, *params, active=active, lengths=lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
