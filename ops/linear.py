"""Matrix products without gradient on a CPU: oneDNN's, where PyTorch's eager mode would call MKL.

PyTorch ships oneDNN and uses it for float32 convolutions, and for float32 matrix products only in
compiled programs. Side by side on an AMD EPYC with AVX-512, at the sizes of Vim, it is 5 to 30 %
faster than MKL. Products that autograd has to see, other types and other devices go PyTorch's way.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> x weight^T + bias [..., out], as
    `torch.nn.functional.linear`.
    """
    # The choice must not depend on the number of rows: an image's logits would depend on its batch.
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.numel()
        and x.shape[-1] == weight.shape[-1]
        and torch.backends.mkldnn.enabled
        and _onednn()
    ):
        return _product(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` by way of `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@lru_cache(maxsize=None)
def _onednn() -> bool:
    """Whether oneDNN's product is there and right. It is no documented part of PyTorch: a release
    may move it.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = (
        torch.arange(math.prod(shape)).sin().view(shape) for shape in ((3, 5, 20), (7, 20), (7,))
    )
    try:
        return torch.allclose(
            _product(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
