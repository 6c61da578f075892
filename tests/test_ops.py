"""Every selective scan backend that runs here against the float64 definition: outputs, every gradient, bad input.

B images, L tokens, E inner channels, N states, R step rank.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from ops import selective_scan
from ops.rms_norm import add_rms_norm
from ops.selective_scan import BackendError, BranchParams, bidirectional_ssm, ssm_branch
from ops.selective_scan.cpu import build

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = [name for name in selective_scan.PREFERENCE if name != "reference"]
ON_CUDA = ("triton", "mamba_ssm")
#        B, L, E, N, R
SIZES = [(3, 1, 8, 4, 1), (2, 2, 12, 8, 2), (3, 17, 20, 16, 3), (2, 63, 36, 21, 4), (2, 197, 24, 16, 2)]
# Of a tensor's largest element; float32 has 6e-8 and errors add up over 197 steps.
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty gives NaN, so that an element which nobody wrote shows."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Forces each backend in turn; its device, or a skip that says why it does not run here."""
    device = "cuda" if request.param in ON_CUDA else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{request.param}: no CUDA device")
    reason = selective_scan._refusal(request.param, torch.zeros(1, 1, 16, device=device), params_of(8, 4, 1))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setenv("DYVM_BACKEND", request.param)
    return device


@pytest.fixture
def fresh_choice():
    """Backends are asked anew whether they are available, and forget the answer afterwards."""
    selective_scan._unavailable.cache_clear()
    selective_scan._reported.clear()
    yield
    selective_scan._unavailable.cache_clear()


def params_of(channels, states, rank, seed=0, width=4):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return BranchParams(normal(channels, width) * 0.4, normal(channels) * 0.1,
                        normal(rank + 2 * states, channels) * channels ** -0.5, normal(channels, rank) * rank ** -0.5,
                        normal(channels) - 2, -torch.exp(normal(channels, states)), normal(channels))


def prefix_mask(images, tokens):
    kept = torch.tensor([tokens // 2 + 1, tokens // 3, tokens])[:images]
    return (torch.arange(tokens) < kept[:, None]).double()


def random_mask(images, tokens):
    mask = torch.rand(images, tokens, dtype=torch.float64)
    return torch.where(mask < 0.3, 0, mask)


def evaluate(monkeypatch, backend, call, device, dtype, tensors, options, behind=None):
    """Output and gradients of `call` on copies of `tensors` (a dict; BranchParams count as seven tensors)."""
    monkeypatch.setenv("DYVM_BACKEND", backend)
    # Threads matter to the C++ kernels alone; elsewhere they only spin between thousands of small operations.
    torch.set_num_threads(2 if backend == "cpu" else 1)
    leaves = []

    def copy(value):
        if isinstance(value, BranchParams):
            return BranchParams(*map(copy, value))
        leaves.append(value.detach().clone().to(device, dtype).requires_grad_())
        return leaves[-1]

    arguments = {name: copy(value) for name, value in tensors.items()}
    options = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    y = call(**arguments, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if behind is not None:
        weights = weights * behind[..., None]
    y.backward(weights.to(device, y.dtype))
    return [y.detach()] + [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def assert_close(actual, expected, tolerance=TOLERANCE):
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        if e.numel():
            error = (a.cpu().double() - e).abs().max().item()
            assert error <= tolerance * e.abs().max().item(), f"tensor {index}: {error} of {e.abs().max().item()}"


def compare(monkeypatch, device, call, tensors, options, behind=None):
    name = os.environ["DYVM_BACKEND"]
    actual = evaluate(monkeypatch, name, call, device, torch.float32, tensors, options, behind)
    expected = evaluate(monkeypatch, "reference", call, "cpu", torch.float64, tensors, options, behind)
    assert_close(actual, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", ["plain", "mask", "prefix", "active", "lengths", "all"])
@pytest.mark.parametrize("reverse", [False, True])
def test_branch(backend, monkeypatch, size, case, reverse):
    images, tokens, channels, states, rank = size
    torch.manual_seed(0)
    tensors = {"xz": torch.randn(images, tokens, 2 * channels, dtype=torch.float64),
               "params": params_of(channels, states, rank)}
    if case in ("mask", "all"):
        tensors["mask"] = random_mask(images, tokens)
    if case == "prefix":
        tensors["mask"] = prefix_mask(images, tokens)
    options = {"reverse": reverse}
    if case in ("active", "all"):
        options["active"] = torch.tensor([True, False, True])[:images]
    if case in ("lengths", "all"):
        options["lengths"] = torch.tensor([tokens // 2 + 1, 0, tokens])[:images]
    compare(monkeypatch, backend, ssm_branch, tensors, options)


@pytest.mark.parametrize("size", SIZES[1:4], ids=str)
@pytest.mark.parametrize("case", ["plain", "gates", "prefix", "prefix, nothing behind", "active", "all"])
def test_both_directions(backend, monkeypatch, size, case):
    images, tokens, channels, states, rank = size
    torch.manual_seed(0)
    tensors = {"xz": torch.randn(images, tokens, 2 * channels, dtype=torch.float64),
               "forward": params_of(channels, states, rank), "backward": params_of(channels, states, rank, seed=1)}
    options, behind = {"scale": 0.5}, None
    if case in ("gates", "all"):
        tensors["gates"] = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, 0.0]], dtype=torch.float64)[:images]
    if case.startswith("prefix"):
        tensors["mask"] = prefix_mask(images, tokens)
        behind = tensors["mask"] if "nothing" in case else None
    if case in ("active", "all"):
        options["active"] = torch.tensor([[True, False], [True, True], [False, False]])[:images]
    if case == "all":
        tensors["mask"] = random_mask(images, tokens)
        options["lengths"] = torch.tensor([tokens // 2 + 1, tokens, 1])[:images]
    compare(monkeypatch, backend, bidirectional_ssm, tensors, options, behind)


def test_large_steps_and_decays(backend, monkeypatch):
    """exp(delta A) underflows: the result is that of a state forgotten at once, not garbage."""
    params = params_of(16, 16, 2)
    tensors = {"xz": torch.randn(2, 20, 32, dtype=torch.float64) * 3,
               "params": params._replace(dt_proj_bias=params.dt_proj_bias + 30, A=params.A * 20)}
    compare(monkeypatch, backend, ssm_branch, tensors, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(backend, monkeypatch, dtype):
    """Arithmetic in float32: the error is that of rounding the input and the output once."""
    xz = torch.randn(2, 33, 48).to(dtype).to(backend).requires_grad_()
    params = BranchParams(*(p.float().to(backend).requires_grad_() for p in params_of(24, 16, 2)))
    with torch.autocast(backend, torch.bfloat16):
        y = ssm_branch(xz, params, reverse=True)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert xz.grad.dtype == dtype and all(p.grad.dtype == torch.float32 for p in params)
    exact_xz = xz.detach().cpu().double().requires_grad_()
    exact_params = BranchParams(*(p.detach().cpu().double().requires_grad_() for p in params))
    monkeypatch.setenv("DYVM_BACKEND", "reference")
    exact = ssm_branch(exact_xz, exact_params, reverse=True)
    exact.sum().backward()
    assert_close([y, xz.grad], [exact, exact_xz.grad], torch.finfo(dtype).eps)
    assert_close([p.grad for p in params], [p.grad for p in exact_params])


def test_non_contiguous_arguments(backend, monkeypatch):
    tensors = {"xz": torch.randn(2, 18, 80, dtype=torch.float64)[:, ::2, ::2],
               "params": BranchParams(*(torch.stack((p, p), -1)[..., 0] for p in params_of(20, 8, 2))),
               "mask": random_mask(9, 2).t()}
    options = {"lengths": torch.tensor([[9, 0], [5, 0]])[:, 0], "active": torch.tensor([[True, True], [False, True]])}

    def strided(xz, params, mask, lengths, active):
        """The copies that `evaluate` makes are dense; this brings the strides back."""
        xz = xz.transpose(1, 2).contiguous().transpose(1, 2)
        params = BranchParams(*(torch.stack((p, p), -1)[..., 0] for p in params))
        return bidirectional_ssm(xz, params, params, mask=mask.t().contiguous().t(), lengths=lengths,
                                 active=active.t().contiguous().t())

    compare(monkeypatch, backend, strided, tensors, options)


@pytest.mark.parametrize("images, tokens", [(0, 5), (2, 0), (0, 0)])
def test_no_images_or_no_tokens(backend, images, tokens):
    xz = torch.randn(images, tokens, 16, device=backend, requires_grad=True)
    params = BranchParams(*(p.float().to(backend).requires_grad_() for p in params_of(8, 4, 1)))
    mask = torch.ones(images, tokens, device=backend)
    for y in (ssm_branch(xz, params, mask=mask),
              bidirectional_ssm(xz, params, params, mask=mask, gates=torch.ones(images, 2, device=backend))):
        assert y.shape == (images, tokens, 8)
        y.sum().backward()
    assert xz.grad.shape == xz.shape
    assert all(p.grad is None or not p.grad.any() for p in params)


@pytest.mark.parametrize("half", ["x", "z"])
def test_nan_in_nan_out(backend, half):
    xz = torch.randn(2, 40, 48, device=backend)
    channel = 5 + (24 if half == "z" else 0)
    xz[0, 20, channel] = float("nan")
    params = BranchParams(*(p.float().to(backend) for p in params_of(24, 16, 2)))
    y = ssm_branch(xz, params)
    assert y[0, 20, 5].isnan()
    assert y[0, :20].isfinite().all() and y[1].isfinite().all()
    if half == "x":
        assert y[0, 20:].isnan().all()  # the state of every channel reads B, a sum over all channels
        switched_off = ssm_branch(xz, params, active=torch.tensor([False, True], device=backend))
        assert not switched_off[0].any() and torch.equal(switched_off[1], y[1])


def test_the_same_gradients_every_time():
    """The CPU backend adds up in a fixed order, whichever thread comes first."""
    params = BranchParams(*(p.float().requires_grad_() for p in params_of(64, 16, 2)))
    xz = torch.randn(3, 50, 128)
    runs = [torch.autograd.grad(ssm_branch(xz, params).square().sum(), params) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_frozen_weights(backend, monkeypatch):
    """Only xz wants a gradient; without any, the same output."""
    xz = torch.randn(2, 10, 32, device=backend)
    params = BranchParams(*(p.float().to(backend) for p in params_of(16, 8, 2)))
    plain = ssm_branch(xz, params)
    leaf = xz.clone().requires_grad_()
    y = ssm_branch(leaf, params)
    y.sum().backward()
    assert not plain.requires_grad and torch.allclose(plain, y, atol=1e-6)
    assert leaf.grad.isfinite().all() and leaf.grad.any()


# ---- bad input

@pytest.mark.parametrize("change, message", [
    ({"xz": torch.zeros(2, 16)}, "xz must be"),
    ({"xz": torch.zeros(2, 5, 16, dtype=torch.int64)}, "xz must be"),
    ({"xz": torch.zeros(2, 5, 18)}, "2E = 16"),
    ({"mask": torch.ones(2, 4)}, r"mask must have shape \[2, 5\]"),
    ({"active": torch.ones(3, dtype=torch.bool)}, r"active must have shape \[2\]"),
    ({"lengths": torch.ones(2)}, "lengths must be integers"),
    ({"mask": torch.ones(2, 5, device="meta")}, "mask is on meta, xz on cpu"),
    ({"params": {"conv_bias": torch.zeros(9)}}, r"conv_bias must have shape \[8\]"),
    ({"params": {"x_proj_weight": torch.zeros(8, 8)}}, r"x_proj_weight must have shape \[9, 8\]"),
    ({"params": {"D": torch.zeros(8, device="meta")}}, "D is on meta, xz on cpu"),
])
def test_arguments_that_disagree(change, message):
    params = BranchParams(*(p.float() for p in params_of(8, 4, 1)))
    arguments = {"xz": torch.zeros(2, 5, 16), **change}
    arguments["params"] = params._replace(**change.get("params", {}))
    with pytest.raises(ValueError, match=message):
        ssm_branch(**arguments)


def test_directions_that_disagree():
    xz, params = torch.zeros(2, 5, 16), BranchParams(*(p.float() for p in params_of(8, 4, 1)))
    other = BranchParams(*(p.float() for p in params_of(8, 5, 1)))
    with pytest.raises(ValueError, match="forward and .* backward"):
        bidirectional_ssm(xz, params, other)
    with pytest.raises(ValueError, match=r"gates must have shape \[2, 2\]"):
        bidirectional_ssm(xz, params, params, gates=torch.ones(2))


@pytest.mark.parametrize("name, dtype, width, message", [
    ("fpga", torch.float32, 4, "DYVM_BACKEND=fpga: no such backend"),
    ("cpu", torch.float64, 4, "DYVM_BACKEND=cpu: takes float32"),
    ("cpu", torch.float32, 3, "DYVM_BACKEND=cpu: takes a convolution of width 4"),
])
def test_forced_backend_that_cannot(monkeypatch, name, dtype, width, message):
    monkeypatch.setenv("DYVM_BACKEND", name)
    params = BranchParams(*(p.to(dtype) for p in params_of(8, 4, 1, width=width)))
    with pytest.raises(BackendError, match=message):
        ssm_branch(torch.zeros(1, 3, 16, dtype=dtype), params)


def test_unforced_choice_takes_what_fits(monkeypatch):
    monkeypatch.delenv("DYVM_BACKEND", raising=False)
    xz = torch.zeros(1, 3, 16, dtype=torch.float64)
    assert selective_scan.backend_for(xz, params_of(8, 4, 1)) == "torch"


# ---- the build of the CPU backend

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


# ---- residual add + RMSNorm

@pytest.mark.parametrize("first", ["both", "no residual", "no hidden"])
def test_add_rms_norm(first):
    tensors = [torch.randn(2, 5, 12, dtype=torch.float64) for _ in range(2)]
    hidden = None if first == "no hidden" else tensors[0].requires_grad_()
    residual = None if first == "no residual" else tensors[1].requires_grad_()
    weight = torch.rand(12, dtype=torch.float64, requires_grad=True)
    normed, total = add_rms_norm(hidden, residual, weight, 1e-5)
    expected = sum(t for t in (hidden, residual) if t is not None)
    assert torch.equal(total, expected)
    assert torch.allclose(normed, torch.nn.functional.rms_norm(expected, (12,), weight, 1e-5))
    with torch.no_grad():
        torch.testing.assert_close(add_rms_norm(hidden, residual, weight, 1e-5), (normed, total))
    leaves = [t for t in (hidden, residual, weight) if t is not None]
    assert torch.autograd.gradcheck(
        lambda *given: add_rms_norm(given[0] if hidden is not None else None,
                                    given[-2] if residual is not None else None, given[-1]), leaves)


def test_add_rms_norm_types():
    hidden, residual, weight = torch.randn(2, 5, 12).bfloat16(), torch.randn(2, 5, 12), torch.rand(12)
    normed, total = add_rms_norm(hidden, residual, weight)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        normed, total = add_rms_norm(residual, residual, weight)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="hidden, residual or both"):
        add_rms_norm(None, None, weight)
    with pytest.raises(ValueError, match="one shape"):
        add_rms_norm(hidden[:, :3], residual, weight)
    with pytest.raises(ValueError, match=r"weight must have shape \[12\]"):
        add_rms_norm(hidden, residual, weight[:5])
