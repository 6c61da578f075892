"""The convolution of a mask in place, in PyTorch: each token reads itself and its nearest kept
predecessors (successors in the reverse direction), which are looked up in a table.

`reference.kept_conv1d` defines it. Nothing waits for the device, and sums run in a fixed order.

B images, L tokens, E inner channels, W convolution width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.operators import register


class Windows(NamedTuple):
    """Where the kept tokens around each token stand, in scan order."""

    kept: Tensor  # [B, L] bool
    rank: Tensor  # [B, L], kept tokens before each
    # W - 1 of [B, L] each, from the nearest on; L where there is none
    before: tuple[Tensor, ...]  # kept predecessors
    after: tuple[Tensor, ...]  # kept successors

    @classmethod
    def of(cls, mask: Tensor, width: int, reverse: bool) -> "Windows":
        """Windows of a convolution of `width` taps; mask [B, L], kept where it is > 0.5."""
        (images, tokens), reach = mask.shape, width - 1
        kept = mask > 0.5
        counted = kept.cumsum(1)
        rank = counted - kept.long()
        # The kept tokens in token order, `reach` times none before and behind; the last slot is
        # where dropped tokens are written, and is not read.
        slots = torch.arange(tokens, device=mask.device).expand(images, -1)
        order = slots.new_full((images, tokens + 2 * reach + 1), tokens)
        order.scatter_(1, torch.where(kept, rank + reach, tokens + 2 * reach), slots)
        earlier = tuple(order.gather(1, rank + reach - 1 - k) for k in range(reach))
        later = tuple(order.gather(1, counted + reach + k) for k in range(reach))
        if reverse:
            return cls(kept, counted[:, -1:] - counted, later, earlier)
        return cls(kept, rank, earlier, later)


def _flat(index: Tensor, count: int) -> Tensor:
    """index [B, L] into tables of `count` rows -> [B L] into all of them below each other. Copying
    whole rows of such a table is several times faster than gathering single elements.
    """
    first = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * count
    return (index + first).flatten()


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: table [B, T, E], index [B, L] -> [B, L, E]."""
    images, count, channels = table.shape
    rows = table.reshape(images * count, channels).index_select(0, _flat(index, count))
    return rows.view(*index.shape, channels)


def _sums(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Adds up rows [B, L, E] of one index [B, L] -> [B, count, E], in a fixed order."""
    images, _, channels = rows.shape
    sums, flat = rows.new_zeros(images * count, channels), _flat(index, count)
    rows = rows.reshape(len(flat), channels)
    if rows.is_cuda:  # where index_add_ adds in any order, as index_put_ does on a CPU
        sums.index_put_((flat,), rows, accumulate=True)
    else:
        sums.index_add_(0, flat, rows)
    return sums.view(images, count, channels)


def _with_none(rows: Tensor) -> Tensor:
    """A row of zeros behind the last token: what a window holds where there is no kept one."""
    return F.pad(rows, (0, 0, 0, 1))


def convolve(x: Tensor, windows: Windows, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, L, E], weight [E, W], bias [E] -> [B, L, E]."""
    y, table = torch.addcmul(bias, x, weight[:, -1]), _with_none(x)
    for k, index in enumerate(windows.before):
        y.addcmul_(_rows(table, index), weight[:, -2 - k])
    return y


def convolve_backward(
    grad: Tensor, x: Tensor, windows: Windows, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad [B, L, E] -> gradients of x [B, L, E], mask [B, L], weight [E, W] and bias [E]."""
    tokens, width = x.shape[1], weight.shape[1]
    taps = weight.t().flip(0)  # of the token itself, of its nearest kept predecessor, ...
    x_table, grad_table = _with_none(x), _with_none(grad)
    rows = [x, *(_rows(x_table, index) for index in windows.before)]
    grad_weight = torch.stack([(grad * row).sum((0, 1)) for row in reversed(rows)], dim=1)

    # Tokens of one rank read the same predecessors, so that their gradients are added up once.
    sums = _sums(grad, windows.rank, tokens + width)
    grad_x = torch.zeros_like(grad)
    for k in range(1, width):
        grad_x.addcmul_(_rows(sums, windows.rank + k), taps[k])
    grad_x = torch.where(windows.kept.unsqueeze(-1), grad_x, 0).addcmul_(grad, taps[0])

    # With the token, the window of its j-th kept successor holds it at tap j and what stands before
    # it one tap further; without it, all of these stand one tap nearer.
    after = [_rows(grad_table, index) for index in windows.after]
    grad_mask = grad.new_zeros(windows.kept.shape)
    for i in range(width - 1):
        moved = sum(taps[i + j] * after[j - 1] for j in range(1, width - i))
        grad_mask += ((rows[i] - rows[i + 1]) * moved).sum(-1)
    return grad_x, grad_mask, grad_weight, grad.sum((0, 1))


def _forward(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    return convolve(x, Windows.of(mask, weight.shape[1], reverse), weight, bias).contiguous()


def _backward(
    grad: Tensor, x: Tensor, mask: Tensor, weight: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    windows = Windows.of(mask, weight.shape[1], reverse)
    return convolve_backward(grad.contiguous(), x, windows, weight)


def _fake_forward(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad: Tensor, x: Tensor, mask: Tensor, weight: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(mask.shape),
        x.new_empty(weight.shape),
        x.new_empty(weight.shape[0]),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, mask, weight, _, ctx.reverse = inputs
    ctx.save_for_backward(x, mask, weight)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_operator(grad, *ctx.saved_tensors, ctx.reverse), None


_backward_operator = register(
    "window_conv_backward(Tensor grad, Tensor x, Tensor mask, Tensor weight, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
# Of x [B, L, E], mask [B, L], weight [E, W] and bias [E], all of one floating-point type.
window_conv = register(
    "window_conv(Tensor x, Tensor mask, Tensor weight, Tensor bias, bool reverse) -> Tensor",
    _forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_differentiate,
)
