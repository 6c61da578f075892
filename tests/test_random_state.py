"""Random generators: captured, saved, restored."""

import random

import numpy as np
import torch

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.distributed import Distributed
from utils.random_state import capture_random_state, gather_random_states, restore_random_state


def draw():
    return random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.randn(3).tolist()


def test_every_generator_continues_where_it_was(tmp_path):
    random.gauss(0, 1), np.random.randn()  # both keep the second number of a pair for the next call
    states = gather_random_states(Distributed(torch.device("cpu")))
    save_checkpoint({"model": {}, "random": states}, tmp_path / "a.pth")
    first = draw()
    assert draw() != first
    restore_random_state(load_checkpoint(tmp_path / "a.pth")["random"][0])
    assert draw() == first


def test_capturing_draws_nothing():
    state = capture_random_state()
    first = draw()
    restore_random_state(state)
    capture_random_state()
    assert draw() == first
