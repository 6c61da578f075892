"""Whether Triton's kernels can run here: asked before any of them is imported.

Triton compiles a small C file for every kernel that it launches (triton/runtime/build.py of 3.6).
"""

import importlib
import logging
import os
import re
import shutil
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import first_line

from . import cache

OLDEST = (3, 4)
OLDEST_GPU = (7, 0)  # of compute capability

_logger = logging.getLogger(__name__)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU (`TRITON_INTERPRET=1`, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def launching_on(tensor: Tensor):
    """A context for launches: Triton takes the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


@lru_cache(maxsize=None)
def refusal(anywhere: bool = False) -> str | None:
    """None, or why Triton's kernels cannot run on this machine, in one line; `anywhere`: why they
    can run on none, whatever its hardware.
    """
    try:
        triton = importlib.import_module("triton")
        version = triton.__version__
    except Exception as error:  # a broken installation comes up with anything
        return f"Triton cannot be imported ({first_line(error)})"
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < OLDEST:
        return f"needs Triton {'.'.join(map(str, OLDEST))} or newer, and this is {version}"
    if anywhere or interpreted():
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA GPU (or TRITON_INTERPRET=1, which is for tests only)"
    capability = torch.cuda.get_device_capability()
    if not torch.version.hip and capability < OLDEST_GPU:
        needed, found = (".".join(map(str, numbers)) for numbers in (OLDEST_GPU, capability))
        return f"needs a GPU of compute capability {needed} or newer, and this one has {found}"
    if triton.knobs.build.impl is None:  # no builder of the user's own
        reason = _no_compiler() or _no_header()
        if reason is not None:
            return reason
    return _no_cache(Path(triton.knobs.cache.dir))


def _no_cache(own: Path) -> str | None:
    """Why Triton cannot keep what it compiles: in its own folder at home, or where that is full or
    read-only in that of the other kernels.
    """
    try:
        own.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=own).close()
        return None
    except OSError as error:
        refused = error
    try:
        other = cache.folder() / "triton"
    except OSError as error:
        return f"Triton needs a folder that can be written (TRITON_CACHE_DIR): {first_line(error)}"
    os.environ["TRITON_CACHE_DIR"] = str(other)
    _logger.warning("Triton keeps its kernels in %s, since %s", other, first_line(refused))
    return None


def _no_compiler() -> str | None:
    """Why there is no compiler: Triton runs what CC names, if it is set at all, as one program
    without arguments, else gcc or clang.
    """
    given = os.environ.get("CC")
    if given is not None and shutil.which(given) is None:
        return (
            f"Triton compiles with CC={given}, which is not a program; name one, without "
            "arguments, or unset CC"
        )
    if given is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to launch kernels: install gcc or clang, or set CC"
    return None


def _no_header() -> str | None:
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # as Triton does for Debian's
    own = sysconfig.get_paths(scheme=scheme)["include"]
    others = (os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH"))
    folders = [own, *":".join(others).split(":")]
    if any(os.path.isfile(os.path.join(folder, "Python.h")) for folder in folders if folder):
        return None
    return (
        f"Triton needs Python's headers to launch kernels, and {own} has no Python.h: install them "
        "(python3-dev on Debian and Ubuntu)"
    )
