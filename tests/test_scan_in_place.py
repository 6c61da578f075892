"""A mask in place: what it means, and what its gradient is.

Kept tokens get what they would get if the dropped ones were taken out. The mask's gradient is (a)
that through the step size plus (b), for the windows of kept tokens, the difference that a token
makes there. That all backends agree is in `test_ops.py`.

B images, L tokens, E inner channels, N states, R step rank, W convolution width, d width.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.scans import params_of
from torch import Tensor, nn

from models.layouts import take
from models.mixer import BidirectionalMamba, Layer
from models.pruning import kept_first
from ops import selective_scan
from ops.selective_scan import BranchParams, bidirectional_ssm, reference, ssm_branch, windows

B, L, E, N, R = 3, 19, 6, 3, 2


@pytest.fixture(params=["reference", "torch", "cpu"])
def precision(request, monkeypatch):
    """Forces each backend in turn; the type that it computes in and the error it may have."""
    dtype, error = (torch.float32, 2e-5) if request.param == "cpu" else (torch.float64, 1e-12)
    params = BranchParams(*(t.to(dtype) for t in params_of(E, N, R)))
    reason = selective_scan._refusal(request.param, torch.zeros(1, 1, 2 * E, dtype=dtype), params)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setenv("DYVM_BACKEND", request.param)
    return dtype, error


def weights(dtype: torch.dtype = torch.float64) -> list[BranchParams]:
    return [
        BranchParams(*(t.to(dtype).requires_grad_() for t in params_of(E, N, R, seed)))
        for seed in (0, 1)
    ]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """xz [B, L, 2E], and a mask [B, L] that keeps some tokens, none, and all but one."""
    generator = torch.Generator().manual_seed(2)
    xz = torch.randn(B, L, 2 * E, generator=generator, dtype=torch.float64)
    mask = (torch.rand(B, L, generator=generator) < 0.5).double()
    mask[1], mask[2], mask[2, 7] = 0, 1, 0
    return xz.to(dtype), mask.to(dtype)


def assert_close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max().clamp(min=1)


def test_kept_tokens_see_the_sequence_without_dropped_ones(precision):
    """Values, and the gradients of x and of the weights; dropped tokens receive none."""
    dtype, error = precision
    (xz, mask), params = inputs(dtype), weights(dtype)
    leaves = [xz.requires_grad_(), *(t for branch in params for t in branch)]
    y = bidirectional_ssm(xz, *params, mask=mask, in_place=True, scale=0.5)
    removed = torch.zeros_like(y)
    for image, kept in enumerate(mask > 0.5):
        if kept.any():
            short = bidirectional_ssm(xz[image : image + 1, kept], *params, scale=0.5)
            removed[image, kept] = short[0]
    weight = torch.randn(y.shape, dtype=dtype) * mask.unsqueeze(-1)
    assert_close([y * mask.unsqueeze(-1)], [removed], error)
    in_place, physical = (torch.autograd.grad((v * weight).sum(), leaves) for v in (y, removed))
    assert_close(in_place, physical, 10 * error)
    assert not in_place[0][mask == 0].any()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_dropped_token_reads_the_state_that_passes(precision, reverse):
    """From the kept tokens before it alone, without its own input."""
    dtype, error = precision
    (xz, mask), params = inputs(dtype), weights(dtype)[0]
    xz, mask = xz[:1], mask[:1]
    y = ssm_branch(xz, params, reverse=reverse, mask=mask, in_place=True)
    kept, dropped = (t.nonzero()[:, 0].tolist() for t in (mask[0] > 0.5, mask[0] < 0.5))
    token = dropped[1] if reverse else dropped[-2]
    seen = [t for t in reversed(kept) if t > token] if reverse else [t for t in kept if t < token]
    assert len(seen) > 4
    x, z = (half.mT for half in xz[:, [*seen, token]].chunk(2, dim=-1))
    u = reference.causal_conv1d(x, params.conv_weight, params.conv_bias, "silu")
    step, B_, C = (params.x_proj_weight @ u).split([R, N, N], dim=1)
    u_, step, B_, C_ = (t[..., :-1] for t in (u, params.dt_proj_weight @ step, B_, C))
    _, state = reference.selective_scan(
        u_, step, params.A, B_, C_, delta_bias=params.dt_proj_bias, delta_softplus=True
    )
    passing = (state * C[:, None, :, -1]).sum(-1) + params.D * u[..., -1]
    assert_close([y[:, token]], [passing * F.silu(z[..., -1])], error)


def test_nothing_dropped_is_no_mask(precision):
    dtype, error = precision
    (xz, _), params = inputs(dtype), weights(dtype)
    leaves = [xz.requires_grad_(), *(t for branch in params for t in branch)]
    results = []
    for given in ({}, {"mask": torch.ones(B, L, dtype=dtype), "in_place": True}):
        y = bidirectional_ssm(xz, *params, **given)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert_close(*results, 10 * error)


def test_kinds_of_masks(precision):
    """Booleans and integers, which have no gradient; and no mask: then in place means nothing."""
    dtype, _ = precision
    (xz, mask), params = inputs(dtype), weights(dtype)
    y = bidirectional_ssm(xz, *params, mask=mask, in_place=True)
    for kind in (torch.bool, torch.int64):
        assert torch.equal(bidirectional_ssm(xz, *params, mask=mask.to(kind), in_place=True), y)
    plain = bidirectional_ssm(xz, *params)
    assert torch.equal(bidirectional_ssm(xz, *params, in_place=True), plain)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_compiled(backend, monkeypatch):
    monkeypatch.setenv("DYVM_BACKEND", backend)
    if not selective_scan.runs_on(backend, "cpu"):
        pytest.skip(f"{backend} does not run here")
    torch.compiler.reset()
    (xz, mask), params = inputs(torch.float32), weights(torch.float32)
    leaves = [xz.requires_grad_(), mask.requires_grad_(), *params[0]]

    def run(xz, mask):
        return bidirectional_ssm(xz, *params, mask=mask, in_place=True)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y = function(xz, mask)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert_close(*results, 1e-5)
    torch.compiler.reset()


# ---- the mask's gradient, of the definition in float64


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setenv("DYVM_BACKEND", "reference")


def test_gradients_of_what_is_no_mask(exact):
    """Finite differences of the values."""
    (xz, mask), params = (t[:, 4:10] for t in inputs()), weights()

    def run(xz, *tensors):
        halves = BranchParams(*tensors[:7]), BranchParams(*tensors[7:])
        return bidirectional_ssm(xz, *halves, mask=mask, in_place=True)

    leaves = (xz.requires_grad_(), *params[0], *params[1])
    assert torch.autograd.gradcheck(run, leaves)


def test_the_gradient_through_the_step(exact):
    """Where convolutions read the token alone there are no windows: finite differences in the mask,
    of kept and of dropped tokens.
    """
    xz, mask = (t[:, :8] for t in inputs())
    params = []
    for branch in weights():
        taps = torch.zeros_like(branch.conv_weight)
        taps[:, -1] = 1
        params.append(branch._replace(conv_weight=taps))

    def run(mask):
        return bidirectional_ssm(xz, *params, mask=mask, in_place=True)

    assert torch.autograd.gradcheck(run, (mask.requires_grad_(),))
    y = run(mask)
    grad = torch.autograd.grad((y * torch.randn_like(y)).sum(), mask)[0]
    assert (grad[:2].abs() > 1e-6).all()


def window(x: Tensor, kept: list[bool], t: int, width: int) -> Tensor:
    """Rows [W, E] under a convolution at token t, the token itself last; x [L, E]."""
    before = [x[s] for s in range(t) if kept[s]][-(width - 1) :] if width > 1 else []
    missing = [torch.zeros_like(x[0])] * (width - 1 - len(before))
    return torch.stack([*missing, *before, x[t]])


def sums(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """The convolution of every token, window by window: [B, L, E]."""
    if reverse:
        return sums(x.flip(1), mask.flip(1), weight, bias, False).flip(1)
    rows = [
        [window(x[b], (mask[b] > 0.5).tolist(), t, weight.shape[1]) for t in range(x.shape[1])]
        for b in range(x.shape[0])
    ]
    return torch.stack([(torch.stack(image) * weight.t()).sum(1) + bias for image in rows])


def differences(x, mask, weight, bias, reverse, grad) -> Tensor:
    """[B, L]: of each token, grad [B, L, E] times what it changes in the sums of kept tokens but
    itself.
    """
    found = torch.zeros_like(mask)
    for t in range(x.shape[1]):
        others = (mask > 0.5) & (torch.arange(x.shape[1]) != t)
        values = []
        for flag in (0.0, 1.0):
            flipped = mask.clone()
            flipped[:, t] = flag
            values.append(sums(x, flipped, weight, bias, reverse))
        change = (values[1] - values[0]) * grad
        found[:, t] = (change.sum(-1) * others).sum(1)
    return found


@pytest.mark.parametrize("width", [4, 1, 6])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_gradient_through_the_windows(width, reverse):
    """Exactly what putting a token in, or taking it out, changes; of both implementations."""
    xz, mask = inputs()
    mask.requires_grad_()
    x, (weight, bias, *_) = xz[..., :E], params_of(E, N, R, width=width)
    grad = torch.randn(B, L, E, dtype=torch.float64)
    expected = differences(x, mask.detach(), weight, bias, reverse, grad)
    along = (x.flip(1), mask.flip(1)) if reverse else (x, mask)
    defined = reference.kept_conv1d(*along, weight, bias)
    for y in (
        defined.flip(1) if reverse else defined,
        windows.window_conv(x, mask, weight, bias, reverse),
    ):
        assert_close([y], [sums(x, mask, weight, bias, reverse)], 1e-12)
        if width == 1 and not y.requires_grad:
            continue
        found = torch.autograd.grad((y * grad).sum(), mask, allow_unused=width == 1)[0]
        assert_close([torch.zeros_like(mask) if found is None else found], [expected], 1e-12)
    assert width == 1 or (expected[0] != 0).sum() >= L - 4


@pytest.mark.parametrize("reverse", [False, True])
def test_the_whole_gradient_is_the_sum_of_both(exact, reverse):
    """Composed here from windows and a scan, step by step."""
    (xz, mask), params = inputs(), weights()[0]
    (x, z), leaf = xz.chunk(2, dim=-1), mask.clone().requires_grad_()
    conv = params.conv_weight.detach(), params.conv_bias.detach()
    before = sums(x, mask, *conv, reverse).requires_grad_()
    u = F.silu(before)
    step, B_, C = (u @ params.x_proj_weight.t()).split([R, N, N], dim=-1)
    delta = F.softplus(step @ params.dt_proj_weight.t() + params.dt_proj_bias)
    scanned = [u, delta * leaf.unsqueeze(-1), B_, C, z]
    u, delta, B_, C, z = ((v.flip(1) if reverse else v).mT for v in scanned)
    y = reference.selective_scan(u, delta, params.A, B_, C, params.D, z)[0].mT
    y = y.flip(1) if reverse else y
    weight = torch.randn_like(y)
    by_sums, by_step = torch.autograd.grad((y * weight).sum(), (before, leaf))
    expected = by_step + differences(x, mask, *conv, reverse, by_sums)

    mask.requires_grad_()
    actual = ssm_branch(xz, params, reverse=reverse, mask=mask, in_place=True)
    assert_close([actual], [y], 1e-12)
    assert_close(torch.autograd.grad((actual * weight).sum(), mask), [expected], 1e-11)


# ---- layers


WIDTH, CLASSES, CENTRE = 16, 10, 12


def layers_of(depth: int) -> nn.ModuleList:
    torch.manual_seed(0)
    mixers = (BidirectionalMamba(WIDTH, 4, halve=True) for _ in range(depth))
    return nn.ModuleList(Layer(mixer, WIDTH, nn.Identity()) for mixer in mixers).double().train()


def run(layers: nn.ModuleList, tokens: Tensor, mask: Tensor | None, in_place: bool) -> Tensor:
    hidden, residual = None, tokens
    for layer in layers:
        layer.mixer.mask_in_place = in_place
        hidden, residual, _ = layer(hidden, residual, (), mask)
    return hidden + residual


class Images:
    """Eight images of 25 random tokens, half of them kept, and the loss of what the central token,
    always kept, says of them.
    """

    def __init__(self):
        torch.manual_seed(1)
        self.tokens = torch.randn(8, 25, WIDTH, dtype=torch.float64)
        self.mask = (torch.rand(8, 25) < 0.5).double()
        self.mask[:, CENTRE] = 1
        self.head, self.target = torch.randn(WIDTH, CLASSES).double(), torch.randint(CLASSES, (8,))

    def losses(self, central: Tensor) -> Tensor:
        return F.cross_entropy(central @ self.head, self.target, reduction="none")

    def in_place(self, layers: nn.ModuleList, mask: Tensor) -> Tensor:
        return self.losses(run(layers, self.tokens, mask, True)[:, CENTRE])

    def rearranged(self, layers: nn.ModuleList, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The same by kept tokens in front of dropped ones; and the order [B, L]."""
        order, _ = kept_first(mask.detach())
        after = run(layers, take(self.tokens, order), take(mask, order), False)
        return self.losses(after[order == CENTRE]), order


@pytest.fixture
def on_torch(monkeypatch):
    monkeypatch.setenv("DYVM_BACKEND", "torch")


def test_layers_in_place_and_on_kept_tokens_alone(on_torch):
    """Also what score predictors may read of a mixer."""
    layers, images = layers_of(3), Images()
    after = run(layers, images.tokens, images.mask, True)
    seen = layers[0].mixer.scan_inputs(images.tokens, images.mask)
    for image, kept in enumerate(images.mask > 0.5):
        alone = images.tokens[image : image + 1, kept]
        assert_close([after[image, kept]], run(layers, alone, None, True), 1e-12)
        expected = layers[0].mixer.scan_inputs(alone)
        assert_close([t[image, kept] for t in seen], [t[0] for t in expected], 1e-12)


def test_the_rearranged_mask_tells_dropped_tokens_nothing(on_torch):
    """Its gradient is exactly zero for them, but for the W - 1 that the reversed convolution reads
    behind the kept ones; in place every dropped token has one.
    """
    layers, images = layers_of(2), Images()
    mask = images.mask.requires_grad_()
    losses, order = images.rearranged(layers, mask)
    in_place = images.in_place(layers, mask)
    assert_close([in_place], [losses], 1e-12)
    dropped = mask == 0
    grad = torch.autograd.grad(losses.sum(), mask)[0]
    behind = kept_first(mask.detach())[1].unsqueeze(1) + torch.arange(3)
    told = torch.zeros_like(dropped).scatter(1, order.gather(1, behind), True)
    assert torch.equal(grad != 0, ~dropped | told)
    assert (dropped & ~told).sum() > 50
    assert (torch.autograd.grad(in_place.sum(), mask)[0] != 0).all()


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def test_the_gradient_ranks_dropped_tokens(on_torch):
    """By what each would do to the loss if it were kept: rank correlation within an image."""
    layers, images = layers_of(2), Images()
    mask = images.mask.requires_grad_()
    before = images.in_place(layers, mask)
    grad = torch.autograd.grad(before.sum(), mask)[0]
    with torch.no_grad():
        kept = [mask.index_fill(1, torch.tensor([t]), 1.0) for t in range(25)]
        effect = torch.stack([images.in_place(layers, m) - before for m in kept], dim=1)
    found = [
        torch.corrcoef(torch.stack([ranks(g[m == 0]), ranks(e[m == 0])]))[0, 1]
        for g, e, m in zip(grad, effect, mask, strict=True)
    ]
    assert torch.stack(found).mean() > 0.7
