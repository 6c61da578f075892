"""Values made of weights once (ops/kept.py), and what the models keep."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

from models.mixer import BidirectionalMamba
from ops import selective_scan
from ops.kept import Kept, hold, recorded_reads
from ops.linear import Linear
from ops.selective_scan import BranchParams, KeptParams, bidirectional_ssm, ssm_branch
from ops.selective_scan.cpu.passes import Packed


@pytest.fixture
def counted():
    """A Kept, a weight, and a function that gives twice the weight and how often it was made."""
    kept, weight, made = Kept(), nn.Parameter(torch.ones(3)), []

    def get():
        value = kept.get("twice", (weight,), lambda: made.append(1) or weight * 2)
        return value, len(made)

    return kept, weight, get


@torch.no_grad()
def test_made_once_and_again_after_a_change(counted):
    kept, weight, get = counted
    assert get()[1] == 1 and get()[1] == 1
    weight.add_(1)
    value, made = get()
    assert made == 2 and torch.equal(value, torch.full((3,), 4.0))
    weight.data = torch.zeros(3)
    assert torch.equal(get()[0], torch.zeros(3))
    weight.data.fill_(5)  # PyTorch does not count it
    assert torch.equal(get()[0], torch.zeros(3))
    kept.clear()
    assert torch.equal(get()[0], torch.full((3,), 10.0))


@torch.no_grad()
def test_another_tensor_in_the_same_place_is_another():
    kept, storage = Kept(), torch.ones(3)
    views = storage.view(3), storage.view(3)
    values = [kept.get("sum", (view,), object) for view in views]
    assert values[0] is not values[1]
    assert kept.get("sum", (views[1],), object) is values[1]


def test_autograd_sees_how_it_is_made(counted):
    _, weight, get = counted
    value, _ = get()
    value.sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    assert get()[1] == 2


@torch.no_grad()
def test_tracers_and_counters_see_how_it_is_made(counted):
    from torch.utils.flop_counter import FlopCounterMode

    _, _, get = counted
    get()
    with FlopCounterMode(display=False):
        assert get()[1] == 2
    with torch.inference_mode():
        inference = torch.ones(2)
        kept = Kept()
        assert kept.get("x", (inference,), object) is not kept.get("x", (inference,), object)


@torch.no_grad()
def test_nothing_is_kept_while_a_graph_is_captured(counted, monkeypatch):
    _, weight, get = counted
    monkeypatch.setattr("ops.kept.capturing", lambda: True)
    assert get()[1] == 1 and get()[1] == 2
    monkeypatch.setattr("ops.kept.capturing", lambda: False)
    assert get()[1] == 3
    monkeypatch.setattr("ops.kept.capturing", lambda: True)
    assert get()[1] == 3, "what was made before is there to be read"


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizers_step_is_seen(counted, fused):
    """A fused one leaves the version counters as they are."""
    _, weight, get = counted
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    with torch.no_grad():
        get()
    weight.sum().backward()
    optimizer.step()
    with torch.no_grad():
        value, made = get()
    assert made == 2 and torch.equal(value, weight.detach() * 2)


@torch.no_grad()
def test_what_a_graph_reads_lives_and_is_watched(counted):
    kept, weight, get = counted
    value = weakref.ref(get()[0])
    with recorded_reads() as reads:
        get()
        hold(other := Kept())
    other = weakref.ref(other)
    assert reads.are_current()
    kept.clear()
    assert value() is not None and other() is not None and not reads.are_current()
    get()
    with recorded_reads() as reads:
        value = weakref.ref(get()[0])
    assert reads.are_current()
    weight.mul_(2)
    get()
    assert value() is not None and not reads.are_current()
    with recorded_reads() as empty:
        pass
    assert empty.are_current()
    del reads
    assert value() is None


@torch.no_grad()
def test_copies_are_empty(counted):
    kept, _, get = counted
    get()
    assert copy.deepcopy(kept)._values == {} and pickle.loads(pickle.dumps(kept))._values == {}
    assert len(kept._values) == 1


def test_a_linear_layer_keeps_its_weight_for_autocast():
    layer, x = Linear(8, 4).eval(), torch.randn(5, 8)

    def wanted():
        """Not by way of autocast, whose own copy knows of no change."""
        weight, bias = (tensor.bfloat16() for tensor in (layer.weight, layer.bias))
        return nn.functional.linear(x.bfloat16(), weight, bias)

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        first, kept = layer(x), layer._cast("weight", "cpu")
        assert kept.dtype == torch.bfloat16 and layer._cast("weight", "cpu") is kept
        assert torch.equal(first, wanted())
        layer.weight.mul_(2)
        assert torch.equal(layer(x), wanted())
        layer.weight.data.mul_(2)
        layer.train().eval()
        assert torch.equal(layer(x), wanted())
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_a_mixer_keeps_its_branches():
    """And gives the result of the new weights after each way of changing one."""
    torch.manual_seed(0)
    mixer = BidirectionalMamba(16, 4, halve=True).eval()
    x, slots = torch.randn(2, 5, 16), (0,)

    def fresh():
        """By a copy, which has kept nothing."""
        return copy.deepcopy(mixer)(x, slots)[0]

    with torch.no_grad():
        mixer(x, slots)
        assert isinstance(mixer.branch(False), KeptParams)
        assert mixer.branch(True) is mixer.branch(True)
        for name, weight in mixer.named_parameters():
            before = mixer(x, slots)[0]
            weight.mul_(1.5)
            after = mixer(x, slots)[0]
            assert torch.equal(after, fresh()) and not torch.equal(after, before), name
        state = {name: torch.randn_like(w) * 0.1 for name, w in mixer.state_dict().items()}
        mixer.load_state_dict(state)
        assert torch.equal(mixer(x, slots)[0], fresh())
    assert not isinstance(mixer.branch(False), KeptParams)
    mixer(x, slots)[0].sum().backward()
    assert all(weight.grad is not None for weight in mixer.parameters())


@pytest.mark.skipif(not selective_scan.runs_on("cpu", "cpu"), reason="the C++ kernels need g++")
@torch.no_grad()
def test_scans_on_a_cpu_pack_kept_weights_once(monkeypatch):
    packed = []
    made_of = Packed.of
    monkeypatch.setattr(Packed, "of", lambda call: packed.append(1) or made_of(call))
    monkeypatch.setenv("DYVM_BACKEND", "cpu")
    torch.manual_seed(0)
    mixer, xz = BidirectionalMamba(16, 4, halve=True).eval(), torch.randn(2, 5, 64)
    forward, backward = mixer.branch(False), mixer.branch(True)
    plain = BranchParams(*forward), BranchParams(*backward)
    both = bidirectional_ssm(xz, *plain)
    alone = [ssm_branch(xz, params, reverse=reverse) for reverse, params in enumerate(plain)]
    assert len(packed) == 3
    for _ in range(2):  # in turn: neither's weights take the place of another's
        assert torch.equal(bidirectional_ssm(xz, forward, backward), both)
        assert torch.equal(ssm_branch(xz, forward), alone[0])
        assert torch.equal(ssm_branch(xz, backward, reverse=True), alone[1])
        assert len(packed) == 6
    mixer.D.add_(1)
    changed = bidirectional_ssm(xz, mixer.branch(False), backward)
    assert len(packed) == 7 and not torch.equal(changed, both)
