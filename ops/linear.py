"""Matrix products on a CPU; at evaluation no row depends on those beside it.

An image's logits must not depend on its batch, and the libraries do not promise as much: each may
sum the rows at the end of a product in another order, or all of them when they are few. On an AMD
EPYC with AVX2 oneDNN does so at any number of rows and MKL below 4 to 64 rows, the more threads the
more; where the rows are a multiple of what its threads take at a time, and not too many, oneDNN
keeps them apart. So without gradient the first product of each size tries the libraries on numbers
of its own, in the order of their speed, and takes one that gives each row the same bits in all that
was tried, rows filled up to a multiple and products made of parts if need be:

1. oneDNN, which PyTorch's eager mode does not use for float32. On AMD's processors with AVX-512 it
   is 1.05 to 2.2 times as fast as MKL at the sizes of Vim (most on Zen 5), with AVX2 up to
   1.2 times.
2. PyTorch's own: MKL, or what it was built with. On Intel's processors it is 2 to 16 % faster than
   oneDNN, held to AVX2 or not, and comes first.
3. The same in blocks of one size, which needs no promise beyond that equal calls give equal bits
   and that a row's place in its block does not matter; slower.

By the processor's maker and not by a clock: logits must not depend on what else ran when it was
read.

In training, where a row may depend on the others, it is the faster library (`ops.onednn`). Other
types, compiled programs and other devices go PyTorch's way.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from utils import processor

from . import onednn
from .kept import Kept
from .operators import needs_gradient, plain_on_cpu

_FEWEST = 32, 64, 128  # rows that a product may be filled up to
_MULTIPLES = 12, 24  # of rows, what oneDNN's threads take at a time
SPARE_ROWS = max(_MULTIPLES)  # of memory behind those of a product, so that none is copied
_ROWS = 521, 4099  # the fewest and the most of a trial without filling up
_TRIAL = 1 << 32  # multiplications of its largest product, a tenth of a second
# The most rows of a product that is filled up, each a multiple of all of _MULTIPLES. For large
# weights oneDNN uses another algorithm above some number of rows (AVX2, 384 x 768: 840), so more
# rows are multiplied in chunks of fewer.
_MOST_FILLED_UP = 8184, 792, 384, 264
_LINE = 16  # numbers of a line of the cache
_BLOCK = 48  # rows, a multiple of what the libraries' kernels take at a time (4, 6, 8, 12, 16)

# Rows, weight, bias, and memory for the result, which need not be used.
_Product = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> x weight^T + bias [..., out], as
    `torch.nn.functional.linear`.
    """
    if (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None  # a counter of operations, fake tensors
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or x.device.type != "cpu"
        or not x.layout == weight.layout == torch.strided
        or not x.dtype == weight.dtype == torch.float32
        or weight.dim() != 2
        or not weight.numel()
        or not (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype))
        or torch.is_autocast_enabled("cpu")
        or not x.numel()
        or x.shape[-1] != weight.shape[-1]
    ):
        return F.linear(x, weight, bias)
    rows, given = x.reshape(-1, x.shape[-1]), (x, weight, bias)
    if not torch.is_grad_enabled():
        rows = multiply(rows, weight, bias)
    elif needs_gradient(given) and onednn.is_faster() and plain_on_cpu(*given):
        rows = _Trained.apply(rows.contiguous(), weight, bias)
    else:
        return F.linear(x, weight, bias)
    return rows.view(*x.shape[:-1], len(weight))


def multiply(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, memory: Tensor | None = None
) -> Tensor:
    """`linear` of float32 rows [n, in] on a CPU, without gradient.

    The choice does not depend on the number of rows: an image's logits would depend on its batch.

    memory: [n, out], of plain numbers, where the result may be put. Fresh from the system it would
    cost a tenth of the product.
    """
    weight = weight.contiguous()  # as those that were tried
    product, fewest, multiple, most = _choice(
        *weight.shape, bias is not None, torch.get_num_threads(), torch.backends.mkldnn.enabled
    )
    count = len(rows)
    if count > most:
        if memory is None:  # torch.func may be at work
            return torch.cat([multiply(part, weight, bias) for part in rows.split(most)])
        for part, own in zip(rows.split(most), memory.split(most), strict=True):
            multiply_into(own, part, weight, bias)
        return memory
    wanted = max(fewest, count + -count % multiple)
    if wanted > count:
        return product(_filled_up(rows, wanted), weight, bias, None)[:count]
    return product(rows, weight, bias, memory)


def multiply_into(memory: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """`multiply` whose result is put into memory [n, out]."""
    result = multiply(rows, weight, bias, memory)
    if result.data_ptr() != memory.data_ptr():
        memory.copy_(result)


def _filled_up(rows: Tensor, count: int) -> Tensor:
    """So many rows, the first of them `rows`; what lies behind them in memory is taken for the
    others where there is enough.
    """
    if plain_on_cpu(rows) and rows.is_contiguous():
        size = (count, rows.shape[1])
        end = rows.storage_offset() + math.prod(size)
        if end * rows.element_size() <= rows.untyped_storage().nbytes():
            return rows.as_strided(size, (size[1], 1))
    return F.pad(rows, (0, 0, 0, count - len(rows)))


class _Trained(torch.autograd.Function):
    """`torch.nn.functional.linear` of rows by oneDNN, in training; differentiable any number of
    times.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_rows, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if of_weight else None, weight if of_rows else None)
        return onednn.product(rows, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            onednn.multiply(grad, weight) if of_rows else None,
            onednn.weight_gradient(grad, rows) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


class Linear(nn.Linear):
    """`torch.nn.Linear` by way of `linear`; at evaluation autocast's copies of the weights are
    kept.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._kept = Kept()

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        bias = None if self.bias is None else self._cast("bias", device)
        return linear(input, self._cast("weight", device), bias)

    def _cast(self, name: str, device: str) -> Tensor:
        """A weight in the type that autocast would give it."""
        weight = getattr(self, name)
        if not torch.is_autocast_enabled(device) or weight.dtype != torch.float32:
            return weight
        dtype = torch.get_autocast_dtype(device)
        return self._kept.get(f"{name} {dtype}", (weight,), lambda: weight.to(dtype))

    def train(self, mode: bool = True) -> "Linear":
        self._kept.clear()
        return super().train(mode)


class _Way(NamedTuple):
    product: _Product
    fewest: int = 1  # rows that it may be given
    multiple: int = 1  # of what their number is one
    most: float = math.inf  # rows; oneDNN may use another algorithm for more


# Weight and bias of one size -> the way, where all that was tried gives each row the same bits.
_Trial = Callable[[Tensor, Tensor | None], _Way | None]


@lru_cache(maxsize=None)
def _choice(outputs: int, inputs: int, bias: bool, threads: int, enabled: bool) -> _Way:
    """The first way in the order of speed that passes its trial, for weights of this size.

    threads: of PyTorch; they share the rows out, so that another number asks again. enabled:
    oneDNN.
    """
    weight = _numbers(outputs, inputs)
    shift = _numbers(outputs) if bias else None
    trials = [_of_any_number(_pytorch)]
    if enabled and onednn.works():
        of_onednn = [_of_any_number(_onednn)]
        of_onednn += [
            _filled_up_to(_onednn, multiple, most)
            for most in _MOST_FILLED_UP
            for multiple in _MULTIPLES
        ]
        if processor.vendor() == "GenuineIntel":
            trials = trials + of_onednn
        else:
            trials = of_onednn + trials
    ways = (trial(weight, shift) for trial in trials)
    return next((way for way in ways if way is not None), _Way(_blocks))


def _numbers(*shape: int) -> Tensor:
    """Some float32 numbers, without touching the state of the random ones."""
    count = math.prod(shape)
    return torch.arange(count, dtype=torch.float32, device="cpu").sin().view(shape)


def _of_any_number(product: _Product) -> _Trial:
    """Products of as many rows as there are, filled up only where they are few."""

    def trial(weight: Tensor, bias: Tensor | None) -> _Way | None:
        rows = min(max(_ROWS), max(min(_ROWS), _TRIAL // weight.numel()))
        same = _comparison(product, rows, weight, bias)
        parts = (0, 129), (0, 257), (0, 500), (7, 131), (7, 197), (7, 394), (5, rows // 2)
        if not all(same(*part) for part in parts):
            return None
        for fewest in _FEWEST:
            if all(same(3, fewest + more) for more in (0, 1, 2, 3, 5, 7, 10, 17, 18, 19, 26, 31)):
                return _Way(product, fewest)
        return None

    return trial


def _filled_up_to(product: _Product, multiple: int, most: int) -> _Trial:
    """Products of a multiple of rows. Many are tried: the threads' shares of some are none."""

    def trial(weight: Tensor, bias: Tensor | None) -> _Way | None:
        same = _comparison(product, most, weight, bias)
        times = most // multiple
        near = range(1, min(70, times) + 1)
        far = (first + more for first in range(71, times - 3, 80) for more in range(4))
        parts = [(0, multiple * n) for n in (*near, *far)]
        parts += [(7, multiple * n) for n in (1, 2, 7, times // 2, times - 1)]
        if not all(same(*part) for part in parts):
            return None
        return _Way(product, multiple, multiple, most)

    return trial


def _comparison(
    product: _Product, rows: int, weight: Tensor, bias: Tensor | None
) -> Callable[[int, int], bool]:
    """(begin, count) -> whether these rows by themselves have the bits that they have among all.

    They are copied: where rows are no whole lines of the cache MKL's bits depend on where in one
    they begin.
    """
    x = _numbers(rows, weight.shape[1])
    whole = product(x, weight, bias, None)

    def same(begin: int, count: int) -> bool:
        part = slice(begin, begin + count)
        return torch.equal(product(x[part].clone(), weight, bias, None), whole[part])

    return same


def _pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=memory)
    return torch.addmm(bias, x, weight.t(), out=memory)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor | None = None) -> Tensor:
    return onednn.product(x, weight, bias)


def _blocks(x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor | None = None) -> Tensor:
    """Blocks of one size, two at least: a single one would be shared out to the threads. Rows are
    filled up to whole lines of the cache, so that all begin alike.
    """
    rows, outputs = len(x), len(weight)
    blocks, more = max(2, -(-rows // _BLOCK)), -x.shape[1] % _LINE
    x = F.pad(x, (0, more, 0, blocks * _BLOCK - rows)).view(blocks, _BLOCK, -1)
    weight = F.pad(weight, (0, more, 0, -outputs % _LINE))
    out = torch.bmm(x, weight.t().expand(blocks, -1, -1)).flatten(0, 1)[:rows, :outputs]
    return out.contiguous() if bias is None else out + bias
