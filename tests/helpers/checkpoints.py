"""What tests save."""

import argparse
from collections import OrderedDict

import torch


def small_state(step: int = 0) -> dict:
    return {
        "model": OrderedDict(weight=torch.full((40, 50), float(step)), bias=torch.arange(7)),
        "step": step,
        "best": {"top1": 98.5, "history": [1.0, None, (True, b"\x00\xff", 2**40)]},
        "args": argparse.Namespace(lr=1e-3, model="vim_micro", pruning_layers=(2, 4)),
    }
