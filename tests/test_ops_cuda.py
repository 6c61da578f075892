"""scan_backward.cu, the scan's backward pass in CUDA C++, run on the CPU thread by thread.

Alone, against the plain definition in float64 and its gradient by autograd; and, in Triton's
interpreter, in the place of Triton's kernel.
"""

import functools
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from helpers.kernels import INTERPRETED, compare, draw_params, run_interpreted  # noqa: E402
from helpers.warp import emulators  # noqa: E402

from ops.selective_scan import bidirectional_ssm, ssm_branch  # noqa: E402
from ops.selective_scan.gpu import cuda  # noqa: E402
from ops.selective_scan.gpu.kernels.common import CHUNK  # noqa: E402
from ops.selective_scan.gpu.scan_gradient import Given, Result  # noqa: E402

N, R = 16, 3

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return emulators(tmp_path_factory.mktemp("emulator"))


def tokens(given: Given, direction: int, image: int) -> int:
    L = given.u.shape[2]
    if given.active is not None and not given.active[image, direction]:
        return 0
    return L if given.lengths is None else min(max(int(given.lengths[image]), 0), L)


WEIGHTS = ("A", "D", "dt_bias")


def walk(given: Given, leaves: dict, direction: int, image: int):
    """Outputs [n, E] of one direction of an image, in order of time, and the states before every
    chunk but the first, by the definition.
    """
    A, D, bias = (leaves[name][direction] for name in WEIGHTS)
    n = tokens(given, direction, image)
    order = range(n)
    if (given.reverse if given.u.shape[0] == 1 else direction == 1) and n:
        order = reversed(order)
    h, outputs, states = torch.zeros(N, A.shape[1], dtype=torch.float64), {}, []
    for s, t in enumerate(order):
        if s % CHUNK == 0 and s > 0:
            states.append(h.detach())
        delta = torch.nn.functional.softplus(leaves["dt"][direction, image, t] + bias)
        if given.mask is not None:
            delta = delta * leaves["mask"][image, t]
        u, row = leaves["u"][direction, image, t], leaves["bc"][direction, image, t]
        h = torch.exp(delta * A) * h + delta * u * row[:N, None]
        outputs[t] = (h * row[N:, None]).sum(0) + D * u
    return [outputs[t] for t in range(n)], states


def reference(given: Given) -> tuple[Given, Result]:
    """The same arguments with the states filled in, and the wanted sums in float64."""

    def leaf(tensor):
        return None if tensor is None else tensor.detach().double().requires_grad_()

    names = ("u", "dt", "bc", "mask", "gates", *WEIGHTS)
    leaves = {name: leaf(getattr(given, name)) for name in names}
    G, B, L, E = given.u.shape
    total = torch.zeros((), dtype=torch.float64)
    states = torch.full((G, B, max(-(-L // CHUNK) - 1, 0), N, E), torch.nan)
    for direction in range(G):
        for image in range(B):
            outputs, kept = walk(given, leaves, direction, image)
            if kept:
                states[direction, image, : len(kept)] = torch.stack(kept).float()
            if outputs:
                gate = 1 if given.gates is None else leaves["gates"][image, direction]
                g = given.grad_y[image, : len(outputs)].double()
                total = total + (torch.stack(outputs) * g * gate).sum()
    if total.requires_grad:
        total.backward()

    def grad(tensor):
        return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad

    return given._replace(states=states), Result(
        grad(leaves["u"]),
        grad(leaves["dt"]),
        grad(leaves["bc"]),
        grad(leaves["A"]),
        torch.stack([grad(leaves["D"]), grad(leaves["dt_bias"])], dim=1),
        None if given.gates is None else grad(leaves["gates"])[:, :G].t(),
        None if given.mask is None else grad(leaves["mask"]),
    )


def summed(result: Result, given: Given) -> Result:
    """Partial sums added up, in float64."""
    wide = Result(*(None if tensor is None else tensor.double() for tensor in result))
    return wide._replace(
        bc=wide.bc.sum(0),
        A=wide.A.sum(1),
        channel=wide.channel.sum(1),
        gate=None if given.gates is None else wide.gate.sum(-1),
        mask=None if wide.mask is None else wide.mask.sum((0, 1)),
    )


def draw(B, L, E, G=2, dtype=torch.float32, mask=False, gates=False, reverse=False, **routing):
    """Arguments that have no states yet; rows of bc that are not aligned."""
    torch.manual_seed(0)
    return Given(
        torch.randn(B, L, E).to(dtype),
        torch.randn(G, B, L, E).to(dtype),
        torch.randn(G, B, L, E).to(dtype),
        torch.randn(G, B, L, R + 2 * N).to(dtype)[..., R:],
        torch.rand(B, L) if mask else None,
        routing.get("lengths"),
        routing.get("active"),
        torch.randn(B, 2) if gates else None,
        -torch.exp(2 * torch.rand(G, N, E)),
        torch.randn(G, E),
        torch.randn(G, E) - 3,
        torch.empty(0),
        reverse,
    )


def check(emulator, given: Given) -> Result:
    """All results against the reference; relative by norm, absolute where zero is wanted. Gives the
    sums.
    """
    given, wanted = reference(given)
    found = cuda._run(emulator(given), given)
    sums = summed(found, given)
    errors = {}
    for name, value, correct, stored in zip(Result._fields, sums, wanted, found, strict=True):
        if correct is not None:
            scale = correct.norm()
            error = ((value - correct).norm() / (scale if scale > 0 else 1)).item()
            # Rounding to 16 bits is half an epsilon at most, a fifth on average; cutting off twice.
            exact = stored.dtype == torch.float32
            errors[name] = error / (5e-7 if exact else torch.finfo(stored.dtype).eps / 3)
    assert all(value < 1 for value in errors.values()), errors
    return sums


@pytest.mark.parametrize("E", [8, 32, 40, 72])
@pytest.mark.parametrize("L", [1, 31, 32, 33, 70])
def test_sizes(L, E, emulator):
    check(emulator, draw(1, L, E))


ACTIVE = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0]])
LENGTHS = torch.tensor([70, 33, 999, -5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("G, reverse", [(2, False), (1, False), (1, True)])
def test_everything_at_once(G, reverse, dtype, emulator):
    routing = {"lengths": LENGTHS, "active": ACTIVE[:, :G] != 0}
    check(emulator, draw(4, 40, 40, G, dtype, True, True, reverse, **routing))


@pytest.mark.parametrize("given", ["mask", "gates", "lengths", "active"])
def test_one_thing_alone(given, emulator):
    """An image that is off in both directions has no gradient at all."""
    values = {"mask": True, "gates": True, "lengths": LENGTHS, "active": ACTIVE.bool()}
    sums = check(emulator, draw(4, 35, 8, **{given: values[given]}))
    off = {"lengths": 3, "active": 3}.get(given)
    if off is not None:
        assert not sums.u[:, off].any() and not sums.dt[:, off].any() and not sums.bc[:, off].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_lengths_and_active_of_other_types(dtype, emulator):
    """Neither they nor weights of 16 bits need be what the kernel reads, nor lie in order."""
    lengths = torch.tensor([3, 5, 0], dtype=dtype)
    for active in (
        torch.tensor([[0.5, 0, 2], [-1, 1, 0.0]]).t(),
        torch.tensor([[1, 2], [0, 1], [1, 0]]),
    ):
        given = draw(3, 5, 8, mask=True, gates=True, lengths=lengths, active=active)
        half = {name: getattr(given, name).half() for name in WEIGHTS}
        check(emulator, given._replace(**half, gates=given.gates.bfloat16()))


def test_what_is_off_is_not_read(emulator):
    given = draw(2, 33, 8, mask=True, gates=True, lengths=torch.tensor([33, 20]))
    given = given._replace(active=torch.tensor([[True, False], [True, True]]))
    for tensor in (given.u, given.dt, given.bc):
        tensor[1, 0] = tensor[:, 1, 20:] = torch.nan
    given.grad_y[1, 20:] = given.mask[1, 20:] = given.gates[0, 1] = torch.nan
    given, _ = reference(given)
    found = cuda._run(emulator(given), given)
    for name, tensor in found._asdict().items():
        assert tensor.isfinite().all(), name
    assert not found.A[1, 0].any() and not found.channel[1, 0].any() and not found.gate[1, 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["u", "dt", "bc", "grad_y"])
def test_nan(where, dtype, emulator):
    """It comes out where the definition has it, and stays in its image."""
    given = draw(2, 33, 40, G=1, dtype=dtype, mask=True, gates=True)
    tensor = getattr(given, where)
    tensor[(0, 0, 20, 7) if where != "grad_y" else (0, 20, 7)] = torch.nan
    given, wanted = reference(given)
    found = cuda._run(emulator(given), given)
    assert found.u[:, 1].isfinite().all() and found.A[:, 1].isfinite().all()
    sums = summed(found, given)
    for name, value, correct in zip(Result._fields, sums, wanted, strict=True):
        assert value[correct.isnan()].isnan().all(), name
    assert wanted.bc.isnan().any()


def test_nan_whose_bits_are_all_ones(emulator):
    """Rounded up to bfloat16 it would be a zero."""
    given = draw(1, 3, 8, G=1, dtype=torch.bfloat16)
    given.D.view(torch.int32)[0, 2] = 0x7FFFFFFF
    given, _ = reference(given)
    found = cuda._run(emulator(given), given)
    assert found.u[..., 2].isnan().all() and found.u.isnan().sum() == 3


def test_tiny_steps(emulator):
    """No digits are lost where softplus is 1e-6, nor where it is the projected step itself."""
    given = draw(1, 33, 32)
    given.dt.mul_(0.1)
    given.dt_bias[0], given.dt_bias[1, :16], given.dt_bias[1, 16:] = -14, -6, 30
    check(emulator, given)
    given, wanted = reference(given)
    found = cuda._run(emulator(given), given)
    error = (found.dt.double() - wanted.dt).norm(dim=2) / wanted.dt.norm(dim=2)  # of each channel
    assert error.max() < 14 * torch.finfo(torch.float32).eps  # e^-14, its exponent once rounded


def test_loss_scale_of_float16(emulator):
    """Sums over channels beyond the largest float16 do not overflow on the way."""
    given = draw(1, 33, 64, dtype=torch.float16)
    given, _ = reference(given._replace(grad_y=given.grad_y * 16))
    large = given._replace(grad_y=given.grad_y * 512)
    small_sums, sums = (summed(cuda._run(emulator(g), g), g).bc for g in (given, large))
    assert sums.abs().max() > 65504
    torch.testing.assert_close(sums, 512 * small_sums, rtol=1e-5, atol=1e-2)


def interpreted(test):
    """A test in Triton's interpreter, which must be switched on before kernels are imported."""
    return pytest.mark.skipif(not INTERPRETED, reason="runs in test_in_the_interpreter")(test)


@pytest.fixture
def emulated(emulator, monkeypatch):
    """The backward pass runs on the emulator; gives its calls."""
    calls = []

    def kernel(given):
        calls.append(given)
        return emulator(given)

    monkeypatch.setattr(cuda, "takes", cuda.problem.refusal)
    monkeypatch.setattr(cuda, "_kernel", kernel)
    return calls


@interpreted
@pytest.mark.parametrize(
    "dtype, masked",
    [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)],
)
def test_interpreted_proof(dtype, masked, emulator):
    """The kernel and Triton's agree."""

    def run(given):
        return cuda._run(emulator(given), given)

    assert cuda.proof.disagreement(run, dtype, masked, torch.device("cpu")) is None


@interpreted
def test_interpreted_proof_of_a_wrong_kernel(emulator):
    """One that is wrong in a single direction is found out."""

    def run(given):
        result = cuda._run(emulator(given), given)
        result.bc[:, 1] *= 1.05
        return result

    reason = cuda.proof.disagreement(run, torch.bfloat16, False, torch.device("cpu"))
    assert "its gradient of bc differs" in reason


@interpreted
@pytest.mark.parametrize("in_place", [False, True])
def test_interpreted_whole_pass(in_place, emulated, monkeypatch):
    torch.manual_seed(0)
    B, L, E = 2, 34, 20
    inputs = {
        "xz": torch.randn(B, L, 2 * E),
        "forward": draw_params(E, N, R),
        "backward": draw_params(E, N, R),
        "mask": (torch.rand(B, L) < 0.6).float(),
        "gates": torch.rand(B, 2),
    }
    routing = {
        "active": torch.tensor([[True, True], [False, True]]),
        "lengths": torch.tensor([L - 1, L + 9]),
    }
    compare(
        lambda **given: bidirectional_ssm(**given, **routing, scale=0.5, in_place=in_place),
        inputs,
        5e-6,
        monkeypatch,
    )
    assert [given.u.shape for given in emulated] == [(2, B, L, E)]


@interpreted
def test_interpreted_one_direction(emulated, monkeypatch):
    torch.manual_seed(0)
    inputs = {"xz": torch.randn(1, 7, 80), "params": draw_params(40, N, R)}
    compare(lambda **given: ssm_branch(**given, reverse=True), inputs, 5e-6, monkeypatch)
    assert [given.reverse for given in emulated] == [True]


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_gpu_proof(masked, dtype):
    """What runs there is the kernel, compiled for the device, and it agrees with Triton's."""
    device = torch.device("cuda", torch.cuda.current_device())
    kernel = cuda._load(cuda.proof.small_problem(dtype, masked, device))
    run = functools.partial(cuda._run, kernel)
    assert cuda.proof.disagreement(run, dtype, masked, device) is None


@pytest.mark.skipif(INTERPRETED, reason="the tests run in this process")
def test_in_the_interpreter():
    run_interpreted(Path(__file__), "test_interpreted")
