"""Peak memory of one call."""

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes that a call needs at its peak, beyond what is held before it.

    On a GPU: what PyTorch allocates. On a CPU: resident pages of the whole process, so also what
    libraries reserve for themselves, precise to a MiB or so since Linux counts pages in batches.
    Memory that the allocator has kept from earlier calls is released first, or it would hide the
    peak. None if the system does not report it (it takes Linux and the right to write to
    /proc/self/clear_refs).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    _give_back_freed_memory()
    try:
        (_PROCESS / "clear_refs").write_text("5")  # the peak is now what is resident now
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _give_back_freed_memory() -> None:
    # Only glibc has malloc_trim; Windows has no CDLL(None).
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """Bytes, of a field of /proc/self/status such as `VmHWM:    1024 kB`."""
    lines = (_PROCESS / "status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def mebibytes(size: int | None) -> str:
    """For a table; `-` for an unknown size."""
    return "-" if size is None else f"{size / 2**20:.0f}"
