"""Compiles CUDA C++ on the machine that runs it, by NVRTC, which PyTorch's CUDA packages bring.

What was compiled is kept in the user's cache.
"""

import ctypes
import glob
import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from ops import cache

_DIGEST = hashlib.sha256().digest_size


class CompileError(RuntimeError):
    """NVRTC is missing or refuses; the message is one line."""


def _candidates() -> list[str]:
    """Names of the library, PyTorch's own first: the driver knows the programs of its version."""
    major = (torch.version.cuda or "").split(".")[0]
    soname = f"libnvrtc.so.{major}"
    root = Path(torch.__file__).parent
    # A wheel has the library beside it in a package of its own, or renamed in its own folder.
    patterns = (root.parent / "nvidia/*/lib" / soname, root / "lib/libnvrtc-*.so*")
    bundled = [path for pattern in patterns for path in sorted(glob.glob(str(pattern)))]
    bundled = [path for path in bundled if "builtins" not in path]
    return [*bundled, soname, "libnvrtc.so"] if major else []


class Nvrtc:
    """The library. Raises CompileError where there is none."""

    def __init__(self):
        for name in _candidates():
            try:
                self._library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise CompileError("NVRTC (libnvrtc) is not installed beside PyTorch")
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def _call(self, name: str, *arguments) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            reason = self._library.nvrtcGetErrorString(code).decode()
            raise CompileError(f"{name} failed: {reason}")

    def architectures(self) -> list[int]:
        """What it compiles for, in order; 90 is sm_90."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return sorted(numbers)

    def compile(self, source: str, architecture: str, options: tuple[str, ...]) -> bytes:
        """A program for a real architecture (sm_90), or PTX for a virtual one (compute_90)."""
        words = [f"--gpu-architecture={architecture}", *options]
        words = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
        program = ctypes.c_void_p()
        text = ctypes.c_char_p(source.encode())
        self._call("nvrtcCreateProgram", ctypes.byref(program), text, None, 0, None, None)
        try:
            try:
                self._call("nvrtcCompileProgram", program, len(words), words)
            except CompileError as error:
                log = self._read(program, "ProgramLog").decode(errors="replace")
                lines = [line.strip("\0 ") for line in log.splitlines() if "error" in line]
                raise CompileError(f"NVRTC {self.version}: {(*lines, error)[0]}") from error
            return self._read(program, "CUBIN" if architecture.startswith("sm_") else "PTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw


@lru_cache(maxsize=1)
def _nvrtc() -> Nvrtc:
    return Nvrtc()


def architecture(capability: tuple[int, int], known: list[int]) -> str:
    """What to compile for: the device itself, or for one that NVRTC does not know the newest before
    it that it does, as PTX, which the driver compiles on.

    Raises CompileError for a device older than all.
    """
    number = 10 * capability[0] + capability[1]
    if number in known:
        return f"sm_{number}"
    older = [other for other in known if other < number]
    if not older:
        raise CompileError(f"this NVRTC compiles for sm_{known[0]} and newer, not for sm_{number}")
    return f"compute_{older[-1]}"


def compiled(source: str, capability: tuple[int, int], options: tuple[str, ...]) -> bytes:
    """The program for a device of this compute capability, from the cache if it is there.

    Raises CompileError.
    """
    nvrtc = _nvrtc()
    target = architecture(capability, nvrtc.architectures())
    key = hashlib.sha256("\n".join((source, target, *options, nvrtc.version)).encode())
    name = f"cuda-{key.hexdigest()[:24]}"
    program = _cached(name)
    if program is None:
        program = nvrtc.compile(source, target, options)
        _keep(name, program)
    return program


def _cached(name: str) -> bytes | None:
    """What was kept, if it is whole: the driver would read past the end of half a program."""
    try:
        content = (cache.folder() / name).read_bytes()
    except OSError:
        return None
    program, digest = content[:-_DIGEST], content[-_DIGEST:]
    return program if hashlib.sha256(program).digest() == digest else None


def _keep(name: str, program: bytes) -> None:
    """Whoever compiles the same at once writes the same; a cache that is full keeps nothing."""
    try:
        folder = cache.folder()
        handle, unfinished = tempfile.mkstemp(dir=folder, prefix=name, suffix=".tmp")
    except OSError:
        return
    try:
        with open(handle, "wb") as file:
            file.write(program + hashlib.sha256(program).digest())
        os.replace(unfinished, folder / name)
    except OSError:
        Path(unfinished).unlink(missing_ok=True)
