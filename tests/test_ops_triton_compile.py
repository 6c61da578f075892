"""Every Triton kernel is compiled for Hopper (sm_90) as the host code launches it; no GPU is
needed.

What the compiler refuses, and states that no longer fit in registers, show here and not on the
first GPU.
"""

import os
import re
import subprocess

import pytest
import torch

from ops.selective_scan import BranchParams

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile"
)


def signature(function, arguments: dict) -> tuple[dict, dict, dict]:
    """Types, constants and divisibility by 16 of a launch's arguments, as Triton specialises a
    kernel for them.
    """
    types, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        name, value = parameter.name, arguments[parameter.name]
        is_size = type(value) is int and not parameter.is_constexpr
        if (
            parameter.is_constexpr
            or value is None
            or (is_size and value == 1 and not parameter.do_not_specialize)
        ):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[name] = (
                "*"
                + {
                    torch.float32: "fp32",
                    torch.bfloat16: "bf16",
                    torch.int64: "i64",
                    torch.bool: "i1",
                }[value.dtype]
            )
            divisible = value.data_ptr() % 16 == 0
        else:
            types[name] = "i32" if is_size else "fp32"
            divisible = is_size and value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Launches compile instead of running; collects bytes of stack per thread."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    stacks = {}

    def compile_only(function, *args, grid, warmup=False, **kwargs):
        options = {
            name: kwargs.pop(name)
            for name in ("num_warps", "num_stages", "num_ctas", "maxnreg")
            if kwargs.get(name) is not None
        }
        kwargs = {name: value for name, value in kwargs.items() if name in function.arg_names}
        arguments = dict(zip(function.arg_names, args)) | kwargs  # noqa: B905 - constants come by name
        kernel = triton.compile(
            ASTSource(function, *signature(function, arguments)),
            target=GPUTarget("cuda", 90, 32),
            options=options,
        )
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        report = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        stack = int(re.search(r"STACK:(\d+)", report).group(1))
        stacks.setdefault(function.__name__, []).append(stack)

    monkeypatch.setattr(triton.runtime.JITFunction, "run", compile_only)
    return stacks


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
    assert max(compiled.pop("scan_backward")) <= 64  # a few words
    assert set(compiled) == forward_kernels | {"gate_backward", "conv_backward"}
    assert all(max(stacks) == 0 for stacks in compiled.values()), compiled


def test_training_with_a_mask_in_place(compiled, forward_kernels):
    from ops.selective_scan import gpu

    xz = torch.zeros(2, 5, 1536, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(2, 5, requires_grad=True)
    gpu.bidirectional_ssm(
        xz, branch(768, 16, 24), branch(768, 16, 24), mask=mask, in_place=True
    ).sum().backward()
    assert max(compiled.pop("scan_backward")) <= 64
    # PyTorch's operators convolve
    assert set(compiled) == forward_kernels - {"conv_forward"} | {"gate_backward"}
    assert all(max(stacks) == 0 for stacks in compiled.values()), compiled


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
    assert set(compiled) == forward_kernels
    assert all(max(stacks) == 0 for stacks in compiled.values()), compiled


def test_one_direction_in_float32(compiled, forward_kernels):
    from ops.selective_scan import gpu

    xz = torch.zeros(2, 5, 1536, requires_grad=True)
    gpu.ssm_branch(xz, branch(768, 16, 24), reverse=True).sum().backward()
    backward = {"gate_backward", "scan_backward", "conv_backward"}
    assert set(compiled) == forward_kernels | backward
    assert all(max(compiled[kernel]) <= 16 for kernel in forward_kernels), compiled


def test_rms_norm(compiled):
    from ops.rms_norm_triton import backward, forward

    hidden = torch.zeros(2, 5, 384, dtype=torch.bfloat16)
    residual, weight = torch.zeros(2, 5, 384), torch.ones(384)
    normed, total, scale = forward(hidden, residual, weight, 1e-5, torch.bfloat16)
    backward(normed, total, total, scale, weight, torch.bfloat16)
    assert compiled == {"_forward_kernel": [0], "_backward_kernel": [0]}
