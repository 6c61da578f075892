"""Every Triton kernel is compiled for Hopper (sm_90) as the host code launches it; no GPU is
needed.

What the compiler refuses, and states that no longer fit in registers, show here and not on the
first GPU.
"""

import os

import pytest
import torch

from ops.selective_scan import BranchParams

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from benchmarks.gpu_static import compiling

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile"
)


@pytest.fixture
def compiled(tmp_path):
    """Launches are caught instead of run; a function that compiles them: {kernel: bytes of stack
    per thread of each launch}.
    """

    def compile_all() -> dict[str, list[int]]:
        stacks: dict[str, list[int]] = {}
        for launch in launches:
            cubin = tmp_path / "kernel.cubin"
            cubin.write_bytes(compiling.compiled(launch, 90))
            stacks.setdefault(launch.name, []).append(compiling.resources(cubin).stack)
        return stacks

    with compiling.caught() as launches:
        yield compile_all


WHOLE = {"scan_forward"}
IN_PIECES = {"piece_ends", "scan_pieces", "join_directions"}


@pytest.fixture(params=[0, 3])
def forward_kernels(request, monkeypatch):
    """The kernels of the forward scan: one for many images, several for few."""
    from ops.selective_scan.gpu import plan

    monkeypatch.setattr(plan, "best_pieces", lambda *sizes: request.param)
    return {"conv_forward"} | (IN_PIECES if request.param else WHOLE)


def branch(E, N, R):
    sizes = ((E, 4), (E,), (R + 2 * N, E), (E, R), (E,), (E, N), (E,))
    return BranchParams(*(torch.zeros(size, requires_grad=True) for size in sizes))


def test_training(compiled, forward_kernels):
    """Sizes of Vim-S: E 768, N 16, R 24."""
    from ops.selective_scan import gpu

    xz = torch.zeros(2, 5, 1536, dtype=torch.bfloat16, requires_grad=True)
    gpu.bidirectional_ssm(
        xz, branch(768, 16, 24), branch(768, 16, 24), mask=torch.ones(2, 5), gates=torch.ones(2, 2)
    ).sum().backward()
    stacks = compiled()
    assert max(stacks.pop("scan_backward")) <= 64  # a few words
    assert set(stacks) == forward_kernels | {"gate_backward", "conv_backward"}
    assert all(max(of_kernel) == 0 for of_kernel in stacks.values()), stacks


def test_training_with_a_mask_in_place(compiled, forward_kernels):
    from ops.selective_scan import gpu

    xz = torch.zeros(2, 5, 1536, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(2, 5, requires_grad=True)
    gpu.bidirectional_ssm(
        xz, branch(768, 16, 24), branch(768, 16, 24), mask=mask, in_place=True
    ).sum().backward()
    stacks = compiled()
    assert max(stacks.pop("scan_backward")) <= 64
    # PyTorch's operators convolve
    assert set(stacks) == forward_kernels - {"conv_forward"} | {"gate_backward"}
    assert all(max(of_kernel) == 0 for of_kernel in stacks.values()), stacks


@torch.no_grad()
def test_inference(compiled, forward_kernels):
    from ops.selective_scan import gpu

    xz = torch.zeros(2, 5, 1536, dtype=torch.bfloat16)
    gpu.bidirectional_ssm(
        xz,
        branch(768, 16, 24),
        branch(768, 16, 24),
        active=torch.ones(2, 2, dtype=torch.bool),
        lengths=torch.ones(2, dtype=torch.int64),
    )
    stacks = compiled()
    assert set(stacks) == forward_kernels
    assert all(max(of_kernel) == 0 for of_kernel in stacks.values()), stacks


def test_one_direction_in_float32(compiled, forward_kernels):
    from ops.selective_scan import gpu

    xz = torch.zeros(2, 5, 1536, requires_grad=True)
    gpu.ssm_branch(xz, branch(768, 16, 24), reverse=True).sum().backward()
    stacks = compiled()
    backward = {"gate_backward", "scan_backward", "conv_backward"}
    assert set(stacks) == forward_kernels | backward
    assert all(max(stacks[kernel]) <= 16 for kernel in forward_kernels), stacks


def test_rms_norm(compiled):
    from ops.rms_norm_triton import backward, forward

    hidden = torch.zeros(2, 5, 384, dtype=torch.bfloat16)
    residual, weight = torch.zeros(2, 5, 384), torch.ones(384)
    normed, total, scale = forward(hidden, residual, weight, 1e-5, torch.bfloat16)
    backward(normed, total, total, scale, weight, torch.bfloat16)
    assert compiled() == {"_forward_kernel": [0], "_backward_kernel": [0]}
