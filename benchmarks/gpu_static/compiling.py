"""What the host code launches, compiled for any GPU on a machine without one.

Launches are caught instead of run, with the very arguments, so that a kernel is compiled as Triton
would specialise it at that call.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from utils.errors import UserError

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")  # of a launch, not of the kernel
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


class Launch(NamedTuple):
    """One launch: a `@triton.jit` function, all its arguments by name, options and grid."""

    function: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def constants(self) -> dict[str, Any]:
        """The `tl.constexpr` among the arguments, types by their names."""
        values = {p.name: self.arguments[p.name] for p in self.function.params if p.is_constexpr}
        plain = (bool, int, float, str, type(None))
        return {n: v if isinstance(v, plain) else str(v) for n, v in values.items()}

    @property
    def warps(self) -> int:
        return self.options.get("num_warps", 4)


@contextmanager
def caught() -> Iterator[list[Launch]]:
    """Within it Triton's kernels are not run; the list gets their launches."""
    launches = []

    def catch(function, *args, grid, warmup=False, **kwargs):
        options = {name: kwargs[name] for name in OPTIONS if kwargs.get(name) is not None}
        named = {name: value for name, value in kwargs.items() if name in function.arg_names}
        defaults = {p.name: p.default for p in function.params if p.has_default}
        positional = dict(zip(function.arg_names, args))  # noqa: B905 - constants come by name
        arguments = defaults | positional | named
        launches.append(Launch(function, arguments, options, tuple(grid)))

    with mock.patch.object(triton.runtime.JITFunction, "run", catch):
        yield launches


def signature(launch: Launch) -> tuple[dict, dict, dict]:
    """Types, constants and divisibility by 16 of a launch's arguments, as Triton specialises a
    kernel for them.
    """
    types, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.function.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        is_size = type(value) is int and not parameter.is_constexpr
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_size and value == 1 and specialised):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
            divisible = value.data_ptr() % 16 == 0
        elif is_size:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and specialised
        else:
            types[name], divisible = "fp32", False
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compiled(launch: Launch, capability: int) -> bytes:
    """The kernel's cubin for a compute capability (90 is sm_90)."""
    kernel = triton.compile(
        ASTSource(launch.function, *signature(launch)),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options,
    )
    return kernel.asm["cubin"]


class Resources(NamedTuple):
    """Of one kernel: registers and bytes of stack of a thread, bytes of shared memory of a block
    that are known when it is compiled.
    """

    registers: int
    stack: int
    shared: int


def resources(cubin: Path) -> Resources:
    report = tool("cuobjdump", "-res-usage", cubin)
    return Resources(
        *(int(re.search(rf"{name}:(\d+)", report).group(1)) for name in ("REG", "STACK", "SHARED"))
    )


def tool(name: str, *arguments: str | Path) -> str:
    """What a CUDA binary tool prints: Triton's own, or where that fails (a cubin by a newer
    compiler) the one on PATH. Raises UserError where both fail.
    """
    found = [getattr(triton.knobs.nvidia, name).path, shutil.which(name)]
    for path in filter(None, found):
        done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout
    raise UserError(f"{name} does not read {arguments[-1]}: {done.stderr.strip()[:200]}")
