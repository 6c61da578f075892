"""Number types by the names that flags give them, and mixed precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

from .errors import UsageError, UserError

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device | str, amp: str) -> AbstractContextManager:
    """The context of a forward pass in "bf16" or "fp16"; nothing changes in it with "off" or
    "fp32".

    Raises UserError for bf16 on a GPU that has none.
    """
    if amp in ("off", "fp32"):
        return nullcontext()
    device = torch.device(device)
    if amp == "bf16" and (reason := bf16_refusal(device)) is not None:
        raise UserError(reason)
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp])


def check_amp(device: torch.device, amp: str) -> None:
    """Raise UsageError for `--amp fp16` on a CPU, for every program that has the flag."""
    if amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or off")


def bf16_refusal(device: torch.device) -> str | None:
    """None, or why bf16 is no use on a device: NVIDIA's before Ampere have no instructions for it,
    and what PyTorch emulates is slower than float32.
    """
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    name = torch.cuda.get_device_name(device)
    return (
        f"bf16 needs a GPU of compute capability 8.0 or newer, and {name} has "
        f"{capability[0]}.{capability[1]}; use fp16 there"
    )
