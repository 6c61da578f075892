"""The CUDA C++ kernel from its source to its launch, as far as no GPU is needed: NVRTC, what it
keeps, the driver's calls, and Triton's kernel where any of them fails.
"""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")

from ops import cache  # noqa: E402
from ops.selective_scan.gpu import cuda  # noqa: E402
from ops.selective_scan.gpu.cuda import driver, nvrtc, problem, proof  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TINY = 'extern "C" __global__ void kernel(int* x) { *x = VALUE; }'
OPTIONS = ("-DVALUE=7",)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dyvm"


@pytest.fixture
def library():
    """NVRTC, which comes with PyTorch for CUDA."""
    if torch.version.cuda is None:
        pytest.skip("PyTorch without CUDA")
    return nvrtc._nvrtc()


@pytest.fixture
def compilations(library, monkeypatch):
    """Every compilation of NVRTC: the architecture."""
    calls = []
    original = nvrtc.Nvrtc.compile

    def compile(self, source, architecture, options):
        calls.append(architecture)
        return original(self, source, architecture, options)

    monkeypatch.setattr(nvrtc.Nvrtc, "compile", compile)
    return calls


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", problem.SCALARS)
def test_kernel_fits_in_registers(dtype, architecture, library, tmp_path):
    """Nothing spills, and 8 warps of 16-bit types fit in Hopper's shared memory."""
    if architecture not in library.architectures():
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    for masked in ("true", "false"):
        options = problem.options(dtype, masked)
        file = tmp_path / "kernel.cubin"
        file.write_bytes(library.compile(cuda._SOURCE.read_text(), f"sm_{architecture}", options))
        report = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        used = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", report)}
        assert used["STACK"] == 0 and used["REG"] <= 255, report
        assert used["SHARED"] <= (32 if dtype == torch.float32 else 28) * 1024, report


def test_compiled_once(own_cache, compilations):
    first = nvrtc.compiled(TINY, (9, 0), OPTIONS)
    assert first[:4] == b"\x7fELF" and nvrtc.compiled(TINY, (9, 0), OPTIONS) == first
    assert compilations == ["sm_90"]
    assert nvrtc.compiled(TINY, (8, 0), OPTIONS) != first
    assert nvrtc.compiled(TINY, (9, 0), ("-DVALUE=8",)) != first
    nvrtc.compiled(TINY + "\n", (9, 0), OPTIONS)
    assert compilations == ["sm_90", "sm_80", "sm_90", "sm_90"]
    assert len(list(own_cache.iterdir())) == 4 and not list(own_cache.glob("*.tmp"))


def test_another_version_compiles_anew(compilations, monkeypatch, library):
    nvrtc.compiled(TINY, (9, 0), OPTIONS)
    monkeypatch.setattr(library, "version", "99.9")
    nvrtc.compiled(TINY, (9, 0), OPTIONS)
    assert compilations == ["sm_90", "sm_90"]


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + b"x"]
)
def test_damaged_file(damage, own_cache, compilations):
    """Half a program is compiled anew and replaced."""
    whole = nvrtc.compiled(TINY, (9, 0), OPTIONS)
    (file,) = own_cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert nvrtc.compiled(TINY, (9, 0), OPTIONS) == whole
    assert nvrtc.compiled(TINY, (9, 0), OPTIONS) == whole
    assert compilations == ["sm_90", "sm_90"]


def test_no_cache(monkeypatch, tmp_path, compilations):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(OSError, match="no cache folder can be written"):
        cache.folder()
    for _ in range(2):
        assert nvrtc.compiled(TINY, (9, 0), OPTIONS)[:4] == b"\x7fELF"
    assert compilations == ["sm_90", "sm_90"]


def test_full_cache(monkeypatch, own_cache, compilations):
    def refuse(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert nvrtc.compiled(TINY, (9, 0), OPTIONS)[:4] == b"\x7fELF"
    assert not list(own_cache.iterdir())


def test_two_processes_compile_at_once(own_cache, library):
    code = (
        "import hashlib; from ops.selective_scan.gpu.cuda import nvrtc; "
        f"print(hashlib.sha256(nvrtc.compiled({TINY!r}, (9, 0), {OPTIONS!r})).hexdigest())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    found = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(found) == 1
    (file,) = own_cache.iterdir()
    assert nvrtc._cached(file.name) is not None


def test_architectures():
    known = [75, 80, 90, 100]
    assert nvrtc.architecture((9, 0), known) == "sm_90"
    assert nvrtc.architecture((13, 0), known) == "compute_100"
    assert nvrtc.architecture((8, 9), known) == "compute_80"
    with pytest.raises(nvrtc.CompileError, match="for sm_75 and newer, not for sm_70"):
        nvrtc.architecture((7, 0), known)


def test_unknown_architecture_is_compiled_as_ptx(library):
    ptx = nvrtc.compiled(TINY, (99, 0), OPTIONS)
    newest = library.architectures()[-1]
    assert f".target sm_{newest}".encode() in ptx and ptx.endswith(b"\0")


def test_source_with_an_error(library):
    with pytest.raises(
        nvrtc.CompileError, match=r"NVRTC .*: .*error.*VALUE.* is undefined"
    ) as found:
        nvrtc.compiled(TINY, (9, 0), ())
    assert "\n" not in str(found.value)


def test_missing_nvrtc(monkeypatch):
    monkeypatch.setattr(nvrtc, "_candidates", lambda: ["libnvrtc-of-nobody.so"])
    with pytest.raises(nvrtc.CompileError, match="NVRTC .* is not installed beside PyTorch"):
        nvrtc.Nvrtc()


class FakeDriver:
    """libcuda: notes its calls; those in `failing` fail."""

    def __init__(self, failing=()):
        self.calls, self._failing = [], failing

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: self._called(name, *arguments)

    def _called(self, name, *arguments):
        if name == "cuGetErrorName":
            arguments[1]._obj.value = b"CUDA_ERROR_OUT_OF_TEA"
            return 0
        self.calls.append((name, arguments))
        if name in self._failing:
            return 700
        # Handles have 64 bits.
        handle = {"cuDevicePrimaryCtxRetain": 1, "cuModuleLoadData": 2, "cuModuleGetFunction": 3}
        if name in handle:
            arguments[0]._obj.value = (handle[name] << 40) + 5
        if name == "cuDeviceGet":
            arguments[0]._obj.value = arguments[1]
        if name == "cuLaunchKernel":
            pointer = arguments[9][0]
            self.argument = ctypes.cast(pointer, ctypes.POINTER(problem.Problem))[0].tokens
        return 0


class Nowhere:
    """torch.cuda.device and a stream, without a GPU."""

    cuda_stream = (4 << 40) + 5

    def __init__(self, *_):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


@pytest.fixture
def fake(monkeypatch):
    """Puts a fake driver in the place of the real one."""

    def put(*failing):
        library = FakeDriver(failing)
        monkeypatch.setattr(driver, "_driver", lambda: library)
        driver._context.cache_clear()
        return library

    monkeypatch.setattr(torch.cuda, "device", Nowhere)
    monkeypatch.setattr(torch.cuda, "current_stream", Nowhere)
    yield put
    driver._context.cache_clear()


def test_driver_calls(fake):
    library = fake()
    kernel = driver.Kernel(b"program", "scan_backward", 1)
    kernel((3, 4, 2), 32, problem.Problem(tokens=70))
    kernel((3, 4, 2), 32, problem.Problem(tokens=71))
    context, module, function, stream = ((n << 40) + 5 for n in (1, 2, 3, 4))

    def plain(value):
        return getattr(value, "value", value)

    calls = [(name, [plain(value) for value in arguments]) for name, arguments in library.calls]
    assert [name for name, _ in calls] == [
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        *["cuCtxSetCurrent", "cuLaunchKernel"] * 2,
    ]
    assert calls[1][1][1] == 1 and calls[2][1] == [context] and calls[3][1][1] == b"program"
    assert calls[4][1][1:] == [module, b"scan_backward"] and calls[5][1] == [function, 9, 100]
    launch = calls[7][1]
    assert launch[:9] == [function, 3, 4, 2, 32, 1, 1, 0, stream] and launch[10] is None
    assert library.argument == 71


def test_driver_signatures():
    """Pointers and handles are not cut to 32 bits."""

    class Library:
        def __getattr__(self, name):
            value = type(name, (), {})()
            setattr(self, name, value)
            return value

    library = driver._with_signatures(Library())
    for name in driver._SIGNATURES:
        assert getattr(library, name).restype is ctypes.c_int
    launch = library.cuLaunchKernel.argtypes
    assert len(launch) == 11 and launch[0] is launch[8] is ctypes.c_void_p


@pytest.mark.parametrize(
    "failing", ["cuModuleLoadData", "cuLaunchKernel", "cuDevicePrimaryCtxRetain"]
)
def test_driver_error(failing, fake):
    fake(failing)
    wanted = rf"^{failing} failed: CUDA_ERROR_OUT_OF_TEA \(700\)$"
    with pytest.raises(driver.DriverError, match=wanted):
        driver.Kernel(b"program", "scan_backward", 0)((1, 1, 1), 32, problem.Problem())


def test_missing_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    driver._driver.cache_clear()
    with pytest.raises(driver.DriverError, match="the CUDA driver cannot be used: libcuda.so.1"):
        driver._driver()
    driver._driver.cache_clear()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Tensors of the CPU are taken, and the kernel is loaded as if it were on a GPU; nothing has
    been proved.
    """
    monkeypatch.setattr(cuda, "_failed", False)
    monkeypatch.setattr(cuda, "_proven", {})
    monkeypatch.setattr(cuda, "_device_refusal", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("DYVM_CUDA_BACKWARD", raising=False)


def given(dtype=torch.bfloat16, masked=False):
    return proof.small_problem(dtype, masked, torch.device("cpu"))


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def missing_library(monkeypatch):
    monkeypatch.setattr(nvrtc, "_nvrtc", nvrtc.Nvrtc)
    monkeypatch.setattr(nvrtc, "_candidates", lambda: [])
    return "NVRTC .* is not installed"


def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (5, 2))
    return "not for sm_52"


def missing_gpu_driver(monkeypatch):
    def refuse():
        raise driver.DriverError("the CUDA driver cannot be used: gone")

    monkeypatch.setattr(driver, "_driver", refuse)
    monkeypatch.setattr(torch.cuda, "device", Nowhere)
    return "the CUDA driver cannot be used: gone"


def source_that_is_gone(monkeypatch):
    monkeypatch.setattr(cuda, "_SOURCE", Path("/nowhere/scan_backward.cu"))
    return "No such file or directory"


def wrong_results(monkeypatch):
    monkeypatch.setattr(driver, "Kernel", lambda *_: None)
    monkeypatch.setattr(proof, "disagreement", lambda *_: "its gradient of u differs")
    return "its gradient of u differs"


@pytest.mark.parametrize(
    "fault", [missing_library, old_gpu, missing_gpu_driver, source_that_is_gone, wrong_results]
)
def test_whatever_fails_leaves_triton(fault, library, on_a_gpu, monkeypatch, caplog):
    """One line of warning, once, for whatever comes later too."""
    wanted = fault(monkeypatch)
    for dtype in (torch.bfloat16, torch.float32):
        assert cuda.scan_backward(given(dtype)) is None
    (line,) = warnings(caplog)
    assert re.search(wanted, line) and "\n" not in line and "Triton" in line


def test_one_proof_for_each_type_and_mask(on_a_gpu, monkeypatch, caplog):
    proofs, runs = [], []

    def prove(run, dtype, masked, device):
        proofs.append((dtype, masked))

    monkeypatch.setattr(cuda, "_load", lambda given: given.u.dtype)
    monkeypatch.setattr(proof, "disagreement", prove)
    monkeypatch.setattr(cuda, "_run", lambda kernel, given: runs.append(kernel) or "result")
    for dtype, masked in 2 * [(torch.bfloat16, False), (torch.bfloat16, True), (torch.half, True)]:
        assert cuda.scan_backward(given(dtype, masked)) == "result"
    assert proofs == [(torch.bfloat16, False), (torch.bfloat16, True), (torch.half, True)]
    assert len(runs) == 6 and not warnings(caplog)


def test_not_while_a_graph_is_captured(on_a_gpu, monkeypatch):
    """Unless it has been proved before."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "graph is captured" in cuda.takes(given())
    assert cuda.scan_backward(given()) is None and not cuda._failed
    cuda._proven[cuda._key(given())] = object()
    assert cuda.takes(given()) is None


def test_takes_names_what_it_refuses(on_a_gpu, monkeypatch):
    small = given()
    assert cuda.takes(small) is None
    assert "16 states, not 8" in cuda.takes(small._replace(bc=small.bc[..., :16]))
    assert "float64" in cuda.takes(small._replace(u=small.u.double(), dt=small.dt.double()))
    assert "float32" in cuda.takes(small._replace(grad_y=small.grad_y.float()))
    many = small.u[:, :1, :1].expand(2, 70000, 1, 40)
    assert "65535 images, not 70000" in cuda.takes(small._replace(u=many))
    long = small.u[:, :1, :1].expand(2, 1, 2**26, 40)
    assert "less than" in cuda.takes(small._replace(u=long))
    monkeypatch.undo()
    monkeypatch.delenv("DYVM_CUDA_BACKWARD", raising=False)
    assert "CUDA tensors, not on cpu" in cuda.takes(small)


def test_turned_off(on_a_gpu, monkeypatch, caplog):
    monkeypatch.setenv("DYVM_CUDA_BACKWARD", "0")
    assert cuda.takes(given()) == "is turned off" and cuda.scan_backward(given()) is None
    assert not warnings(caplog)


def test_proof_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    given()
    assert torch.equal(torch.get_rng_state(), before)
