"""The state of every random generator of a process, as plain values and tensors that a checkpoint may hold."""

import random
from typing import Any, Optional

import numpy as np
import torch

from .distributed import Distributed


def capture_random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and PyTorch's global generators (CPU, and this process's GPU if one is in use)."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every generator back to where `capture_random_state` found it.

    A GPU state that was never captured (the run was on a CPU then) leaves the GPU's generator alone, and the reverse.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def gather_random_states(distributed: Distributed) -> Optional[list[dict[str, Any]]]:
    """The states of all ranks, by rank, on rank 0 for the checkpoint; None elsewhere. Every rank must call it."""
    return distributed.gather_objects(capture_random_state())
