"""Whether Triton's kernels can run here: asked before any of them is imported."""

import importlib
import os
import re
import shutil
from functools import lru_cache

import torch

OLDEST = (3, 4)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU (`TRITON_INTERPRET=1`, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@lru_cache(maxsize=None)
def refusal(anywhere: bool = False) -> str | None:
    """None, or why Triton's kernels cannot run on this machine, in one line; `anywhere`: why they
    can run on none, whatever its hardware.
    """
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < OLDEST:
        return f"needs Triton {'.'.join(map(str, OLDEST))} or newer, and this is {version}"
    if anywhere or interpreted():
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA GPU (or TRITON_INTERPRET=1, which is for tests only)"
    if _compiler() is None:
        return "Triton needs a C compiler to launch kernels: install gcc or clang, or set CC"
    return None


def _compiler() -> str | None:
    """What Triton builds its launchers with."""
    given = os.environ.get("CC")
    names = [given] if given else ["gcc", "clang"]
    return next(filter(None, map(shutil.which, names)), None)
