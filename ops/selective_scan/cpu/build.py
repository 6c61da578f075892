"""Builds the C++ kernels on the machine that runs them, once, into a user cache.

With g++, or with clang, which is what g++ is on macOS (written for, and never run there).
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import logging
import os
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from ops import cache

FOLDER = Path(__file__).parent
_KERNELS = "kernel.cpp"
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# All instructions of this processor: the first of these that the compiler knows. Clang for ARM
# knows the second alone, and older ones neither.
_MACHINE = (("-march=native",), ("-mcpu=native",), ())
_COMPILERS = ("g++", "c++", "clang++")

_logger = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded here; the message is one line."""


def _compiler() -> list[str]:
    """The command, which may have several words (`CXX="ccache g++"`)."""
    given = os.environ.get("CXX", "")
    try:
        command = shlex.split(given)
    except ValueError as error:
        raise BuildError(f"cannot read CXX={given}: {error}") from error
    names = command[:1] or _COMPILERS
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        raise BuildError(
            f"no C++ compiler: {' or '.join(names)} is not on PATH; install one, or name it by CXX"
        )
    return [path, *command[1:]]


def _run(command: list[str]) -> str:
    """Standard error of the command."""
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        lines = (
            [line for line in result.stderr.splitlines() if "error" in line]
            or result.stderr.splitlines()
            or ["it said nothing"]
        )
        raise BuildError(
            f"'{command[0]}' failed with exit code {result.returncode}: {lines[0].strip()}"
        )
    return result.stderr


def _openmp() -> tuple[str, ...]:
    """The flags for several threads, on the OpenMP runtime that PyTorch has loaded."""
    if sys.platform != "darwin":
        return ("-fopenmp",)
    # Apple's clang reads the pragmas and brings no runtime; PyTorch's packages do.
    folder = os.path.join(*importlib.util.find_spec("torch").submodule_search_locations, "lib")
    runtime = os.path.join(folder, "libomp.dylib")
    return ("-Xpreprocessor", "-fopenmp", runtime, f"-Wl,-rpath,{folder}")


def _described(compiler: list[str], flags: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The flags with those for this CPU, and what the compiler says of itself and of both (-v)."""
    refused = None
    for machine in _MACHINE:
        command = [*compiler, *machine, *flags, "-E", "-v", "-x", "c++", os.devnull]
        try:
            description = _run([*command, "-o", os.devnull])
        except BuildError as error:
            refused = refused or error
            continue
        if not machine:
            _logger.warning(
                "the CPU kernels have the basic instructions alone, since the compiler does not "
                "know this processor: %s",
                refused,
            )
        return (*machine, *flags), description
    raise refused


def _has_openmp(compiler: list[str], folder: Path) -> bool:
    """Whether the compiler builds for several threads."""
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".so") as file:
        try:
            nothing = ["-shared", "-fPIC", "-x", "c++", os.devnull, "-x", "none"]
            _run([*compiler, *nothing, *_openmp(), "-o", file.name])
        except BuildError:
            return False
    return True


def _key(flags: tuple[str, ...], description: str) -> str:
    """Names the result: sources, flags, compiler and CPU."""
    digest = hashlib.sha256(" ".join(flags).encode())
    digest.update(description.encode())
    for source in sorted((*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def library_path(extra_flags: tuple[str, ...] = (), source: str = _KERNELS) -> Path:
    """Path of the library built from a source of this folder, building it if this machine has not.

    Processes that come here at once wait for the first of them; the file appears under its name
    only when complete.

    Raises:
        BuildError: no compiler, a failing one, or no folder to write to.
    """
    try:
        return _built(_compiler(), source, _FLAGS + extra_flags)
    except (
        OSError
    ) as error:  # a compiler that is no program, a full disk, a file system without locks
        raise BuildError(f"cannot build: {error}") from error


def _built(compiler: list[str], source: str, flags: tuple[str, ...]) -> Path:
    flags, description = _described(compiler, flags)
    folder = cache.folder()

    def named(flags: tuple[str, ...]) -> Path:
        return folder / f"{Path(source).stem}-{_key(flags, description)}.so"

    serial, flags = flags, (*flags, *_openmp())
    path = named(flags)
    if _is_whole(path):
        return path
    if not _has_openmp(compiler, folder):  # asked again each time: it may be installed by then
        flags, path = serial, named(serial)
        if _is_whole(path):
            return path
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(path):
            if path.exists():
                _logger.warning("%s is cut off and is built anew", path)
            else:
                _logger.info("building the CPU kernels into %s", path)
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            try:
                _run([*compiler, str(FOLDER / source), *flags, "-o", str(unfinished)])
                if not unfinished.exists():
                    raise BuildError(f"'{compiler[0]}' wrote no library; is it a C++ compiler?")
                with open(unfinished, "rb") as file:
                    os.fsync(file)
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
    return path


def _is_whole(path: Path) -> bool:
    """Whether a library is there and as long as it says; loading one that was cut off would end
    the process. Of ELF files for 64 bits, whose table of sections stands last.
    """
    try:
        with open(path, "rb") as file:
            header, size = file.read(64), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return False
    if header[:6] != b"\x7fELF\x02\x01":
        return True
    if len(header) < 64:
        return False
    sections, each, count = struct.unpack_from("<40xQ10xHH", header)
    return size >= sections + each * count


def load_library() -> ctypes.CDLL:
    """The built library. Raises BuildError."""
    path = library_path()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        _logger.warning("%s cannot be loaded and is built anew: %s", path, error)
    try:
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(library_path()))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
