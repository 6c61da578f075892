"""What a program meets before PyTorch: missing packages, users without a name, notebooks."""

import getpass
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils import startup
from utils.errors import UserError

ROOT = Path(__file__).parents[1]


PROGRAMS = ("main", "ablation", "compare", "predict", "visualize", "report")


@pytest.mark.parametrize(
    "program, hidden", [*((program, "timm, tqdm") for program in PROGRAMS), ("report", "jinja2")]
)
def test_packages_that_are_missing_are_one_line(tmp_path, program, hidden):
    """Before the first second of imports; what a program alone imports, then."""
    lines = [f"sys.modules[{name!r}] = None" for name in hidden.split(", ")]
    (tmp_path / "sitecustomize.py").write_text("\n".join(["import sys", *lines]))
    done = subprocess.run(
        [sys.executable, ROOT / f"{program}.py", "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    pattern = rf"error: {sys.executable} lacks {hidden}: install requirements.txt there, .*\n"
    assert done.returncode == 1 and re.fullmatch(pattern, done.stderr), done.stderr


def test_names_of_packages():
    line = startup.missing_package(ModuleNotFoundError(name="sklearn.datasets"))
    assert "lacks scikit-learn: install requirements.txt" in line
    assert startup.missing_package(ModuleNotFoundError(name="utils.nowhere")) is None, "ours"
    assert startup.missing_package(ImportError("cannot import name 'x'", name="torch")) is None
    startup.require("tqdm")
    with pytest.raises(UserError, match="lacks nosuchpackage"):
        startup.require("nosuchpackage")


@pytest.fixture
def undone(monkeypatch):
    """The hook and the variables are put back."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name in ("MPLBACKEND", "USER", "HOME", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return monkeypatch


def test_plots_need_no_notebook(undone):
    undone.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    startup.prepare()
    assert os.environ["MPLBACKEND"] == "agg"


def test_a_user_without_a_name_and_a_home(undone, tmp_path):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 12345")

    undone.setattr(getpass, "getuser", nobody)
    undone.setattr(os.path, "expanduser", lambda path: path)
    undone.setattr("tempfile.tempdir", str(tmp_path))
    startup.prepare()
    assert os.environ["USER"] == f"uid{os.getuid()}"
    assert os.environ["HOME"] == f"{tmp_path}/dyvm-{os.getuid()}"


def test_others_keep_theirs(undone):
    undone.setenv("USER", "ada")
    undone.setenv("HOME", "/home/ada")
    startup.prepare()
    assert (os.environ["USER"], os.environ["HOME"]) == ("ada", "/home/ada")
