"""What the benchmarks of models rest on: routers set to a share, decisions replayed, the release-like step."""

from types import SimpleNamespace

import timm
import torch

from benchmarks import checking, train
from benchmarks.model import random_images, set_routers
from models import sampling

ARGS = SimpleNamespace(dyvm_model="vim_micro", device="cpu", precision="fp32", batch=3, release_backend="reference")


def micro():
    torch.manual_seed(0)
    return timm.create_model("dyvm_vim_micro", num_classes=10).eval()


def test_routers_run_the_share_that_was_asked_for_and_differ_between_images():
    model, images = micro(), random_images(20, 32, "cpu")
    set_routers(model, images, 0.8)
    with torch.no_grad():
        gates = model(images).gates[1:]  # the first layer's class token has seen no image yet
    assert torch.allclose(gates.mean(dim=1), torch.tensor(0.8))
    assert (gates != gates[:, :1]).any(dim=(1, 2)).all()


def test_replayed_decisions_are_those_recorded():
    model, images = micro(), random_images(4, 32, "cpu")
    set_routers(model, random_images(20, 32, "cpu"), 0.5)
    other = random_images(4, 32, "cpu")
    with torch.no_grad():
        with checking.decisions_recorded(model) as recorded:
            expected = model(other)
        with checking.decisions_replayed(model, recorded) as said:
            actual = model(images)
    assert said.keys() == recorded.keys() == checking.deciders(model).keys() and len(said) == 8 + 3
    assert torch.equal(actual.gates, expected.gates) and all(map(torch.equal, actual.kept, expected.kept))
    assert not torch.equal(actual.logits, expected.logits)


def test_a_wrong_backend_is_seen(monkeypatch):
    model, images = micro(), random_images(2, 32, "cpu")
    torch.nn.init.normal_(model.layers[3].mixer.out_proj.weight, std=0.1)
    exact = torch.autocast("cpu", enabled=False)
    assert checking.logits_error(model, images, "torch", exact) < 1e-4
    from ops.selective_scan import torch_lean
    right = torch_lean.ssm_branch
    monkeypatch.setattr(torch_lean, "ssm_branch", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    assert checking.logits_error(model, images, "torch", exact) > 1e-3


def test_the_release_like_step_is_the_same_step():
    ours, release = train.dyvm_steps(ARGS).values()
    assert train.difference(ours(), release()) < 1e-3


def test_the_noise_covers_a_forward_pass():
    model = micro().train()
    with sampling.replay(train.draw_noise(model, 2, "cpu")):
        assert model(random_images(2, 32, "cpu")).gates.shape == (8, 2, 2)
