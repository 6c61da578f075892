"""oneDNN's products of float32 matrices on a CPU, which PyTorch's eager mode does not use.

PyTorch asks MKL, which leaves out AVX-512 on AMD's processors: on an EPYC (Zen 5, 2 cores) oneDNN
is 1.3 to 2.3 times as fast at the sizes of a training step of Vim, held to AVX2 up to 1.2 times. On
Intel's processors MKL is the faster one.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import processor

from .operators import plain_on_cpu


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [n, in], weight [out, in], of any strides that do not overlap, bias [out] -> [n, out],
    without gradient.
    """
    if bias is not None:
        bias = bias.contiguous()  # it is read without a look at its strides
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@lru_cache(maxsize=None)
def works() -> bool:
    """Whether the product is there and right. It is no documented part of PyTorch: a release may
    move it.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    numbers = torch.arange(60, dtype=torch.float32, device="cpu").sin()
    given = numbers.view(20, 3).t(), numbers.repeat(3)[:140].view(7, 20), numbers[:7]
    try:
        with torch.no_grad():
            return torch.allclose(product(*given), F.linear(*given), rtol=1e-4, atol=1e-4)
    except (AttributeError, RuntimeError, TypeError):
        return False


def is_faster() -> bool:
    """Whether oneDNN is the library to ask in training, where a row may depend on the others."""
    return processor.vendor() == "AuthenticAMD" and torch.backends.mkldnn.enabled and works()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k], b [k, m] -> a b [n, m], float32 on a CPU, of any strides, by the faster library."""
    if not takes(a, b):
        return a @ b
    return product(a, b.t())


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Of a product x [n, in] weight^T whose gradient is grad [n, out]: [out, in], contiguous."""
    if not takes(grad, x):
        return grad.t() @ x
    if grad.shape[1] > x.shape[1]:  # faster with few rows
        # Not contiguous(), which leaves odd strides where a size is 1.
        return product(x.t(), grad.t()).t().clone(memory_format=torch.contiguous_format)
    return product(grad.t(), x.t())


def takes(*given: Tensor) -> bool:
    """Whether products of these are oneDNN's here and now."""
    return (
        not torch.is_grad_enabled()
        and is_faster()
        and plain_on_cpu(*given)
        and all(each.layout == torch.strided and each.numel() > 0 for each in given)
    )
