"""Peak memory of a DyVM training step on a GPU, of ours and of the release-like one in train.py:
computed, not measured.

Both steps run from end to end on tensors without numbers (`FakeTensorMode`), while every tensor is
counted from when it is made until nothing holds it. The host code around the kernels runs and asks
for all its memory; no kernel is launched. Stand-ins for mamba-ssm and causal-conv1d keep and
allocate what those packages' functions do. What PyTorch's own kernels take while they run is not
counted.

The tensors claim to be a CPU's, since autograd refuses a GPU's where there is none; the mixer's way
of running a few images at a time on a CPU is turned off.
"""

import argparse
import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks import train
from models import mixer
from models.reduction import base
from ops import rms_norm, selective_scan, triton_support
from ops.selective_scan import mamba_ssm
from ops.selective_scan.gpu import scan_gradient
from ops.selective_scan.gpu.cuda import problem

BLOCK = 512  # bytes that PyTorch's allocator rounds up to
CHUNK = 2048  # steps between the states that mamba-ssm keeps
_scan, _forward, _backward = (
    importlib.import_module(f"ops.selective_scan.gpu.{name}")
    for name in ("operator", "forward", "backward")
)
# This project's operators, by what they run: the count looks inside.
INSIDE = {
    _scan.operator: _scan._scan,
    _scan._backward_operator: _scan._gradients,
    rms_norm._operator: rms_norm._forward,
    rms_norm._backward_operator: rms_norm._backward,
}


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors made within it that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in INSIDE:
            with self:
                result = INSIDE[function](*args, **kwargs)
        else:
            result = function(*args, **kwargs)
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size

    def peak(self, call: Callable[[], Any]) -> int:
        """Bytes that a call needs at its peak, beyond what is held before it."""
        before = self.most = self.now
        call()
        return self.most - before


class _Convolution(torch.autograd.Function):
    """The memory of causal_conv1d_fn, of causal-conv1d 1.5."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = ctx.saved_tensors
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        grad_x, *others = (
            torch.empty_like(x),
            *map(torch.zeros_like, (weight.float(), bias.float())),
        )
        return grad_x, *(grad.to(x.dtype) for grad in others)


class _Scan(torch.autograd.Function):
    """The memory of selective_scan_fn, of mamba-ssm 2.2: u, delta, z [B, E, L]; B, C [B, N, L]."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias) -> Tensor:
        images, channels, tokens = u.shape
        out, gated = torch.empty_like(delta), torch.empty_like(z)
        chunks = -(-tokens // CHUNK)
        states = A.new_empty(images, channels, chunks, 2 * A.shape[1])
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, states, out)
        return gated

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C, D, z, bias, *_ = ctx.saved_tensors
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        like = torch.empty_like(z), torch.empty_like(u), torch.empty_like(delta)
        sums = [torch.zeros_like(t, dtype=torch.float32) for t in (A, B, C, D, bias)]
        grad_A, grad_B, grad_C, grad_D, grad_bias = sums
        grad_z, grad_u, grad_delta = like
        both = grad_B.to(B.dtype), grad_C.to(C.dtype)
        return grad_u, grad_delta, grad_A, *both, grad_D, grad_z, grad_bias


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return _Convolution.apply(x, weight, bias)


def _selective_scan(u, delta, A, B, C, D, *, z, delta_bias, delta_softplus) -> Tensor:
    return _Scan.apply(u, delta, A, B, C, D, z, delta_bias)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Within it Triton's and mamba-ssm's kernels seem to be there, and none is launched."""

    def nothing(*args, **kwargs):
        return None

    def memory_alone(given: scan_gradient.Given) -> scan_gradient.Result:
        return scan_gradient.empty_result(problem.prepared(given), problem.BLOCK)

    def fused(*tensors):
        return rms_norm._module("triton") if rms_norm._asked_for("triton") else None

    with ExitStack() as stack:
        for owner, name, value in (
            (selective_scan, "PREFERENCE", ("triton", "mamba_ssm")),
            (selective_scan, "_refusal", nothing),
            (triton_support, "refusal", nothing),
            (triton.runtime.JITFunction, "run", nothing),
            (rms_norm, "_fused", fused),
            (mixer, "GROUP_BYTES", 1 << 62),
            (_forward, "_packed", lambda bc: True),  # no numbers lie anywhere
            (_backward.cuda, "scan_backward", memory_alone),
            (mamba_ssm, "_kernels", lambda: (_selective_scan, _convolve)),
            # Image by image it waits for numbers; its memory is that of a few integers.
            (train, "kept_first_by_image", base.kept_first),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def dyvm_step(batch: int, model: str = "vim_small") -> dict[str, int]:
    """{step: bytes} at the peak of one training step in bf16, beyond what is held before it:
    weights, gradients of the last step, moments of the optimizer.
    """
    args = argparse.Namespace(
        device="cpu",
        precision="bf16",
        batch=batch,
        dyvm_model=model,
        release_backend="mamba_ssm",
        release_checkpointing=False,
    )
    pair = train.build_pair(args)  # with numbers: building reads some
    conversion = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _as_on_a_gpu(), FakeTensorMode() as mode, Memory() as memory:
            fake = tuple(each._apply(mode.from_tensor) for each in pair)
            with mock.patch.object(train, "build_pair", lambda args: fake):
                steps = train.dyvm_part(args).steps
            for step in steps.values():
                step()  # the first one makes the optimizer's moments
            return {name: memory.peak(step) for name, step in steps.items()}
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(conversion)
