"""What every program does before it imports PyTorch, and again where a package is needed late.

from utils.startup import prepare

prepare()
"""

import ctypes
import getpass
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from types import TracebackType

from .errors import UserError

# What all programs import.
MODULES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "einops",
    "safetensors",
    "tabulate",
    "tqdm",
    "PIL",
    "av",
)
# Packages of requirements.txt whose modules have other names.
PACKAGE_OF = {"PIL": "pillow", "sklearn": "scikit-learn"}
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def prepare() -> None:
    """Make the machine's peculiarities harmless: see the functions below."""
    # Waiting threads sleep. Spinning, the default, makes steps many times slower on a shared
    # machine, and small models faster on one without other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_freed_memory()
    # Plots go to files. A notebook's `!python main.py` names a backend that may not be installed.
    os.environ["MPLBACKEND"] = "agg"
    _name_the_user()
    sys.excepthook = _without_trace
    try:
        require(*MODULES)
    except UserError as error:
        sys.exit(f"error: {error}")


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed (1 GiB at the end of a heap, and all blocks below 32 MiB), in
    place of returning it to the system and asking for it again, page by page, in every step.

    Its limits are left alone where the user sets one, and other C libraries have none.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        mallopt(mmap_threshold, 32 << 20)  # the most it takes
        mallopt(trim_threshold, 1 << 30)


def _name_the_user() -> None:
    """Give a bare user number (`docker run --user 12345`) a name and a home: PyTorch asks for the
    name when it is imported, and caches lie in the home.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # Python 3.13 raises OSError
        os.environ["USER"] = f"uid{os.getuid()}"
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = os.path.join(tempfile.gettempdir(), f"dyvm-{os.getuid()}")


def missing_package(error: BaseException) -> str | None:
    """One line for a package that this Python lacks, else None."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    module = error.name.split(".")[0]
    if os.path.exists(os.path.join(_ROOT, module)) or os.path.exists(
        os.path.join(_ROOT, f"{module}.py")
    ):
        return None  # a module of our own: a mistake of ours
    return _lacking([module])


def _lacking(modules: Sequence[str]) -> str:
    names = ", ".join(PACKAGE_OF.get(module, module) for module in modules)
    return (
        f"{sys.executable} lacks {names}: install requirements.txt there, or take the Python that "
        "scripts/setup.sh prints"
    )


def require(*modules: str) -> None:
    """Raise UserError for packages that are needed later, before any work is done."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(_lacking(missing))


def _without_trace(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """The excepthook: one line for a package that is missing when a program is imported."""
    line = missing_package(error)
    if line is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"error: {line}", file=sys.stderr)
