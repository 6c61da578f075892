"""The scan's backward pass in CUDA C++, in place of Triton's kernel where it can run.

It is compiled at its first use on a device, and then for each type and with or without a mask
proves itself against Triton's kernel. Whatever fails costs one line of warning, and Triton runs
from then on. `DYVM_CUDA_BACKWARD=0` turns it off.
"""

import logging
import os
from functools import partial
from pathlib import Path

import torch

from utils.errors import first_line

from ..scan_gradient import Given, Result, empty_result
from . import driver, nvrtc, problem, proof

_SOURCE = Path(__file__).with_name("scan_backward.cu")

_OFF = ("0", "off", "false", "no")  # of DYVM_CUDA_BACKWARD

_logger = logging.getLogger(__name__)
_proven: dict[tuple, driver.Kernel] = {}
_failed = False


def takes(given: Given) -> str | None:
    """None, or why Triton's kernel runs instead."""
    if _failed or os.environ.get("DYVM_CUDA_BACKWARD", "").lower() in _OFF:
        return "is turned off"
    reason = _device_refusal(given.u.device) or problem.refusal(given)
    if reason is None and _key(given) not in _proven and torch.cuda.is_current_stream_capturing():
        return "is not compiled and tried while a CUDA graph is captured"
    return reason


def _device_refusal(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"runs on CUDA tensors, not on {device}"


def scan_backward(given: Given) -> Result | None:
    """The gradients, or None where Triton's kernel has to give them."""
    kernel = None if takes(given) else _kernel(given)
    return None if kernel is None else _run(kernel, given)


def program(dtype: torch.dtype, masked: bool, capability: tuple[int, int]) -> bytes:
    """The kernel compiled for a device of this compute capability. Raises nvrtc.CompileError."""
    return nvrtc.compiled(_SOURCE.read_text(), capability, problem.options(dtype, masked))


def _key(given: Given) -> tuple:
    return given.u.device.index, given.u.dtype, given.mask is not None


def _kernel(given: Given) -> driver.Kernel | None:
    """The kernel for these types, once it has proved itself."""
    global _failed
    key = _key(given)
    if key not in _proven and not _failed:
        device, dtype, masked = given.u.device, given.u.dtype, given.mask is not None
        try:
            kernel = _load(given)
            reason = proof.disagreement(partial(_run, kernel), dtype, masked, device)
        except torch.OutOfMemoryError:
            return None  # says nothing of the kernel
        except Exception as error:  # whatever it is, there is another kernel
            reason = first_line(error)
        if reason is None:
            _proven[key] = kernel
        else:
            _failed = True
            _logger.warning(
                "the scan's backward pass runs on Triton's kernel, since the faster one in CUDA "
                "C++ cannot be used: %s",
                reason,
            )
    return _proven.get(key)


def _load(given: Given) -> driver.Kernel:
    capability = torch.cuda.get_device_capability(given.u.device)
    code = program(given.u.dtype, given.mask is not None, capability)
    return driver.Kernel(code, "scan_backward", given.u.device.index)


def _run(kernel: driver.Kernel, given: Given) -> Result:
    given, result = problem.prepared(given), empty_result(given, problem.BLOCK)
    G, B, _, _ = given.u.shape
    grid = (result.bc.shape[0], B, G)
    kernel(grid, problem.BLOCK, problem.fill(given, result))
    return result
