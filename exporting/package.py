"""A traced program compiled by AOTInductor: a package that C++ loads, and Python without this
project. It runs on processors like the one that it was compiled on.
"""

import io
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ops.selective_scan import native
from ops.selective_scan.cpu.build import BuildError
from utils.errors import UserError, first_line

_SETTINGS = {"freezing": True}  # weights are packed while it is compiled

for _name in ("torch.utils.cpp_extension", "torch._inductor"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # of a GPU that is missing


def operators() -> Path:
    """The library of the scan's operators, built and loaded. Raises UserError."""
    try:
        return native.library()
    except BuildError as error:
        raise UserError(f"--format aoti needs a C++ compiler: {error}") from None


def library_of(path: str | os.PathLike) -> Path:
    """The library beside a package, which is loaded before it."""
    return Path(path).with_suffix(".so")


def to_package(program: ExportedProgram, texts: Mapping[str, str], path: Path) -> None:
    """Compile into a file *.pt2, with texts as metadata. Raises UserError."""
    settings = _SETTINGS | {"aot_inductor.metadata": dict(texts)}
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=settings
            )
    except Exception as error:  # its errors have no common class of their own
        raise UserError(f"AOTInductor cannot compile this model: {first_line(error)}") from None


def open_package(path: Path) -> Callable[[Tensor], Tensor]:
    """images -> logits, by a package; `operators` come first."""
    return torch._inductor.aoti_load_package(str(path))
