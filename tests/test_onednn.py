"""oneDNN's products in training, on machines where it is the faster library and on others."""

import pytest
import torch
import torch.nn.functional as F
from helpers.scans import params_of
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from ops import onednn
from ops.linear import Linear, linear
from ops.selective_scan import BranchParams, bidirectional_ssm

needs_onednn = pytest.mark.skipif(not onednn.works(), reason="PyTorch was built without oneDNN")


@pytest.fixture
def products(monkeypatch):
    """oneDNN is taken for the faster library; the list gets the sizes of its products."""
    sizes, product = [], onednn.product

    def counted(rows, weight, bias=None):
        sizes.append((*rows.shape, len(weight)))
        return product(rows, weight, bias)

    monkeypatch.setattr(onednn, "product", counted)
    monkeypatch.setattr(onednn.processor, "vendor", lambda: "AuthenticAMD")
    return sizes


def leaves(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def gradients(function, inputs, grad):
    return torch.autograd.grad(function(*inputs), inputs, grad)


@needs_onednn
@pytest.mark.parametrize(
    "shape, width", [((3, 5, 20), 7), ((2, 197, 48), 96), ((300, 96), 24), ((1, 1), 1)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", ["full", "expanded", "strided"])
def test_gradients_as_of_pytorch(products, shape, width, bias, grad):
    inputs = leaves(shape, (width, shape[-1]), *([(width,)] if bias else []))
    out = (*shape[:-1], width)
    incoming = {
        "full": lambda: torch.randn(out),
        "expanded": lambda: torch.ones(()).expand(out),  # as of a sum
        "strided": lambda: torch.randn(*out[:-1], 2 * width)[..., ::2],
    }[grad]()
    found, expected = (gradients(f, inputs, incoming) for f in (linear, F.linear))
    assert len(products) == 3
    assert found[1].stride() == inputs[1].stride()  # as DistributedDataParallel wants it
    torch.testing.assert_close(linear(*inputs), F.linear(*inputs), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-4)


@needs_onednn
def test_only_the_gradients_that_are_wanted(products):
    x, weight = leaves((9, 5), (4, 5))
    linear(x.detach(), weight).sum().backward()
    assert products == [(9, 5, 4), (4, 9, 5)]
    assert x.grad is None and weight.grad is not None


@needs_onednn
@pytest.mark.parametrize("shape, width", [((9, 1), 4), ((9, 4), 1)])
def test_strides_of_a_weights_gradient(products, shape, width):
    inputs = leaves(shape, (width, shape[1]))
    assert gradients(linear, inputs, torch.randn(9, width))[1].stride() == inputs[1].stride()


@needs_onednn
def test_biases_and_rows_of_odd_strides(products):
    x, weight, bias = leaves((9, 16), (4, 16), (8,))
    overlapping = torch.randn(1, 200).unfold(-1, 16, 8)
    for rows in (x, overlapping):
        for shift in (bias[::2], bias[:1].expand(4), bias[:1], None):
            torch.testing.assert_close(
                linear(rows, weight, shift), F.linear(rows, weight, shift), rtol=1e-5, atol=1e-5
            )
    given = weight, bias
    found, expected = (
        torch.autograd.grad(f(overlapping, weight, bias[::2]).pow(2).sum(), given)
        for f in (linear, F.linear)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)
    assert products


@needs_onednn
@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_only_what_a_gradient_needs_is_kept(products, frozen):
    x, weight, bias = leaves((9, 5), (4, 5), (4,))
    x.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "x")
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: sizes.append(tuple(each.shape)) or each, lambda each: each
    ):
        linear(x, weight, bias).sum().backward()
    assert sizes == {"x": [(9, 5)], "weight": [(4, 5)], "both": []}[frozen]
    assert products and bias.grad is not None


@needs_onednn
def test_operations_of_the_way_back_are_counted(products):
    x, weight = leaves((9, 5), (4, 5))
    out = linear(x, weight)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * 5 * 4


@needs_onednn
def test_the_same_bits_every_time(products):
    inputs, grad = leaves((394, 192), (768, 192)), torch.randn(394, 768)
    first = gradients(linear, inputs, grad)
    for _ in range(5):
        assert all(map(torch.equal, gradients(linear, inputs, grad), first))


@needs_onednn
def test_second_derivatives(products):
    def penalty(function):
        inputs = leaves((6, 5), (4, 5), (4,))
        first = torch.autograd.grad(function(*inputs).pow(2).sum(), inputs[0], create_graph=True)[0]
        return torch.autograd.grad(first.pow(2).sum(), inputs)

    for ours, theirs in zip(penalty(linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert products


@needs_onednn
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_what_pytorch_does_itself(products, monkeypatch):
    x, weight = leaves((9, 5), (4, 5))
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            linear(x.double(), weight.double())
            linear(x[:0], weight)
            torch.testing.assert_close(linear(x.to_sparse(), weight), F.linear(x, weight))
            with torch.autocast("cpu", torch.bfloat16):
                assert Linear(5, 4)(x).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 9 * 5 * 4
    with torch.enable_grad():
        linear(x.detach(), weight.detach())  # nothing asks for a gradient
    sparse = weight.detach().to_sparse_csr()
    torch.testing.assert_close(linear(x, sparse), F.linear(x, sparse))
    with torch.no_grad():
        tangent = torch.func.jvp(lambda x: linear(x, weight), (x,), (torch.ones_like(x),))[1]
        torch.testing.assert_close(tangent, F.linear(torch.ones(9, 5), weight))
        assert linear(x, weight[:0]).shape == (9, 0)
    torch.func.grad(lambda w: linear(x, w).sum())(weight)
    torch.func.vmap(lambda row: linear(row[None], weight))(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        torch.testing.assert_close(
            forward_ad.unpack_dual(linear(dual, weight)).tangent, F.linear(torch.ones(9, 5), weight)
        )
    compiled = torch.compile(lambda x, weight: linear(x, weight), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    assert not products
    torch.jit.trace(Linear(5, 4), x.detach())  # which compares without tracing
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        linear(x, weight[:, :3])


@pytest.mark.parametrize(
    "vendor, enabled, works, faster",
    [
        ("AuthenticAMD", True, True, True),
        ("AuthenticAMD", False, True, False),
        ("AuthenticAMD", True, False, False),
        ("GenuineIntel", True, True, False),
        ("", True, True, False),
    ],
)
def test_where_it_is_the_faster_library(monkeypatch, vendor, enabled, works, faster):
    monkeypatch.setattr(onednn.processor, "vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    monkeypatch.setattr(onednn, "works", lambda: works)
    assert onednn.is_faster() is faster

    def refuse(*_):
        raise AssertionError("oneDNN was called")

    if not faster:
        monkeypatch.setattr(onednn, "product", refuse)
        x, weight = leaves((9, 5), (4, 5))
        Linear(5, 4)(x).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(onednn.multiply(x, weight.t()), F.linear(x, weight))
            torch.testing.assert_close(
                onednn.weight_gradient(x, x), x.t() @ x, rtol=1e-5, atol=1e-5
            )


@needs_onednn
@pytest.mark.parametrize("size", [(3, 17, 20, 16, 3), (2, 63, 36, 21, 4), (2, 3, 8, 4, 1)])
@pytest.mark.parametrize("whole", [True, False])
def test_the_way_back_through_a_scan(products, monkeypatch, size, whole):
    monkeypatch.setenv("DYVM_BACKEND", "cpu")
    images, tokens, channels, states, rank = size
    torch.manual_seed(0)
    params = [
        BranchParams(*(p.float().requires_grad_() for p in params_of(channels, states, rank)))
        for _ in range(2)
    ]
    xz = torch.randn(images, tokens, 2 * channels, requires_grad=True)
    lengths = None if whole else torch.arange(images) % tokens + 1
    grad = torch.randn(images, tokens, channels)

    def run():
        y = bidirectional_ssm(xz, *params, lengths=lengths)
        return torch.autograd.grad(y, (xz, *params[0], *params[1]), grad)

    found = run()
    assert len(products) == (6 if whole else 0)  # of a number of rows that may not come again
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    for ours, theirs in zip(found, run(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
