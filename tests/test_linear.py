"""Products without gradient on a CPU, and the mixers' inference that is built on them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import mixer
from models.mixer import BidirectionalMamba
from ops import linear as module
from ops import onednn
from ops.linear import linear

pytestmark = pytest.mark.usefixtures("two_threads")


def tensors(*shape, width=44, bias=True):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(*shape, generator=generator),
        torch.randn(width, shape[-1], generator=generator),
    )
    return x, weight, torch.randn(width, generator=generator) if bias else None


@pytest.mark.parametrize(
    "shape, width", [((3, 5, 20), 7), ((197, 384), 44), ((2, 1), 1), ((0, 4), 3)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_the_product(shape, width, bias):
    x, weight, shift = tensors(*shape, width=width, bias=bias)
    with torch.no_grad():
        torch.testing.assert_close(
            linear(x, weight, shift), F.linear(x, weight, shift), rtol=1e-5, atol=1e-4
        )
        for odd in () if shift is None else (torch.stack((shift, shift), 1)[:, 0], shift[:1]):
            of_it = odd.expand(width)  # strided, and one number for all
            torch.testing.assert_close(
                linear(x, weight, of_it), F.linear(x, weight, of_it), rtol=1e-5, atol=1e-4
            )
        strided = x.repeat_interleave(2, dim=-1)[..., ::2]
        torch.testing.assert_close(
            linear(strided, weight, shift), F.linear(x, weight, shift), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize(
    "shape, width",
    [((1100, 96), 44), ((1100, 192), 768), ((700, 30), 2), ((700, 33), 10), ((700, 10), 10)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_row_does_not_depend_on_those_beside_it(shape, width, bias):
    x, weight, shift = tensors(*shape, width=width, bias=bias)
    with torch.no_grad():
        whole = linear(x, weight, shift)
        for rows in (*range(1, 70), 128, 196, 197, 257, 499):
            assert torch.equal(linear(x[:rows], weight, shift), whole[:rows]), rows
        for begin in (1, 6, 39):
            assert torch.equal(linear(x[begin:], weight, shift), whole[begin:]), begin
            alone = x[begin : begin + 60].clone()  # elsewhere in the lines of the cache
            assert torch.equal(linear(alone, weight, shift), whole[begin : begin + 60]), begin


def backwards(x, weight, bias=None):
    """The product, with other bits."""
    return F.linear(x.flip(1), weight.flip(1), bias)


def ends_in_another_order(x, weight, bias, _):
    """A library's product whose last row is summed backwards."""
    out = F.linear(x, weight, bias)
    out[-1] = backwards(x, weight, bias)[-1]
    return out


@pytest.fixture
def use(monkeypatch):
    """Puts functions in the place of the module's; what was chosen before is forgotten, and so is
    afterwards what is chosen with them.
    """

    def use(**functions):
        for name, function in functions.items():
            monkeypatch.setattr(module, f"_{name}", function)
        monkeypatch.setattr(onednn, "works", lambda: True)
        module._choice.cache_clear()

    yield use
    module._choice.cache_clear()


def chosen(bias=False):
    return module._choice(44, 96, bias, torch.get_num_threads(), True)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_whose_rows_depend_on_others_is_not_taken(use, bias):
    use(onednn=ends_in_another_order)
    assert module._choice(44, 96, bias, 1, True)[0] is not ends_in_another_order
    use(pytorch=ends_in_another_order)
    assert module._choice(44, 96, bias, 1, True)[0] is module._blocks
    test_a_row_does_not_depend_on_those_beside_it((300, 96), 44, bias)


@pytest.mark.parametrize("inputs, width", [(17, 1), (33, 10), (96, 44)])
def test_a_place_in_blocks_does_not_matter(inputs, width):
    x, weight, bias = tensors(300, inputs, width=width)
    with torch.no_grad():
        whole = module._blocks(x, weight, bias)
        torch.testing.assert_close(whole, F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
        for begin in (0, 1, 5, 48, 131):
            for count in (1, 2, 47, 49, 97):
                part = slice(begin, begin + count)
                alone = module._blocks(x[part].clone(), weight, bias)
                assert torch.equal(alone, whole[part]), (begin, count)


def test_a_release_of_pytorch_without_the_product(monkeypatch):
    def missing(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(onednn, "product", missing)
    onednn.works.cache_clear()
    module._choice.cache_clear()
    try:
        assert not onednn.works()
        x, weight, bias = tensors(50, 20)
        with torch.no_grad():
            torch.testing.assert_close(
                linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5
            )
    finally:
        onednn.works.cache_clear()
        module._choice.cache_clear()


def test_without_onednn(monkeypatch):
    def refuse(*_):
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(onednn, "product", refuse)
    monkeypatch.setattr(onednn, "works", refuse)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    x, weight, bias = tensors(50, 20)
    with torch.no_grad():
        torch.testing.assert_close(
            linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("bias", [True, False])
def test_rows_are_filled_up_to_a_multiple_where_that_keeps_them_apart(use, bias):
    def rest_in_another_order(x, weight, bias, _):
        """As oneDNN with AVX2: what is left of blocks of 24 rows is summed backwards."""
        out, left = F.linear(x, weight, bias), len(x) % 24
        if left:
            out[-left:] = backwards(x[-left:], weight, bias)
        return out

    use(onednn=rest_in_another_order, pytorch=ends_in_another_order)
    most = module._MOST_FILLED_UP[0]
    assert chosen(bias) == (rest_in_another_order, 24, 24, most)
    x, weight, shift = tensors(2 * most + 7, 96, bias=bias)
    with torch.no_grad():  # more than was tried, in pieces
        whole = linear(x, weight, shift)
        assert torch.equal(linear(x[-100:], weight, shift), whole[-100:])
    torch.testing.assert_close(whole, F.linear(x, weight, shift), rtol=1e-5, atol=1e-4)
    test_a_row_does_not_depend_on_those_beside_it((300, 96), 44, bias)


@pytest.mark.parametrize("most, limit", [(792, 840), (384, 400), (264, 288)])
def test_a_product_of_many_rows_is_made_of_small_ones_where_those_keep_them_apart(use, most, limit):
    def many_in_another_order(x, weight, bias, _):
        """As oneDNN with AVX2 and large weights."""
        if len(x) % 12:
            return ends_in_another_order(x, weight, bias, None)
        return F.linear(x, weight, bias) if len(x) < limit else backwards(x, weight, bias)

    use(onednn=many_in_another_order, pytorch=ends_in_another_order)
    assert chosen() == (many_in_another_order, 12, 12, most)
    x, weight, _ = tensors(2 * most + 7, 96, bias=False)
    memory = torch.full((len(x), 44), torch.nan)
    with torch.no_grad():
        whole = module.multiply(x, weight, memory=memory)
        assert whole.data_ptr() == memory.data_ptr()
        assert torch.equal(whole, module.multiply(x, weight))
        for part in slice(0, 5), slice(most - 20, most + 400), slice(2 * most, None):
            assert torch.equal(module.multiply(x[part], weight), whole[part])
    torch.testing.assert_close(whole, F.linear(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wrong", [60, 1812])  # multiples of 12 and not of 24
def test_a_single_number_of_rows_that_differs_is_found(use, wrong):
    def differs(x, weight, bias, _):
        return backwards(x, weight) if len(x) == wrong else F.linear(x, weight)

    use(onednn=differs, of_any_number=nothing_passes)
    assert chosen() == (differs, 24, 24, 8184)


def test_rows_that_differ_by_what_stands_before_them_are_found(use):
    def differs(x, weight, bias, _):
        first = x[0, 0] == 0  # as in a trial's numbers
        return F.linear(x, weight) if first else backwards(x, weight)

    use(onednn=differs, of_any_number=nothing_passes)
    assert chosen().product is module._blocks


def nothing_passes(_product):
    """A trial."""
    return lambda weight, bias: None


def test_parts_within_transforms_and_of_strided_weights(monkeypatch):
    """More rows than a product may have."""
    way = module._Way(module._pytorch, 12, 12, 24)
    monkeypatch.setattr(module, "_choice", lambda *_: way)
    x, weight, shift = torch.randn(3, 60, 8), torch.randn(3, 5, 8), torch.randn(5)
    expected = torch.stack([F.linear(*each, shift) for each in zip(x, weight, strict=True)])
    with torch.no_grad():
        found = torch.vmap(linear, (0, 0, None))(x, weight, shift)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        found = torch.vmap(linear, (None, 0, None))(x[0], weight, shift)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        across = weight[0].t().contiguous().t()
        assert torch.equal(linear(x[0], across, shift), linear(x[0], weight[0], shift))


def test_rows_behind_which_others_lie_are_not_copied():
    table = torch.randn(30, 5)
    within = module._filled_up(table[3:10], 12)
    assert within.data_ptr() == table[3].data_ptr() and torch.equal(within, table[3:15])
    single = torch.randn(3, 7, 5)[:1, 0]  # of any stride between rows
    for rows in (table[20:], table[:, :4], table.t()[:4]):  # at the end, of other strides
        count = len(rows) + 3
        filled = module._filled_up(rows, count)
        assert len(filled) == count and torch.equal(filled[: len(rows)], rows)
        assert not filled[len(rows) :].any()
    assert len(module._filled_up(single, 12)) == 12


@pytest.mark.parametrize("few", [0, 1 / 8, 1])
@pytest.mark.parametrize("router", [True, False])
def test_mixers_infer_in_groups_without_images_whose_scans_are_off(monkeypatch, router, few):
    monkeypatch.setattr(mixer, "FEW_OFF", few)
    torch.manual_seed(0)
    layer, hidden = (
        BidirectionalMamba(16, 4, halve=True, router=router).eval(),
        torch.randn(12, 9, 16),
    )
    if router:
        torch.nn.init.normal_(layer.block_head.weight, std=5)
        torch.nn.init.zeros_(layer.block_head.bias)
    expected, gates = layer(hidden, (4,))  # with autograd: all at once
    assert expected.requires_grad
    with torch.no_grad():
        for images in (12, 4, 1):
            monkeypatch.setattr(mixer, "GROUP_BYTES", images * 9 * 64 * 4)
            found, found_gates = layer(hidden, (4,))
            torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
            assert found_gates is None if gates is None else torch.equal(found_gates, gates)
        assert layer(hidden[:0], (4,))[0].shape == (0, 9, 16)
    if router:
        off = gates.sum(dim=1) == 0
        assert 0 < off.sum() < 12  # or the test shows nothing
        assert not found[off].any() and found[~off].any()


def test_routers_decide_as_in_training():
    """One matrix for two: the logits of the definition; hooks are called, as calibration needs."""
    torch.manual_seed(0)
    layer, logits = BidirectionalMamba(16, 4, halve=True, router=True).eval(), []
    torch.nn.init.normal_(layer.block_head.weight, std=5)
    classes = torch.randn(7, 2, 16)
    hidden = torch.cat([classes, torch.randn(7, 5, 16)], dim=1)
    layer.block_head.register_forward_hook(lambda *of: logits.append(of[2]))
    for change in range(4):
        expected = layer.block_head(layer.in_proj(classes).mean(dim=1)).detach()
        logits.clear()
        with torch.no_grad():
            layer(hidden, (0, 1))
            torch.testing.assert_close(*logits, expected, rtol=1e-5, atol=1e-5)
            if change == 0:
                layer.in_proj.weight.mul_(2)
            if change == 1:
                layer.in_proj.weight.data.mul_(2)  # no version tells; eval() does
                layer.eval()
        if change == 2:  # what stands around the projection is seen
            layer.in_proj.register_forward_hook(lambda _, inputs, output: output * 3)
    layer.bfloat16()
    with torch.no_grad():
        found = layer.block_head.before(layer.in_proj, classes.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=1.0)


def test_decays_are_exponentials():
    A_log = torch.randn(6, 4, requires_grad=True)
    found, expected = mixer.decay(A_log), -A_log.detach().double().exp()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    found.sum().backward()
    torch.testing.assert_close(A_log.grad.double(), expected, rtol=1e-6, atol=0)
    assert mixer.decay(A_log.bfloat16()).dtype == torch.float32


def test_counters_of_operations_see_the_product_alone():
    """Not the trials that choose it."""
    x, weight, _ = tensors(3, 52, width=37)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 3 * 52 * 37
