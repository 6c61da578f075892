"""Mixed precision, as selected by `--amp`."""

from contextlib import nullcontext

import torch

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str):
    """The context of a forward pass under `--amp`."""
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp]) if amp != "off" else nullcontext()
