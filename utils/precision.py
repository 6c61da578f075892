"""Number types by the names that flags give them, and mixed precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device | str, amp: str) -> AbstractContextManager:
    """The context of a forward pass in "bf16" or "fp16"; nothing changes in it with "off" or
    "fp32".
    """
    if amp in ("off", "fp32"):
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=AMP_DTYPES[amp])
