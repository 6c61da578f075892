"""What follows from weights alone, computed once for many evaluations on a CPU.

It is computed again when a weight has changed: in place, by another device or type, or by another
storage. What is written through `.data` PyTorch does not tell; write to the weight itself, under
`torch.no_grad()`.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary


class _Kept(NamedTuple):
    others: list[weakref.ref]  # weights besides the first
    state: list[tuple]
    value: Any


_kept = WeakTensorKeyDictionary()  # the first weight -> {name: _Kept}


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


def follow(name: str, make: Callable[[], Any], *weights: Tensor) -> Any:
    """make(), or what it has given under this name for the same weights; where `applies`.

    A view stands for its whole tensor, since it may be made anew for each call.
    """
    state = [(each._version, each.data_ptr(), each.dtype, each.numel()) for each in weights]
    first, *others = (each if each._base is None else each._base for each in weights)
    held = _kept.setdefault(first, {})
    kept = held.get(name)
    same = kept is not None and kept.state == state
    if not (same and all(ref() is each for ref, each in zip(kept.others, others, strict=True))):
        # No inference tensor: a later call may be without inference mode.
        with torch.inference_mode(False), torch.no_grad():
            kept = held[name] = _Kept([weakref.ref(each) for each in others], state, make())
    return kept.value


def decay(A_log: Tensor) -> Tensor:
    """A = -exp(A_log) [E, N] in float32."""
    if not applies(A_log):
        return -torch.exp(A_log.float())
    return follow("decay", lambda: -torch.exp(A_log.float()), A_log)


def product(second: Tensor, first: Tensor) -> Tensor:
    """second [O, I] first [I, d] -> [O, d] in float32: one linear map in place of two, where
    `applies` says so.
    """
    return follow("product", lambda: (second.double() @ first.double()).float(), second, first)
