"""Seeds derived from several numbers, and generators that start from them."""

import random
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import get_worker_info


@contextmanager
def random_state(seed: int):
    """Seed Python's, numpy's and torch's CPU generators inside; restore them afterwards.

    In a worker process, where nothing else draws, they are not restored: that costs 0.1 ms per
    image.
    """
    shared = get_worker_info() is None
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if shared else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU too
    try:
        yield
    finally:
        if shared:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers, such as (seed, epoch, position)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(*numbers: int) -> None:
    """Seed Python's, numpy's and torch's generators, including the GPU's, from several numbers."""
    seed = derive_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
