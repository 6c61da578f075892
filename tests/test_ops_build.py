"""The build of the CPU backend: once, in a cache, and a clear word where it fails."""

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.scans import params_of

from ops import selective_scan
from ops.selective_scan import BackendError, BranchParams, ssm_branch
from ops.selective_scan.cpu import build, library

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fresh_choice(monkeypatch):
    """Backends are asked anew whether they are available, and forget the answer afterwards."""
    monkeypatch.setattr(library, "_held", None)
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
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    xz, params = torch.randn(1, 3, 16), BranchParams(*(p.float() for p in params_of(8, 4, 1)))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert ssm_branch(xz, params).isfinite().all()
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "no C++ compiler" in line]) == 1
    assert [line for line in lines if "backend" in line] == [
        "selective scan on cpu runs on the 'torch' backend"
    ]
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


def test_compiler_that_is_no_program(monkeypatch, tmp_path):
    (tmp_path / "text").write_text("nothing to run")
    (tmp_path / "text").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "text"))
    with pytest.raises(build.BuildError, match="Exec format error"):
        build.library_path()


def compiler_without(folder: Path, *refused: str) -> str:
    """Path of a compiler that fails where it is given one of these flags, as old ones do."""
    real = shutil.which(os.environ.get("CXX", "g++"))
    path = folder / "older"
    cases = "|".join(refused)
    refusal = f'case "$word" in {cases}) echo "error: $word?" >&2; exit 1;; esac'
    path.write_text(f'#!/bin/sh\nfor word; do {refusal}; done\nexec {real} "$@"\n')
    path.chmod(0o755)
    return str(path)


def check_kernels_of(compiler: str, monkeypatch, folder: Path) -> None:
    """The kernels that it builds compute what the definition says."""
    params = BranchParams(*(p.float() for p in params_of(21, 5, 3)))
    xz = torch.randn(2, 19, 42)
    monkeypatch.setenv("DYVM_BACKEND", "reference")
    expected = ssm_branch(xz, params)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("DYVM_BACKEND", "cpu")
    torch.testing.assert_close(ssm_branch(xz, params), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "refused, threads", [(["-march=native", "-mcpu=native"], 1), (["-fopenmp"], 0)]
)
def test_compiler_that_lacks_a_flag(monkeypatch, tmp_path, caplog, fresh_choice, refused, threads):
    """The next best kernels are built, and compute the same; one line says what is missing."""
    needs_compiler()
    with caplog.at_level(logging.INFO):
        check_kernels_of(compiler_without(tmp_path, *refused), monkeypatch, tmp_path)
    assert library.kernels().several_threads() == threads
    said = "run on one thread" if not threads else "have the basic instructions alone"
    assert said in caplog.text
    if not threads:  # and where OpenMP has come in the meantime, it is used
        held = build.library_path()
        monkeypatch.setenv("CXX", shutil.which("g++"))
        assert build.library_path() != held


def test_clang(monkeypatch, tmp_path, fresh_choice):
    """The compiler of macOS and of some clusters, with what it says of OpenMP left out."""
    if shutil.which("clang++") is None:
        pytest.skip("no clang++")
    monkeypatch.setattr(build, "_openmp", lambda: ("-fno-openmp",))
    check_kernels_of("clang++", monkeypatch, tmp_path)


def test_the_build_line_of_macos(monkeypatch):
    """Apple's clang brings no OpenMP runtime: PyTorch's own is linked. Never run on a Mac."""
    monkeypatch.setattr(build.sys, "platform", "darwin")
    first, second, runtime, search = build._openmp()
    assert (first, second) == ("-Xpreprocessor", "-fopenmp")
    lib = Path(torch.__file__).parent / "lib"
    assert runtime == str(lib / "libomp.dylib") and search == f"-Wl,-rpath,{lib}"


@pytest.mark.parametrize(
    "code, told", [(0, "wrote no library; is it a C"), (4, "exit code 4: it said nothing")]
)
def test_a_program_that_is_no_compiler(monkeypatch, tmp_path, code, told):
    compiler = tmp_path / "other"
    compiler.write_text(f"#!/bin/sh\nexit {code}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match=told):
        build.library_path()


def test_compiler_that_cannot_be_read(monkeypatch):
    monkeypatch.setenv("CXX", "g++ '-O2")
    with pytest.raises(build.BuildError, match="cannot read CXX=g.* '-O2: No closing quotation"):
        build.library_path()


def test_compiler_of_several_words(monkeypatch, tmp_path):
    needs_compiler()
    monkeypatch.setenv("CXX", f"env {os.environ.get('CXX', 'g++')}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.library_path(("-O0",)).exists()


@pytest.mark.parametrize(
    "damage, told",
    [
        ("path.write_text('cut off')", "cannot be loaded and is built anew"),
        # The system would end the process with SIGBUS.
        ("os.truncate(path, 5000)", "is cut off and is built anew"),
        ("os.truncate(path, path.stat().st_size - 1)", "is cut off and is built anew"),
    ],
)
def test_library_that_cannot_be_loaded_is_built_anew(damage, told):
    """In its own process: a library that is loaded stays so."""
    needs_compiler()
    if "truncate" in damage and sys.platform != "linux":
        pytest.skip("only ELF files are looked at")
    code = (
        "import os, torch\nfrom ops.selective_scan.cpu import build\n"
        f"path = build.library_path(('-O0',))\n{damage}\n"
        "build.library_path = lambda original=build.library_path: original(('-O0',))\n"
        "print(build.load_library().tile_steps())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(result.stdout) > 0
    assert told in result.stderr


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86-64"
)
@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-march=x86-64",)])
def test_smaller_instruction_sets(monkeypatch, flags):
    """The kernels as other processors build them, against the definition: numbers, gradients, and
    NaNs of any kind.
    """
    needs_compiler()
    params = BranchParams(*(p.float().requires_grad_() for p in params_of(21, 5, 3)))
    xz = torch.randn(2, 19, 42, requires_grad=True)
    monkeypatch.setenv("DYVM_BACKEND", "reference")
    expected = torch.autograd.grad(ssm_branch(xz, params).square().sum(), (xz, *params))
    monkeypatch.setenv("DYVM_BACKEND", "cpu")
    ssm_branch(xz, params)  # loads the library that is replaced now
    monkeypatch.setattr(library, "_held", ctypes.CDLL(str(build.library_path(flags))))
    actual = torch.autograd.grad(ssm_branch(xz, params).square().sum(), (xz, *params))
    for name, a, e in zip(("xz", *BranchParams._fields), actual, expected, strict=True):
        torch.testing.assert_close(
            a, e, rtol=1e-4, atol=1e-5 * e.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )
    for bits in (0x7FC00000, 0xFFC00000, 0x7FC00001, 0xFFFFFFFF, 0x7F812345):
        A = params.A.detach().clone()
        A.view(torch.int32)[3] = torch.tensor(bits, dtype=torch.int64).to(torch.int32)
        with torch.no_grad():
            y = ssm_branch(xz, params._replace(A=A))
        assert y[..., 3].isnan().all() and y[..., 4].isfinite().all(), hex(bits)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_type(monkeypatch, default):
    """What the kernels write is float32 whatever new tensors are."""
    needs_compiler()
    params = BranchParams(*(p.float().requires_grad_() for p in params_of(21, 5, 3)))
    xz = torch.randn(2, 19, 42, requires_grad=True)
    monkeypatch.setenv("DYVM_BACKEND", "cpu")
    expected = torch.autograd.grad(ssm_branch(xz, params).square().sum(), (xz, *params))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        actual = torch.autograd.grad(ssm_branch(xz, params).square().sum(), (xz, *params))
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(actual, expected)


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
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *kernel.cpp*) echo built >> {log};; esac\nexec {real} "$@"\n'
    )
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code = f"import runpy; print(runpy.run_path({build.__file__!r})['library_path']())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    paths = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert paths[0] == paths[1] and Path(paths[0]).exists()
    assert log.read_text().split() == ["built"]
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps, which only Linux has"
)
def test_one_openmp_runtime():
    """The kernels run on the OpenMP runtime that PyTorch has loaded; a second one would fight it
    for the cores.
    """
    needs_compiler()
    code = (
        "import torch\nfrom ops.selective_scan import cpu\nassert cpu.available() is None\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}\n"
        "print(*(path for path in paths if 'omp' in path.split('/')[-1]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.count(".so") == 1, result.stdout
