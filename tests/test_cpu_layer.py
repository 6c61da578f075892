"""A layer's evaluation by kernels, against its parts one by one; and when it is left to them."""

import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from models import cpu_layer, mixer
from models.mixer import BidirectionalMamba, Layer
from ops import selective_scan
from ops.linear import Linear
from ops.rms_norm import add_rms_norm
from ops.selective_scan.cpu import passes
from ops.selective_scan.cpu.layer import PreparedLayer

pytestmark = [
    pytest.mark.skipif(not selective_scan.runs_on("cpu", "cpu"), reason="the C++ kernels need g++"),
    pytest.mark.usefixtures("two_threads"),
]
TOKENS, WIDTH = 131, 48


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.delenv("DYVM_BACKEND", raising=False)


def build(router: bool = True, **options) -> Layer:
    torch.manual_seed(0)
    layer = Layer(
        BidirectionalMamba(WIDTH, 4, halve=True, router=router, **options),
        WIDTH,
        torch.nn.Identity(),
    )
    torch.nn.init.normal_(layer.norm.weight, mean=1)
    if router:
        torch.nn.init.normal_(layer.mixer.block_head.weight, std=4)
        torch.nn.init.zeros_(layer.mixer.block_head.bias)
    return layer.eval()


def tokens(batch: int, count: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return tuple(torch.randn(batch, count, WIDTH, generator=generator) for _ in range(2))


def in_parts(layer: Layer, *inputs):
    """What the layer's parts make of the inputs, without the kernels of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_layer, "evaluate", lambda *_: None)
        return layer(*inputs)


@pytest.mark.parametrize("slots", [(65,), (), (0, 40, 130)], ids=["middle", "mean", "registers"])
@pytest.mark.parametrize("router", [True, False], ids=["routed", "dense"])
@pytest.mark.parametrize("batch, group", [(1, 8), (5, 8), (12, 12), (12, 4)])
@torch.no_grad()
def test_as_the_parts_one_by_one(monkeypatch, router, batch, group, slots):
    monkeypatch.setattr(mixer, "GROUP_BYTES", group * TOKENS * 4 * WIDTH * 4)
    layer, (hidden, residual) = build(router), tokens(batch)
    for added in (hidden, None):
        found = cpu_layer.evaluate(layer, added, residual, slots)
        expected = in_parts(layer, added, residual, slots)
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[1], expected[1])  # the sum has its very bits
        if not router:
            assert found[2] is None and torch.equal(found[0], expected[0])
            continue
        assert torch.equal(found[2], expected[2])
        if batch == 12:
            running = found[2].sum(dim=1)
            assert set(running.tolist()) == {0, 1, 2}, "or the test shows nothing"
            assert not found[0][running == 0].any()


@torch.no_grad()
def test_an_image_depends_on_no_other_and_nothing_is_changed():
    layer, (hidden, residual) = build(), tokens(12)
    before = hidden.clone(), residual.clone()
    whole = layer(hidden, residual, (65,))
    assert torch.equal(hidden, before[0]) and torch.equal(residual, before[1])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again = layer(hidden, residual, (65,))
        for image in range(12):
            part = slice(image, image + 1)
            alone = layer(hidden[part], residual[part], (65,))
            for one, many in zip(alone, again, strict=True):
                assert torch.equal(one, many[part]), (threads, image)
    assert torch.equal(again[2], whole[2])


@torch.no_grad()
def test_without_any_image_that_runs():
    layer, (hidden, residual) = build(), tokens(3)
    layer.mixer.gate_threshold = 1e9
    out, total, gates = cpu_layer.evaluate(layer, hidden, residual, (65,))
    assert not out.any() and not gates.any() and torch.equal(total, residual + hidden)


@torch.no_grad()
def test_a_threshold_counts():
    layer, (hidden, residual) = build(), tokens(12)
    kept = []
    for threshold in (-100.0, 0.0, 100.0):
        layer.mixer.gate_threshold = threshold
        gates = cpu_layer.evaluate(layer, hidden, residual, (65,))[2]
        assert torch.equal(gates, in_parts(layer, hidden, residual, (65,))[2])
        kept.append(int(gates.sum()))
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize("router", [True, False], ids=["routed", "dense"])
@pytest.mark.parametrize("group", [12, 4, 1])
@pytest.mark.parametrize("classes", [0, 1, 3])
@torch.no_grad()
def test_images_of_several_lengths(monkeypatch, classes, group, router):
    monkeypatch.setattr(mixer, "GROUP_BYTES", group * TOKENS * 4 * WIDTH * 4)
    layer, (hidden, residual) = build(router), tokens(12)
    lengths = torch.tensor([131, 7, 64, 130, 65, 100, 16, 17, 15, 131, 40, 90])
    slots = torch.stack([lengths // (2 + i) for i in range(classes)], dim=1) if classes else ()
    found = cpu_layer.evaluate(layer, hidden, residual, slots, lengths)
    out, total, gates = in_parts(layer, hidden, residual, slots, None, lengths)
    exists = torch.arange(TOKENS) < lengths[:, None]
    torch.testing.assert_close(found[0][exists], out[exists], rtol=1e-5, atol=1e-5)
    assert not found[0][~exists].any()
    assert torch.equal(found[1], total)
    if router:
        assert torch.equal(found[2], gates)
        assert set(gates.sum(dim=1).tolist()) == {0, 1, 2}, "or the test shows nothing"
    for image, length in enumerate(lengths.tolist()):
        part = slice(image, image + 1)
        alone = hidden[part, :length].contiguous(), residual[part, :length].contiguous()
        own = tuple(slots[image].tolist()) if classes else ()
        assert torch.equal(layer(*alone, own)[0][0], found[0][image, :length])
    for given in hidden, residual:
        given[~exists] = torch.nan
    again = cpu_layer.evaluate(layer, hidden, residual, slots, lengths)
    assert torch.equal(again[0], found[0])


@torch.no_grad()
def test_few_tokens():
    """Fewer than the libraries' products may be given."""
    layer, (hidden, residual) = build(), tokens(12, 5)
    found = cpu_layer.evaluate(layer, hidden, residual, (2,))
    torch.testing.assert_close(found, in_parts(layer, hidden, residual, (2,)), rtol=1e-5, atol=1e-5)
    alone = cpu_layer.evaluate(layer, hidden[:1], residual[:1], (2,))
    assert torch.equal(alone[0], found[0][:1])


@torch.no_grad()
def test_a_nan_stays_in_its_image():
    layer, (hidden, residual) = build(router=False), tokens(3)
    hidden[1, 7, 3] = torch.nan
    out, total, _ = cpu_layer.evaluate(layer, hidden, residual, (65,))
    assert out[1].isnan().any() and total[1, 7, 3].isnan()
    assert out[[0, 2]].isfinite().all()


@torch.no_grad()
def test_every_weight_is_seen_when_it_changes():
    layer, (hidden, residual) = build(), tokens(12)
    for name, weight in layer.named_parameters():
        before = cpu_layer.evaluate(layer, hidden, residual, (65,))
        if name == "mixer.block_head.weight":
            weight.neg_()
        elif name == "mixer.block_head.bias":
            weight.copy_(torch.tensor([100.0, -100.0]))
        else:
            weight.mul_(1.5).add_(0.01)
        after = cpu_layer.evaluate(layer, hidden, residual, (65,))
        expected = in_parts(layer, hidden, residual, (65,))
        torch.testing.assert_close(after[0], expected[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(after[2], expected[2]), name
        assert not torch.equal(after[0], before[0]), name


@torch.no_grad()
def test_threads_share_a_layer():
    """The kernels let other threads of Python run; each has memory of its own."""
    layer, found = build(), {}
    given = {batch: tokens(batch) for batch in (3, 4, 5, 6)}
    expected = {batch: layer(*pair, (65,)) for batch, pair in given.items()}

    def run(batch: int) -> None:
        with torch.no_grad():
            found[batch] = [layer(*given[batch], (65,)) for _ in range(30)]

    workers = [threading.Thread(target=run, args=(batch,)) for batch in given]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for batch, results in found.items():
        for result in results:
            for one, other in zip(result, expected[batch], strict=True):
                assert torch.equal(one, other)


def taken(layer: Layer, *inputs) -> bool:
    return cpu_layer.evaluate(layer, *inputs) is not None


def test_what_is_left_to_the_parts(monkeypatch):
    layer, (hidden, residual), slots = build(), tokens(3), (65,)
    assert not taken(layer, hidden, residual, slots)  # autograd is to see it
    with torch.no_grad():
        assert taken(layer, hidden, residual, slots)
        assert not taken(layer, hidden.double(), residual.double(), slots)
        assert not taken(layer, hidden.transpose(1, 2).contiguous().mT, residual, slots)
        assert not taken(layer, *tokens(0), slots)
        assert not taken(layer.train(), hidden, residual, slots)
        layer.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert not taken(layer, hidden, residual, slots)
        with FlopCounterMode(display=False):
            assert not taken(layer, hidden, residual, slots)
        layer.mixer.observation.of = "outputs"
        assert not taken(layer, hidden, residual, slots)
        layer.mixer.observation.of = ""
        for name in ("torch", "reference"):
            monkeypatch.setenv("DYVM_BACKEND", name)
            assert not taken(layer, hidden, residual, slots)
        monkeypatch.setenv("DYVM_BACKEND", "cpu")
        assert taken(layer, hidden, residual, slots)
        with forward_ad.dual_level():
            assert not taken(layer, hidden, residual, slots)
        assert not taken(build().bfloat16(), hidden, residual, slots)


class OtherRouter(mixer.Router):
    def forward(self, inputs, weight=None):
        return super().forward(inputs, weight) + 1


class OtherMixer(BidirectionalMamba):
    def route(self, logits):
        return torch.ones_like(logits)


@torch.no_grad()
def test_other_parts_are_asked_themselves():
    hidden, residual = tokens(3)

    def without_kernels(layer: Layer) -> bool:
        return all(
            torch.equal(one, other)
            for one, other in zip(
                layer(hidden, residual, (65,)),
                in_parts(layer, hidden, residual, (65,)),
                strict=True,
            )
        ) and not (layer._is_usual() and taken(layer, hidden, residual, (65,)))

    assert not without_kernels(build())
    for kind in (torch.nn.Linear, Linear):
        for name, sizes in {"in_proj": (WIDTH, 4 * WIDTH), "out_proj": (2 * WIDTH, WIDTH)}.items():
            layer = build()
            setattr(layer.mixer, name, kind(*sizes, bias=True))
            assert without_kernels(layer), (kind, name)
    layer = build()
    layer.mixer.block_head = OtherRouter(4 * WIDTH, 2)
    assert without_kernels(layer)
    layer = build()
    layer.mixer.__class__ = OtherMixer
    assert without_kernels(layer)
    layer = build()
    layer.mixer.route = torch.ones_like
    assert without_kernels(layer)
    layer = build()
    layer.mixer.in_proj.forward = layer.mixer.in_proj.forward
    assert without_kernels(layer)


@torch.no_grad()
def test_numbers_beside_the_weights_are_seen_when_they_change():
    layer, (hidden, residual) = build(), tokens(3)
    for change in (
        lambda: setattr(layer.norm, "eps", 10.0),
        lambda: setattr(layer.mixer, "scale", 2),
    ):
        before = cpu_layer.evaluate(layer, hidden, residual, (65,))[0]
        change()
        after = cpu_layer.evaluate(layer, hidden, residual, (65,))[0]
        expected = in_parts(layer, hidden, residual, (65,))[0]
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(after, before)


@torch.no_grad()
def test_what_is_wrong_is_told_by_the_parts():
    """The kernels would read beside the tensors."""
    layer, (hidden, residual) = build(), tokens(3)
    wrong = (
        (hidden[..., :40].contiguous(), residual),
        (hidden[:1], residual),
        (hidden[:, :9], residual),
    )
    for pair in wrong:
        with pytest.raises(ValueError, match="must have one shape"):
            layer(*(each.contiguous() for each in pair), (65,))
    with pytest.raises(ValueError, match="weight must have shape"):
        layer(None, residual[..., :40].contiguous(), (65,))
    with pytest.raises(IndexError):
        layer(hidden, residual, (TOKENS,))
    assert torch.equal(layer(hidden, residual, (-1,))[2], layer(hidden, residual, (130,))[2])


@torch.no_grad()
def test_within_transforms_and_with_another_default_dtype():
    """What is kept there must be of use outside."""
    layer, (hidden, residual) = build(), tokens(2)
    expected = in_parts(layer, hidden, residual, (65,))[0]
    vars(passes._scratch).clear()

    def scaled(factor):
        with torch.no_grad():
            total = layer(hidden, residual, (65,))[0].sum()
        return factor * total

    gradient = torch.func.grad(scaled)(torch.tensor(3.0))
    torch.testing.assert_close(gradient, expected.sum(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer(hidden, residual, (65,))[0], expected, rtol=1e-5, atol=1e-5)
    layer, (hidden, residual) = build(), tokens(2, 140)  # a size that nothing was kept for
    torch.set_default_dtype(torch.float64)
    try:
        found = layer(hidden, residual, (65,))[0]
    finally:
        torch.set_default_dtype(torch.float32)
    expected = in_parts(layer, hidden, residual, (65,))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(hidden, residual, (65,))[0], expected, rtol=1e-5, atol=1e-5)


def test_transforms_of_training():
    """torch.func and batched gradients go through the registered operators."""
    layer, (hidden, residual) = build(router=False), tokens(2)

    def total(factor):
        return factor * layer(hidden, residual, (65,))[0].sum()

    found = torch.func.vmap(total)(torch.arange(3.0))
    torch.testing.assert_close(found, total(torch.arange(3.0)))
    x = hidden.clone().requires_grad_()
    normed, _ = add_rms_norm(x, residual, layer.norm.weight)
    rows = torch.randn(3, *normed.shape)
    (batched,) = torch.autograd.grad(normed, x, rows, is_grads_batched=True, retain_graph=True)
    for row, found in zip(rows, batched, strict=True):
        torch.testing.assert_close(
            found, torch.autograd.grad(normed, x, row, retain_graph=True)[0], rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_hooks_are_called():
    layer, (hidden, residual) = build(), tokens(3)
    parts = layer.norm, layer.mixer, layer.mixer.in_proj, layer.mixer.out_proj
    for part in (*parts, layer.mixer.block_head):
        handle = part.register_forward_hook(lambda *_: None)
        assert not taken(layer, hidden, residual, (65,))
        handle.remove()
    assert taken(layer, hidden, residual, (65,))
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not taken(layer, hidden, residual, (65,))
    handle.remove()


@torch.no_grad()
def test_weights_are_packed_once(monkeypatch):
    made = []
    prepare = PreparedLayer.__init__
    monkeypatch.setattr(PreparedLayer, "__init__", lambda *given: made.append(1) or prepare(*given))
    layer, (hidden, residual) = build(), tokens(3)
    for _ in range(3):
        layer(hidden, residual, (65,))
    assert len(made) == 1
    layer.train().eval()  # the way to tell of changes that PyTorch does not count
    layer(hidden, residual, (65,))
    assert len(made) == 2


def test_after_inference_mode():
    """Memory that is used again is not that mode's own."""
    layer, (hidden, residual) = build(), tokens(12)
    with torch.inference_mode():
        expected = layer(hidden, residual, (65,))
    with torch.no_grad():
        for found, same in zip(layer(*tokens(12), (65,)), expected, strict=True):
            assert torch.equal(found, same)
