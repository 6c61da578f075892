"""Every selective scan backend that runs here against the float64 definition: outputs and every
gradient.

B images, L tokens, E inner channels, N states, R step rank.
"""

import os

import pytest
import torch
from helpers.scans import params_of

from ops import selective_scan
from ops.selective_scan import BranchParams, bidirectional_ssm, ssm_branch

BACKENDS = [name for name in selective_scan.PREFERENCE if name != "reference"]
ON_CUDA = ("triton", "mamba_ssm")
#        B, L, E, N, R
SIZES = [
    (3, 1, 8, 4, 1),
    (2, 2, 12, 8, 2),
    (3, 17, 20, 16, 3),
    (2, 63, 36, 21, 4),
    (2, 197, 24, 16, 2),
    (2, 19, 150, 4, 13),  # more channels and a higher rank than the CPU kernels take at a time
]
# Of a tensor's largest element; float32 has 6e-8 and errors add up over 197 steps.
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty gives NaN, so that an element which nobody wrote shows."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would refuse
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.gpu) if name in ON_CUDA else name for name in BACKENDS
    ]
)
def backend(request, monkeypatch):
    """Forces each backend in turn; its device, or a skip that says why it does not run here."""
    device = "cuda" if request.param in ON_CUDA else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{request.param}: no CUDA device")
    skip_unless_taken(request.param, device, 4)
    monkeypatch.setenv("DYVM_BACKEND", request.param)
    return device


def skip_unless_taken(backend, device, states):
    """In float32: float64, in which `params_of` draws, is not what the fused kernels are for."""
    params = BranchParams(*(p.float() for p in params_of(8, states, 1)))
    reason = selective_scan._refusal(backend, torch.zeros(1, 1, 16, device=device), params)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def prefix_mask(images, tokens):
    kept = torch.tensor([tokens // 2 + 1, tokens // 3, tokens])[:images]
    return (torch.arange(tokens) < kept[:, None]).double()


def random_mask(images, tokens):
    mask = torch.rand(images, tokens, dtype=torch.float64)
    return torch.where(mask < 0.3, 0, mask)


def binary_mask(images, tokens):
    """Some tokens, none, all."""
    share = torch.tensor([0.5, 0.0, 1.0])[:images, None]
    return (torch.rand(images, tokens) < share).double()


def evaluate(monkeypatch, backend, call, device, dtype, tensors, options, behind=None):
    """Output and gradients of `call` on copies of `tensors` (a dict; BranchParams count as seven
    tensors).
    """
    monkeypatch.setenv("DYVM_BACKEND", backend)
    # Threads matter to the C++ kernels alone; elsewhere they only spin between thousands of small
    # operations.
    torch.set_num_threads(2 if backend == "cpu" else 1)
    leaves = []

    def copy(value):
        if isinstance(value, BranchParams):
            return BranchParams(*map(copy, value))
        leaves.append(value.detach().clone().to(device, dtype).requires_grad_())
        return leaves[-1]

    arguments = {name: copy(value) for name, value in tensors.items()}
    options = {
        name: value.to(device) if torch.is_tensor(value) else value
        for name, value in options.items()
    }
    y = call(**arguments, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if behind is not None:
        weights = weights * behind[..., None]
    y.backward(weights.to(device, y.dtype))
    return [y.detach()] + [
        torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves
    ]


def assert_close(actual, expected, tolerance=TOLERANCE):
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        if e.numel():
            error = (a.cpu().double() - e).abs().max().item()
            assert error <= tolerance * e.abs().max().item(), (
                f"tensor {index}: {error} of {e.abs().max().item()}"
            )


def compare(monkeypatch, device, call, tensors, options, behind=None):
    name = os.environ["DYVM_BACKEND"]
    skip_unless_taken(
        name, device, next(t.A.shape[1] for t in tensors.values() if isinstance(t, BranchParams))
    )
    actual = evaluate(monkeypatch, name, call, device, torch.float32, tensors, options, behind)
    expected = evaluate(
        monkeypatch, "reference", call, "cpu", torch.float64, tensors, options, behind
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "case", ["plain", "mask", "prefix", "active", "lengths", "all", "in place", "in place, all"]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_branch(backend, monkeypatch, size, case, reverse):
    images, tokens, channels, states, rank = size
    torch.manual_seed(0)
    tensors = {
        "xz": torch.randn(images, tokens, 2 * channels, dtype=torch.float64),
        "params": params_of(channels, states, rank),
    }
    if case in ("mask", "all"):
        tensors["mask"] = random_mask(images, tokens)
    if case == "prefix":
        tensors["mask"] = prefix_mask(images, tokens)
    options = {"reverse": reverse, "in_place": case.startswith("in place")}
    if options["in_place"]:
        tensors["mask"] = binary_mask(images, tokens)
    if case in ("active", "all", "in place, all"):
        options["active"] = torch.tensor([True, False, True])[:images]
    if case in ("lengths", "all", "in place, all"):
        options["lengths"] = torch.tensor([tokens // 2 + 1, 0, tokens])[:images]
    compare(monkeypatch, backend, ssm_branch, tensors, options)


@pytest.mark.parametrize("size", SIZES[1:4], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "gates",
        "prefix",
        "prefix, nothing behind",
        "active",
        "all",
        "in place",
        "in place, all",
    ],
)
def test_both_directions(backend, monkeypatch, size, case):
    images, tokens, channels, states, rank = size
    torch.manual_seed(0)
    tensors = {
        "xz": torch.randn(images, tokens, 2 * channels, dtype=torch.float64),
        "forward": params_of(channels, states, rank),
        "backward": params_of(channels, states, rank, seed=1),
    }
    options, behind = {"scale": 0.5, "in_place": case.startswith("in place")}, None
    if options["in_place"]:
        tensors["mask"] = binary_mask(images, tokens)
    if case in ("gates", "all", "in place, all"):
        tensors["gates"] = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, 0.0]], dtype=torch.float64)[
            :images
        ]
    if case.startswith("prefix"):
        tensors["mask"] = prefix_mask(images, tokens)
        behind = tensors["mask"] if "nothing" in case else None
    if case in ("active", "all", "in place, all"):
        options["active"] = torch.tensor([[True, False], [True, True], [False, False]])[:images]
    if case == "all":
        tensors["mask"] = random_mask(images, tokens)
    if case in ("all", "in place, all"):
        options["lengths"] = torch.tensor([tokens // 2 + 1, tokens, 1])[:images]
    compare(monkeypatch, backend, bidirectional_ssm, tensors, options, behind)


def test_large_steps_and_decays(backend, monkeypatch):
    """exp(delta A) underflows: the result is that of a state forgotten at once, not garbage."""
    params = params_of(16, 16, 2)
    tensors = {
        "xz": torch.randn(2, 20, 32, dtype=torch.float64) * 3,
        "params": params._replace(dt_proj_bias=params.dt_proj_bias + 30, A=params.A * 20),
    }
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


@pytest.mark.parametrize("in_place", [False, True])
def test_non_contiguous_arguments(backend, monkeypatch, in_place):
    tensors = {
        "xz": torch.randn(2, 18, 80, dtype=torch.float64)[:, ::2, ::2],
        "params": BranchParams(*(torch.stack((p, p), -1)[..., 0] for p in params_of(20, 8, 2))),
        "mask": random_mask(9, 2).t(),
    }
    options = {
        "lengths": torch.tensor([[9, 0], [5, 0]])[:, 0],
        "active": torch.tensor([[True, True], [False, True]]),
    }

    def strided(xz, params, mask, lengths, active):
        """The copies that `evaluate` makes are dense; this brings the strides back."""
        xz = xz.transpose(1, 2).contiguous().transpose(1, 2)
        params = BranchParams(*(torch.stack((p, p), -1)[..., 0] for p in params))
        return bidirectional_ssm(
            xz,
            params,
            params,
            mask=mask.t().contiguous().t(),
            lengths=lengths,
            active=active.t().contiguous().t(),
            in_place=in_place,
        )

    compare(monkeypatch, backend, strided, tensors, options)


@pytest.mark.parametrize("images, tokens", [(0, 5), (2, 0), (0, 0)])
def test_no_images_or_no_tokens(backend, images, tokens):
    xz = torch.randn(images, tokens, 16, device=backend, requires_grad=True)
    params = BranchParams(*(p.float().to(backend).requires_grad_() for p in params_of(8, 4, 1)))
    mask = torch.ones(images, tokens, device=backend, requires_grad=True)
    for y in (
        ssm_branch(xz, params, mask=mask),
        ssm_branch(xz, params, mask=mask, in_place=True),
        bidirectional_ssm(
            xz, params, params, mask=mask, gates=torch.ones(images, 2, device=backend)
        ),
    ):
        assert y.shape == (images, tokens, 8)
        y.sum().backward()
    assert xz.grad.shape == xz.shape
    assert all(p.grad is None or not p.grad.any() for p in params)


def test_no_channels(backend):
    xz = torch.randn(2, 5, 0, device=backend, requires_grad=True)
    params = BranchParams(
        *(
            torch.zeros(shape, device=backend, requires_grad=True)
            for shape in ((0, 4), (0,), (9, 0), (0, 1), (0,), (0, 4), (0,))
        )
    )
    y = bidirectional_ssm(xz, params, params)
    y.sum().backward()
    assert y.shape == (2, 5, 0) and xz.grad.shape == xz.shape


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
        assert (
            y[0, 20:].isnan().all()
        )  # the state of every channel reads B, a sum over all channels
        switched_off = ssm_branch(xz, params, active=torch.tensor([False, True], device=backend))
        assert not switched_off[0].any()
        # PyTorch's products may depend on the number of images, as they do held to AVX2.
        torch.testing.assert_close(switched_off[1], y[1])


@pytest.mark.parametrize("reverse", [False, True])
def test_nan_behind_the_last_visible_token(backend, reverse):
    """May show or not, and changes nothing but to NaN; in between, or before, it does show."""
    xz, mask = (
        torch.randn(1, 6, 16, device=backend),
        torch.tensor([[1.0, 0, 1, 0, 0, 0]], device=backend),
    )
    params = BranchParams(*(p.float().to(backend) for p in params_of(8, 4, 1)))
    clean = ssm_branch(xz, params, mask=mask, reverse=reverse)
    behind, between = xz.clone(), xz.clone()
    behind[0, 5, 0] = between[0, 1, 0] = float("nan")
    y = ssm_branch(behind, params, mask=mask, reverse=reverse)
    assert torch.allclose(y[~y.isnan()], clean[~y.isnan()], atol=1e-6)
    assert ssm_branch(between, params, mask=mask, reverse=reverse)[0, 1].isnan().all()


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


@pytest.mark.parametrize(
    "size", [(5, 7, 3), (48, 16, 24), (70, 33, 9)]
)  # up to two panels of the projection
@pytest.mark.parametrize(
    "options",
    [(), ("mask",), ("active",), ("lengths", "mask", "active"), ("lengths", "mask", "in place")],
)
def test_inference_shares_out_images_or_their_parts_with_one_result(size, options, monkeypatch):
    """To the last bit, for any number of images and threads; and nearly that of a forward pass that
    keeps states.
    """
    reason = selective_scan._refusal("cpu", torch.zeros(1, 1, 16), params_of(8, 4, 1))
    if reason:
        pytest.skip(f"cpu: {reason}")
    monkeypatch.setenv("DYVM_BACKEND", "cpu")
    (channels, states, rank), images, tokens = size, 6, 61
    generator = torch.Generator().manual_seed(1)
    params = [
        BranchParams(*(tensor.float() for tensor in params_of(channels, states, rank, seed)))
        for seed in (2, 3)
    ]
    xz = torch.randn(images, tokens, 2 * channels, generator=generator)
    given = {
        "mask": (torch.rand(images, tokens, generator=generator) < 0.7).float(),
        "active": torch.rand(images, 2, generator=generator) < 0.6,
        "lengths": torch.randint(1, tokens + 1, (images,), generator=generator),
    }
    given = {name: given[name] for name in options if name in given}
    in_place = "in place" in options

    def run(part: slice, threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return bidirectional_ssm(
                xz[part],
                *params,
                **{name: value[part] for name, value in given.items()},
                in_place=in_place,
            )
        finally:
            torch.set_num_threads(before)

    whole = run(slice(None), 1)
    for count, threads in ((6, 2), (5, 2), (1, 2), (1, 1), (3, 3), (4, 3)):
        assert torch.equal(run(slice(count), threads), whole[:count]), (count, threads)
    trained = bidirectional_ssm(xz.requires_grad_(), *params, **given, in_place=in_place)
    assert trained.requires_grad
    torch.testing.assert_close(trained.detach(), whole, rtol=1e-5, atol=1e-5)
