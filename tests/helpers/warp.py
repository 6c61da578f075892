"""Runs scan_backward.cu on the CPU: compiled as C++, a warp's threads as fibres (warp.cpp)."""

import ctypes
import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

from ops.selective_scan.gpu import cuda
from ops.selective_scan.gpu.cuda import problem

# Pointers to the kernel's 16-bit types are read as words.
_FLAGS = ("-std=c++17", "-O2", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-shared", "-fPIC")


class Emulator:
    """A kernel, called as `driver.Kernel` is."""

    def __init__(self, options: tuple[str, ...], folder: Path):
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if compiler is None:
            pytest.skip("no C++ compiler")
        path = folder / f"{'-'.join(options)}.so"
        host = Path(__file__).with_name("warp.cpp")
        source = f'-DSOURCE="{cuda._SOURCE}"'
        command = [compiler, *_FLAGS, *options, source, str(host), "-o", str(path)]
        subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(path))
        assert self._library.problem_bytes() == ctypes.sizeof(problem.Problem)

    def __call__(self, grid, threads, argument) -> None:
        assert threads == 32
        assert self._library.run_kernel(ctypes.byref(argument), *grid) == 0, "the lanes parted"


def emulators(folder: Path):
    """A function that gives the kernel for some arguments, each compiled once."""
    made = lru_cache(maxsize=None)(lambda options: Emulator(options, folder))
    return lambda given: made(problem.options(given.u.dtype, given.mask is not None))
