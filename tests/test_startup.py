"""What a program meets before PyTorch: missing packages, users without a name, notebooks."""

import getpass
import os
import platform
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries differ")
@pytest.mark.parametrize("setting, kept", [("", True), ("MALLOC_ARENA_MAX", False)])
def test_freed_memory_is_kept(setting, kept):
    """Not returned to the system and faulted in again by the next step, unless the user says so."""
    code = """if True:
        import resource, sys
        sys.path.insert(0, ".")
        from utils import startup
        startup.prepare()
        for turn in range(40):
            blocks = [bytes(1 << 20) for _ in range(32)]
            del blocks
            if turn == 1:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    env |= {setting: "8"} if setting else {}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    faults = int(done.stdout)
    assert faults < 1000 if kept else faults > 10_000, done


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
