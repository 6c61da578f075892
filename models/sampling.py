"""Gumbel noise and straight-through gates: the only place that draws random numbers for a decision.

Source: Jang et al., "Categorical Reparameterization with Gumbel-Softmax" (arXiv 1611.01144).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

_recorded: Mapping[str, Tensor] | None = None


@contextmanager
def replay(noise: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context, noise is read from `noise` by name instead of being drawn.

    Names: `token.stage{s}` [B, M, 2], `router.layer{i}.gumbels1` and `.gumbels2` [B, 2].
    """
    global _recorded
    previous, _recorded = _recorded, noise
    try:
        yield
    finally:
        _recorded = previous


def gumbel_like(x: Tensor, name: str) -> Tensor:
    """Standard Gumbel noise in float32 with the shape of x.

    Within `replay`, the recorded noise of that name (KeyError if absent).
    """
    if _recorded is not None:
        return _recorded[name].to(x.device, torch.float32).reshape(x.shape)
    # The float32 exponential can return 0, whose logarithm is infinite.
    draws = torch.empty(x.shape, device=x.device, dtype=torch.float32).exponential_()
    return -draws.clamp_min(torch.finfo(torch.float32).tiny).log()


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The exact value of `hard` with the gradient of `soft`."""
    return hard + (soft - soft.detach())


def _scaled(noise: Tensor, factor: Tensor | None) -> Tensor:
    return noise if factor is None else noise * factor


def keep_decision(log_probs: Tensor, name: str, factor: Tensor | None = None) -> Tensor:
    """Hard Gumbel-softmax at temperature 1: log-probabilities (keep, drop) [B, M, 2] -> [B, M].

    The result is 1 (keep) or 0. factor: of the noise, a scalar; None for 1.
    """
    noisy = log_probs.float() + _scaled(gumbel_like(log_probs, name), factor)
    hard = (noisy[..., 0] >= noisy[..., 1]).float()
    return straight_through(hard, noisy.softmax(dim=-1)[..., 0])


def binary_gate(logits: Tensor, name: str, factor: Tensor | None = None) -> Tensor:
    """Gumbel-sigmoid at temperature 2, hard at 0.5: logits -> gates 0 or 1 of the same shape.

    factor: of the noise, a scalar; None for 1.
    """
    noise = gumbel_like(logits, f"{name}.gumbels1") - gumbel_like(logits, f"{name}.gumbels2")
    soft = torch.sigmoid((logits.float() + _scaled(noise, factor)) / 2)
    return straight_through((soft > 0.5).float(), soft)


def image_noise(images: Tensor, count: int, stage: int, fresh: bool) -> Tensor:
    """Uniform numbers [B, count] for the random pruning baseline.

    `fresh`: newly drawn (training). Otherwise a hash of each image's own pixels and the stage, so
    that an image gets the same numbers in any batch and on any machine.
    """
    if fresh:
        return torch.rand(images.shape[0], count, device=images.device)
    pixels = (images.float() * 255).round().to(torch.int64).flatten(1)
    weights = torch.arange(1, pixels.shape[1] + 1, device=images.device)
    key = (pixels * weights).sum(dim=1, keepdim=True) + 7919 * (stage + 1)
    # SplitMix64: full avalanche, so that neighbouring keys and slots give unrelated numbers.
    x = key * 2654435761 + torch.arange(count, device=images.device) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return ((x >> 11) & ((1 << 53) - 1)).double() / (1 << 53)
