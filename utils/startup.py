"""What every program does before it imports PyTorch, and again where a package is needed late.

from utils.startup import prepare

prepare()
"""

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
    # machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Plots go to files. A notebook's `!python main.py` names a backend that may not be installed.
    os.environ["MPLBACKEND"] = "agg"
    _name_the_user()
    sys.excepthook = _without_trace
    try:
        require(*MODULES)
    except UserError as error:
        sys.exit(f"error: {error}")


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
