"""What follows from weights alone, kept from one evaluation to the next."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

_kept = WeakTensorKeyDictionary()  # weight -> (its state, what follows from it)


def decay(A_log: Tensor) -> Tensor:
    """A = -exp(A_log) [E, N] in float32.

    On a CPU and without gradient it is computed once, and again when the weight has changed: in
    place, by another device or type, or by another storage. What is written through `.data` PyTorch
    does not tell; write to the weight itself, under `torch.no_grad()`.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or A_log.device.type != "cpu"
        or A_log.is_inference()  # has no version
        or _get_current_dispatch_mode() is not None
    ):
        return -torch.exp(A_log.float())
    state = A_log._version, A_log.data_ptr(), A_log.dtype
    before, value = _kept.get(A_log, (None, None))
    if before != state:
        # No inference tensor: a later call may be without inference mode.
        with torch.inference_mode(False), torch.no_grad():
            value = -torch.exp(A_log.float())
        _kept[A_log] = state, value
    return value
