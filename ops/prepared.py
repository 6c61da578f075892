"""What follows from weights alone, computed once for many evaluations on a CPU.

It is computed again when a weight has changed: in place, by another device or type, or by another
storage. What is written through `.data` PyTorch does not tell; write to the weight itself, under
`torch.no_grad()`.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary


class _Kept(NamedTuple):
    others: list[weakref.ref]  # weights besides the first
    state: list[tuple]
    value: Tensor


_kept = WeakTensorKeyDictionary()  # the first weight -> _Kept


def applies(*weights: Tensor) -> bool:
    """Whether results of these weights may be kept: on a CPU, without gradient, in programs that
    nothing traces or counts.
    """
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or any(weight.device.type != "cpu" for weight in weights)
        or any(weight.is_inference() for weight in weights)  # these have no version
    )


def _follows(make: Callable[[], Tensor], first: Tensor, *others: Tensor) -> Tensor:
    """make(), or what it has given for the same weights."""
    state = [(each._version, each.data_ptr(), each.dtype) for each in (first, *others)]
    kept = _kept.get(first)
    same = kept is not None and kept.state == state
    if not (same and all(ref() is each for ref, each in zip(kept.others, others, strict=True))):
        # No inference tensor: a later call may be without inference mode.
        with torch.inference_mode(False), torch.no_grad():
            kept = _kept[first] = _Kept([weakref.ref(each) for each in others], state, make())
    return kept.value


def decay(A_log: Tensor) -> Tensor:
    """A = -exp(A_log) [E, N] in float32."""
    if not applies(A_log):
        return -torch.exp(A_log.float())
    return _follows(lambda: -torch.exp(A_log.float()), A_log)


def product(second: Tensor, first: Tensor) -> Tensor:
    """second [O, I] first [I, d] -> [O, d] in float32: one linear map in place of two, where
    `applies` says so.
    """
    return _follows(lambda: (second.double() @ first.double()).float(), second, first)
