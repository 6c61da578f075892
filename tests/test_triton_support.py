"""Whether Triton's kernels can run: what is refused, and the one warning where a GPU lacks them."""

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.scans import params_of
from helpers.shell import program
from torch._subclasses.fake_tensor import FakeTensorMode

from ops import selective_scan, triton_support
from ops.selective_scan import BranchParams


def triton_of(version: str) -> ModuleType:
    module = ModuleType("triton")
    module.__version__ = version
    module.knobs = SimpleNamespace(
        build=SimpleNamespace(impl=None), cache=SimpleNamespace(dir=tempfile.gettempdir())
    )
    return module


@pytest.fixture
def refusal(monkeypatch, tmp_path):
    """`refusal` asked anew, on a machine with a Hopper GPU, gcc, Python's headers and Triton 3.6;
    its folder of programs is tmp_path.
    """
    program(tmp_path / "gcc", "exit")
    (tmp_path / "include").mkdir()
    (tmp_path / "include/Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CPATH", "C_INCLUDE_PATH", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": f"{tmp_path}/include"})
    monkeypatch.setitem(sys.modules, "triton", triton_of("3.6.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return triton_support.refusal.__wrapped__


def test_a_machine_that_has_all(refusal):
    assert refusal() is None and refusal(anywhere=True) is None


@pytest.mark.parametrize("version, taken", [("3.3.1", False), ("3.4.0", True), ("3.10.0", True)])
def test_version(version, taken, refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", triton_of(version))
    for reason in (refusal(), refusal(anywhere=True)):
        told = f"needs Triton 3.4 or newer, and this is {version}"
        assert reason == (None if taken else told)


@pytest.mark.parametrize("error", [ImportError("no triton"), OSError("no triton\nbehind a trace")])
def test_an_import_that_fails(error, refusal, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(triton_support.importlib, "import_module", fail)
    assert refusal() == "Triton cannot be imported (no triton)"


def test_no_gpu_or_an_old_one(refusal, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 1))
    assert refusal() == "needs a GPU of compute capability 7.0 or newer, and this one has 6.1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA GPU" in refusal()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refusal() is None


def test_no_compiler(refusal, monkeypatch, tmp_path):
    (tmp_path / "gcc").rename(tmp_path / "clang")
    assert refusal() is None
    (tmp_path / "clang").unlink()
    assert "needs a C compiler to launch kernels: install gcc or clang" in refusal()
    sys.modules["triton"].knobs.build.impl = print
    assert refusal() is None


@pytest.mark.parametrize("given", ["icx", "/nowhere/cc", "gcc -m64", "ccache gcc", ""])
def test_a_compiler_that_triton_cannot_start(given, refusal, monkeypatch):
    monkeypatch.setenv("CC", given)
    assert f"Triton compiles with CC={given}, which is not a program" in refusal()
    with pytest.raises(OSError):  # as Triton starts it
        subprocess.check_call([given, "--version"])


def test_a_compiler_named_by_its_path(refusal, monkeypatch, tmp_path):
    own = program(tmp_path / "own/cc", "exit")
    monkeypatch.setenv("CC", str(own))
    assert refusal() is None


def test_a_cache_that_cannot_be_written(refusal, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    knobs = sys.modules["triton"].knobs
    knobs.cache.dir = str(tmp_path / "file/cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # put back behind the test
    assert refusal() is None
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "caches/dyvm/triton")
    assert caplog.messages[0].startswith(f"Triton keeps its kernels in {tmp_path}/caches/dyvm/tri")
    assert len(caplog.messages) == 1
    monkeypatch.setattr(triton_support.cache, "folder", lambda: Path("/dev/null/x").mkdir())
    assert "Triton needs a folder that can be written (TRITON_CACHE_DIR)" in refusal()


def test_no_headers(refusal, monkeypatch, tmp_path):
    (tmp_path / "include/Python.h").rename(tmp_path / "Python.h")
    assert f"{tmp_path}/include has no Python.h: install them (python3-dev" in refusal()
    monkeypatch.setenv("CPATH", f"/nowhere:{tmp_path}")
    assert refusal() is None


def test_this_machine_has_what_triton_builds_with():
    """The folder that is searched for Python.h is the one that Triton's own builder names."""
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    if not shutil.which("gcc") or os.environ.get("CC"):
        pytest.skip("no gcc, or another compiler is asked for")
    from triton.runtime.build import _build

    folders = []

    def build(command, **kwargs):
        folders.extend(word[2:] for word in command if word.startswith("-I"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "check_call", build)
        _build("x", "x.c", "/nowhere", [], [], [], [])
    found = any(os.path.isfile(os.path.join(folder, "Python.h")) for folder in folders)
    assert triton_support._no_compiler() is None
    assert (triton_support._no_header() is None) == found


@pytest.fixture
def without_triton(monkeypatch):
    """Triton's backend is refused; -> a function that chooses a backend for CUDA tensors."""
    load, unavailable = selective_scan._load, selective_scan._unavailable
    refused = (None, "cannot be imported (needs Triton 3.4 or newer)")
    monkeypatch.setattr(
        selective_scan, "_load", lambda name: refused if name == "triton" else load(name)
    )
    monkeypatch.setattr(
        selective_scan,
        "_unavailable",
        lambda name: "not installed" if name == "mamba_ssm" else unavailable(name),
    )
    monkeypatch.delenv("DYVM_BACKEND", raising=False)
    selective_scan._warn_without_triton.cache_clear()

    def choose(device="cuda"):
        with FakeTensorMode():
            params = BranchParams(
                *(torch.zeros(p.shape, device=device) for p in params_of(8, 4, 1))
            )
            return selective_scan.backend_for(torch.zeros(1, 3, 16, device=device), params)

    yield choose
    selective_scan._warn_without_triton.cache_clear()


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_gpu_without_triton_is_told_once(without_triton, caplog):
    for _ in range(3):
        assert without_triton() == "torch"
    assert warnings_of(caplog) == [
        "the 'triton' backend cannot run here, and the selective scan runs on 'torch', many times "
        "slower: cannot be imported (needs Triton 3.4 or newer)"
    ]


def test_no_warning_for_a_cpu_or_a_backend_that_was_asked_for(without_triton, caplog, monkeypatch):
    without_triton("cpu")
    monkeypatch.setenv("DYVM_BACKEND", "torch")
    without_triton()
    assert warnings_of(caplog) == []


def test_no_warning_for_arguments_that_triton_does_not_take(without_triton, caplog, monkeypatch):
    module = SimpleNamespace(takes=lambda *args: "not these sizes", available=lambda: None)
    monkeypatch.setattr(
        selective_scan,
        "_load",
        lambda name, load=selective_scan._load: (module, None) if name == "triton" else load(name),
    )
    monkeypatch.setattr(
        selective_scan, "_unavailable", lambda name: {"mamba_ssm": "none"}.get(name)
    )
    assert without_triton() == "torch"
    assert warnings_of(caplog) == []
