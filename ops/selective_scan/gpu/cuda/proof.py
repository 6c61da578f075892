"""A kernel proves itself on a small problem before it is used."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.common import CHUNK
from ..scan_gradient import Given, Result, run_triton

# Both kernels compute in float32 from the same numbers, in another order.
_FLOAT32_TOLERANCE = 1e-5


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference allowed between two results, relative, by norm.

    Of a 16-bit type: a result is rounded by half an epsilon, and for its sums over channels Triton
    cuts the terms to 11 bits, which is an epsilon of float16.
    """
    return max(2 * torch.finfo(dtype).eps, _FLOAT32_TOLERANCE)


def small_problem(dtype: torch.dtype, masked: bool, device: torch.device) -> Given:
    """Two chunks of steps, two blocks of channels, both directions, gates, lengths and a direction
    that is off.
    """
    B, L, E, N, R = 3, CHUNK + 8, 40, 16, 3
    generator = torch.Generator().manual_seed(0)  # leaves the random numbers of the run alone

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return Given(
        draw(B, L, E, dtype=dtype),
        draw(2, B, L, E, dtype=dtype),
        draw(2, B, L, E, dtype=dtype),
        draw(2, B, L, R + 2 * N, dtype=dtype)[..., R:],
        draw(B, L).gt(0).float() if masked else None,
        torch.tensor([L, CHUNK + 1, 7]).to(device),
        torch.tensor([[True, True], [True, True], [True, False]]).to(device),
        draw(B, 2),
        -torch.exp(draw(2, N, E)),
        draw(2, E),
        draw(2, E) - 2,
        draw(2, B, 1, N, E),
        False,
    )


def disagreement(
    run: Callable[[Given], Result], dtype: torch.dtype, masked: bool, device: torch.device
) -> str | None:
    """None, or by how much the kernel's results differ from Triton's. Waits for the device."""
    given = small_problem(dtype, masked, device)
    for name, value, wanted in zip(Result._fields, run(given), run_triton(given), strict=True):
        if wanted is None:
            continue
        value, wanted = _summed(name, value), _summed(name, wanted)
        error = ((value - wanted).norm() / wanted.norm()).item()
        if not error <= tolerance(dtype):
            return (
                f"its gradient of {name} differs from Triton's by {error:.1e}, "
                f"which may be {tolerance(dtype):.1e}"
            )
    return None


def _summed(name: str, tensor: Tensor) -> Tensor:
    """Kernels divide the channels into blocks of their own."""
    tensor = tensor.double()
    if name in ("bc", "mask"):
        return tensor.sum(0)
    return tensor.sum(-1) if name == "gate" else tensor
