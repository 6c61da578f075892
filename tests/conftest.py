"""Set before PyTorch is imported: threads that wait for each other sleep.

The tests' tensors are tiny. On a shared machine, threads that spin while they wait take the
processor from those that they wait for, and everything becomes ten times slower.
"""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture
def two_threads():
    """PyTorch computes with two threads, as it would by itself on two cores; scripts/test.sh gives
    each of its processes one.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
