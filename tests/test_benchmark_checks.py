"""What stands before every speed: decisions replayed, and scans that are wrong seen in logits and
gradients.
"""

from types import SimpleNamespace

import pytest
import timm
import torch

from benchmarks import checking, model, train
from benchmarks.model import random_images, set_routers
from models import sampling
from ops import onednn, selective_scan
from ops.selective_scan import torch_lean
from utils.precision import autocast

ARGS = SimpleNamespace(
    dyvm_model="vim_micro",
    device="cpu",
    precision="fp32",
    batch=3,
    release_backend="reference",
    release_checkpointing=False,
)


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
    assert torch.equal(actual.gates, expected.gates) and all(
        map(torch.equal, actual.kept, expected.kept)
    )
    assert not torch.equal(actual.logits, expected.logits)


@pytest.fixture(scope="module")
def built():
    return model.build("T", SimpleNamespace(img_size=64, device="cpu"))


SCAN = torch_lean.ssm_branch
SABOTAGES = {
    "no recurrence": lambda xz, params, **rest: SCAN(xz, params._replace(A=params.A * 1e4), **rest),
    "backward walks forward": lambda xz, params, reverse=False, **rest: SCAN(xz, params, **rest),
    "no mask": lambda xz, params, mask=None, **rest: SCAN(xz, params, **rest),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["Vim-T", "DyVM-T"])
def test_a_scan_that_is_wrong_shows_in_the_logits(name, precision, built, monkeypatch):
    images = random_images(3, 64, "cpu")

    def error(backend):
        precise = autocast("cpu", precision)
        return checking.logits_error(built[name], images, backend, precise)

    tolerance = model.TOLERANCES[precision]
    assert error("torch") < tolerance / 2 and error(None) < tolerance / 2
    for sabotage in ("no recurrence", "backward walks forward"):  # at evaluation nothing is masked
        monkeypatch.setattr(torch_lean, "ssm_branch", SABOTAGES[sabotage])
        assert error("torch") > 2 * tolerance, sabotage


def test_telling_weights_leave_the_routers_their_share(built):
    with torch.no_grad():
        result = built["DyVM-T"](random_images(20, 64, "cpu"))
    assert result.gates[1:].mean() == pytest.approx(model.BLOCK_KEEP, abs=0.1)
    assert 0.3 < result.logits.std() < 3 and result.logits.isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_scan_that_is_wrong_shows_in_the_gradient(precision, monkeypatch):
    monkeypatch.setattr(selective_scan, "PREFERENCE", ("torch", "reference"))
    _, errors = train.dyvm_part(SimpleNamespace(**vars(ARGS) | {"precision": precision}))
    assert errors()["DyVM"] < train.TOLERANCES[precision] / 2
    for name, sabotage in SABOTAGES.items():
        monkeypatch.setattr(torch_lean, "ssm_branch", sabotage)
        assert errors()["DyVM"] > 2 * train.TOLERANCES[precision], name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fastest_training_step_passes_with_a_margin(precision):
    _, errors = train.dyvm_part(SimpleNamespace(**vars(ARGS) | {"precision": precision}))
    assert errors()["DyVM"] < train.TOLERANCES[precision] / 2


def test_the_release_like_step_is_the_same_step():
    steps, errors = train.dyvm_part(ARGS)
    assert errors().keys() == steps.keys() and max(errors().values()) < 1e-3
    ours, release = steps.values()
    assert train.difference(ours(), release()) < 1e-3


def test_the_noise_covers_a_forward_pass():
    model = micro().train()
    with sampling.replay(train.draw_noise(model, 2, "cpu")):
        assert model(random_images(2, 32, "cpu")).gates.shape == (8, 2, 2)


def test_a_training_step_that_is_wrong_gets_no_speed(monkeypatch, tmp_path):
    """The backward pass alone is wrong, of the very model that is timed."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(context, y):
            return y.clone()

        @staticmethod
        def backward(context, grad):
            return grad * 1.1

    from ops.selective_scan import reference

    right = reference.ssm_branch
    monkeypatch.setattr(
        reference, "ssm_branch", lambda *args, **kwargs: Wrong.apply(right(*args, **kwargs))
    )
    monkeypatch.setenv("DYVM_BACKEND", "torch")
    args = SimpleNamespace(**vars(ARGS) | {"retries": 0, "seconds": 0, "profile": False})
    record = train.measure("dyvm", args)
    assert record["steps"] == {} and record["wrong"] == ["DyVM", "release-like, reference"]


@pytest.mark.parametrize("ours", [True, False])
def test_dense_steps_are_checked_on_the_model_that_is_timed(monkeypatch, ours):
    if ours and not onednn.works():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(onednn, "is_faster", lambda: ours)
    built = []
    create = timm.create_model

    def smaller(name, **kwargs):
        built.append(name)
        return create(name, **kwargs, **({"depth": 2} if name.startswith("vim") else {}))

    monkeypatch.setattr(timm, "create_model", smaller)
    args = SimpleNamespace(
        **vars(ARGS) | {"dense_size": "T", "retries": 0, "seconds": 0, "profile": False}
    )
    kept = []
    record = train.measure(
        "dense", args, lambda r: kept.append((len(r["memory"]), len(r["steps"])))
    )
    names = {"Vim-T", "DeiT-T"} | ({"DeiT-T, oneDNN"} if ours else set())
    count = len(names)
    assert kept == [(0, 0), (count, 0), (count, count)]  # in case the time runs out
    assert built == ["vim_tiny", "deit_tiny_patch16_224"]
    assert (
        record["errors"].keys() == {"Vim-T"}
        and record["errors"]["Vim-T"] < 1e-3
        and record["wrong"] == []
    )
    assert record["steps"].keys() == record["memory"].keys() == names
    assert "Vim-T" in train.table(record)
