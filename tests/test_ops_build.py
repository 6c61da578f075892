"""The build of the CPU backend: once, in a cache, and a clear word where it fails."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from scan_helpers import params_of

from ops import selective_scan
from ops.selective_scan import BackendError, BranchParams, ssm_branch
from ops.selective_scan.cpu import build

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fresh_choice():
    """Backends are asked anew whether they are available, and forget the answer afterwards."""
    selective_scan._unavailable.cache_clear()
    selective_scan._reported.clear()
    yield
    selective_scan._unavailable.cache_clear()


def needs_compiler():
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")


def test_no_compiler(monkeypatch, caplog, fresh_choice):
    """One line says so, the next backend runs; forced, it is an error."""
    monkeypatch.delenv("DYVM_BACKEND", raising=False)
    monkeypatch.setenv("PATH", "")
    xz, params = torch.randn(1, 3, 16), BranchParams(*(p.float() for p in params_of(8, 4, 1)))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert ssm_branch(xz, params).isfinite().all()
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "no C++ compiler" in line]) == 1
    assert [line for line in lines if "backend" in line] == ["selective scan on cpu runs on the 'torch' backend"]
    monkeypatch.setenv("DYVM_BACKEND", "cpu")
    with pytest.raises(BackendError, match="no C\\+\\+ compiler"):
        ssm_branch(xz, params)


def test_failing_compiler(monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'fatal error: out of ideas' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match="exit code 3: fatal error: out of ideas"):
        build.library_path()


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    needs_compiler()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = build.library_path(("-O0",))
    assert path.exists() and path.parent == tmp_path / f"dyvm-{os.getuid()}"
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_two_processes_build_once(tmp_path):
    needs_compiler()
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    real = shutil.which(os.environ.get("CXX", "g++"))
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *kernel.cpp*) echo built >> {log};; esac\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code = f"import runpy; print(runpy.run_path({build.__file__!r})['library_path']())"
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
                 for _ in range(2)]
    paths = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert paths[0] == paths[1] and Path(paths[0]).exists()
    assert log.read_text().split() == ["built"]
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps, which only Linux has")
def test_one_openmp_runtime():
    """The kernels run on the OpenMP runtime that PyTorch has loaded; a second one would fight it for the cores."""
    needs_compiler()
    code = ("import torch\nfrom ops.selective_scan import cpu\nassert cpu.available() is None\n"
            "paths = {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}\n"
            "print(*(path for path in paths if 'omp' in path.split('/')[-1]))")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.count(".so") == 1, result.stdout
