"""Weights that are prepared once for evaluation: never those of before a change."""

import copy
import gc

import pytest
import timm
import torch
from torch import nn

from models.mixer import BidirectionalMamba
from ops import prepared
from ops.prepared import decay


@pytest.fixture
def weight():
    return nn.Parameter(torch.randn(6, 4))


def test_computed_once(weight):
    with torch.no_grad():
        first = decay(weight)
        assert decay(weight) is first
    with torch.inference_mode():
        assert decay(weight) is first
    torch.testing.assert_close(first, -weight.detach().exp())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.init.normal_(model.weight),
        lambda model: model.load_state_dict({"weight": torch.ones(6, 4)}),
        lambda model: model.load_state_dict({"weight": torch.ones(6, 4)}, assign=True),
        lambda model: model.half(),
        lambda model: setattr(model.weight, "data", torch.ones(6, 4)),
        lambda model: torch._foreach_mul_([model.weight], 2.0),
        lambda model: torch.optim.AdamW([model.weight], lr=0.1, foreach=True).step(),
    ],
)
def test_computed_again_when_the_weight_changes(weight, change):
    model = nn.Module()
    model.weight = weight
    weight.grad = torch.ones(6, 4)
    with torch.no_grad():
        before = decay(model.weight)
        change(model)
        after = decay(model.weight)
    torch.testing.assert_close(after, -model.weight.detach().float().exp())
    assert not torch.equal(after, before) or model.weight.dtype == torch.half


def test_a_product_follows_both_weights():
    first, second = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(2, 5))
    with torch.no_grad():
        before = prepared.product(second, first)
        assert prepared.product(second, first) is before
        torch.testing.assert_close(before, second @ first)
        for change in (first.mul_, second.mul_):
            change(2.0)
            torch.testing.assert_close(prepared.product(second, first), second @ first)
        other = nn.Parameter(torch.randn(5, 3))
        torch.testing.assert_close(prepared.product(second, other), second @ other)


def test_routers_decide_as_in_training():
    """One matrix for two: the logits of the definition, without and with class tokens."""
    torch.manual_seed(0)
    layer = BidirectionalMamba(16, 4, halve=True, router=True).eval()
    nn.init.normal_(layer.block_head.weight, std=5)
    classes, logits = torch.randn(7, 2, 16), []
    expected = layer.block_head(layer.in_proj(classes).mean(dim=1)).detach()
    layer.block_head.register_forward_hook(lambda *of: logits.append(of[2]))
    with torch.no_grad():
        layer(torch.cat([classes, torch.randn(7, 5, 16)], dim=1), (0, 1))
    assert len(logits) == 1, "hooks are called, as the calibration needs"
    torch.testing.assert_close(logits[0], expected, rtol=1e-5, atol=1e-5)
    layer.bfloat16()
    with torch.no_grad():
        found = layer.block_head.before(layer.in_proj, classes.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.3)


def test_with_gradient_and_in_inference_mode(weight):
    with torch.inference_mode():
        decay(weight)
    decay(weight).sum().backward()
    torch.testing.assert_close(weight.grad, -weight.detach().exp())
    with torch.no_grad():
        assert not decay(weight).is_inference(), "it is used outside of inference mode too"
    with torch.inference_mode():
        made = torch.zeros(2, 2)
        assert torch.equal(decay(made), -torch.ones(2, 2))


def test_copies_and_what_is_gone(weight):
    gc.collect()
    held = len(prepared._kept)
    with torch.no_grad():
        decay(weight)
        twin = copy.deepcopy(weight)
        twin.mul_(2)
        torch.testing.assert_close(decay(twin), -twin.exp())
    assert len(prepared._kept) == held + 2
    del twin
    gc.collect()
    assert len(prepared._kept) == held + 1


def test_a_model_that_is_trained_between_evaluations():
    model = timm.create_model("vim_micro", img_size=32, depth=2, embed_dim=16, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images).logits
        for layer in model.layers:
            layer.mixer.A_log.add_(1.0)
        after = model(images).logits
        fresh = copy.deepcopy(model)(images).logits
    assert torch.equal(after, fresh) and not torch.equal(after, before)
