"""Parameters of one scan direction for the tests of the selective scan."""

import torch

from ops.selective_scan import BranchParams


def params_of(channels, states, rank, seed=0, width=4):
    """In float64; E channels, N states, R step rank, a convolution of `width` taps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return BranchParams(
        normal(channels, width) * 0.4,
        normal(channels) * 0.1,
        normal(rank + 2 * states, channels) * channels**-0.5,
        normal(channels, rank) * rank**-0.5,
        normal(channels) - 2,
        -torch.exp(normal(channels, states)),
        normal(channels),
    )
