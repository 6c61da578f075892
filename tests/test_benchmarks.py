"""What the benchmarks rest on: routers set to a share, decisions replayed, the release-like step, what a save loses."""

import json
import sys
from types import SimpleNamespace

import pytest
import timm
import torch

from benchmarks import checking, saving, train
from benchmarks.model import random_images, set_routers
from models import sampling
from utils.checkpoint import save_checkpoint

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


def test_what_a_save_loses_is_what_its_steps_took_beyond_their_neighbours():
    drifting = saving.lost_seconds([1.0] * 5, [1.5, 3.5, 1.5], [2.0] * 5)
    assert drifting == pytest.approx(2.0)  # the neighbours' median is 1.5
    windows = [{"kind": kind, "lost_s": lost} for kind, lost in
               [("save", 0.5), ("control", 0.1), ("control", -0.1), ("save", 0.9), ("save", 0.7), ("control", 0.0)]]
    result = saving.summary(windows)
    assert result["quartiles_of_lost_s"]["difference"] == pytest.approx([0.55, 0.7, 0.85])  # of 0.4, 1.0, 0.7
    assert result["ratio"] == pytest.approx({"median": 60 / 60.7, "upper_quartile_of_loss": 60 / 60.85})


def test_a_save_that_is_damaged_or_differs_gets_no_ratio(tmp_path):
    path, state = tmp_path / "checkpoint.pth", {"model": {"w": torch.arange(5.0)}, "step": 3, "ema": None}
    save_checkpoint(state, path)
    saving.check_saved(path, state)
    with pytest.raises(SystemExit, match="no ratio is reported: model of checkpoint.pth"):
        saving.check_saved(path, state | {"model": {"w": torch.tensor([0.0, 1, 2, 3, 5])}})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="no ratio is reported"):
        saving.check_saved(path, state)


def test_the_record_of_the_cost_of_saving(monkeypatch, tmp_path, capsys):
    output = tmp_path / "saving.json"
    monkeypatch.setattr(sys, "argv", ["saving.py", "--model", "vim_micro", "--batch", "2", "--saves", "3", "--output",
                                      str(output)])
    saving.main()
    record = json.loads(output.read_text())
    kinds = [window["kind"] for window in record["windows"]]
    assert all(sorted(kinds[i:i + 2]) == ["control", "save"] for i in (0, 2, 4))
    assert all((window["blocked_s"] > 0) == (window["kind"] == "save") for window in record["windows"])
    assert 0 < record["ratio"]["upper_quartile_of_loss"] <= record["ratio"]["median"]
    assert f"{record['ratio']['median']:.4f} of the throughput without" in capsys.readouterr().out
