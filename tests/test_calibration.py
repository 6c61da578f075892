"""The gate threshold: found on training images, stored in the checkpoint, used by every program
that evaluates it.
"""

import logging
import math

import pytest
import torch
from helpers.runs import evaluated, loaded
from helpers.seeing import DYNAMIC, SMALL, save_model

import options
from engine import validate
from evaluation.calibration import calibrate, calibrate_tokens, quantile_above
from models.build import restore
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UsageError, UserError


def share_kept(gates: list[list[float]]) -> float:
    return sum(map(sum, gates)) / (2 * len(gates))


@pytest.mark.parametrize(
    "method, target", [("dyvm", 0.25), ("dyvm", 0.6), ("dyvm", 0.9), ("block", 0.25)]
)
def test_the_target_is_met_on_training_and_on_validation_images(tmp_path, method, target):
    flags = ["--method", method, *DYNAMIC[2:]]
    path = save_model(tmp_path / "model.pth", *flags)
    experiment, model = loaded(path, "--block-keep-ratio", str(target))
    data = experiment.data
    before = share_kept(validate(model, experiment)["gates"])
    assert abs(before - target) > 0.01  # or there is nothing to show
    found = calibrate({"model": model, "ema": None}, experiment)
    assert found == {"model": model.gate_threshold}
    with torch.no_grad():
        seen = [
            model(batch.images).gates.mean().item() * len(batch.images)
            for batch in data.calibration_loader.batches()
        ]
    assert (
        abs(sum(seen) / len(data.train) - target) < 0.003
    )  # all of the digits' 1437 training images
    assert abs(share_kept(validate(model, experiment)["gates"]) - target) < 0.02  # 360 others


def test_the_images_are_shown_as_in_evaluation(tmp_path):
    experiment, _ = loaded(
        save_model(tmp_path / "model.pth", *DYNAMIC), "--subset", "50", "--batch-size", "16"
    )
    first = [
        torch.cat([batch.images for batch in experiment.data.calibration_loader.batches()])
        for _ in range(2)
    ]
    assert len(first[0]) == 50 and torch.equal(*first)


@pytest.mark.parametrize("target", ["0.8", "0.3"])
def test_routers_that_tell_nothing_apart_keep_the_papers_threshold(tmp_path, caplog, target):
    path = save_model(tmp_path / "model.pth", *DYNAMIC)
    experiment, model = loaded(
        path, "--subset", "32", "--batch-size", "16", "--block-keep-ratio", target
    )
    for layer in model.layers:
        torch.nn.init.zeros_(layer.mixer.block_head.weight)
        torch.nn.init.constant_(layer.mixer.block_head.bias, 5)
    with caplog.at_level(logging.WARNING):
        assert calibrate({"model": model}, experiment) == {"model": 0.0}
    assert "hardly tell" in caplog.text


def test_training_images_that_cannot_be_read_are_told(tmp_path, monkeypatch):
    experiment, model = loaded(save_model(tmp_path / "model.pth", *DYNAMIC))
    monkeypatch.setattr(type(experiment.data.calibration_loader), "batches", lambda self: iter(()))
    for choose in (calibrate, calibrate_tokens):
        with pytest.raises(UserError, match="none of that at --data-path can be read"):
            choose({"model": model}, experiment)


def test_a_quantile_lies_between_its_neighbours():
    values = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])
    assert quantile_above(values, 0.4) == 3.5 and quantile_above(values, 0.8) == 1.5
    assert (
        quantile_above(values, 1.0) == 1.5 and quantile_above(values, 0.01) == 4.5
    )  # never all, never none


def test_the_threshold_of_the_checkpoint_and_others(tmp_path, caplog):
    path = save_model(tmp_path / "model.pth", *DYNAMIC, gate_threshold={"model": 1.25, "ema": -2.0})
    checkpoint = load_checkpoint(path)
    save_checkpoint(checkpoint | {"ema": checkpoint["model"]}, path)
    assert loaded(path)[1].gate_threshold == 1.25
    _, model = loaded(path)
    assert restore(model, load_checkpoint(path), str(path), ema=True).gate_threshold == -2.0
    assert loaded(path, "--gate-threshold", "0.5")[1].gate_threshold == 0
    assert loaded(path, "--gate-threshold", "0.9")[1].gate_threshold == pytest.approx(math.log(9))
    assert "no calibrated" not in caplog.text
    with caplog.at_level(logging.INFO):
        assert loaded(save_model(tmp_path / "bare.pth", *DYNAMIC))[1].gate_threshold == 0
    assert "bare.pth holds no calibrated gate threshold: 0.5 is used" in caplog.text


def test_eval_calibrate_writes_a_checkpoint_that_evaluates_so(tmp_path):
    path = save_model(tmp_path / "model.pth", *DYNAMIC, "--block-keep-ratio", "0.3")
    official = load_checkpoint(path)
    told = [
        "--data-set",
        "DIGITS",
        "--model",
        "dyvm_vim_micro",
        *SMALL[:3],
        *DYNAMIC,
        "--block-keep-ratio",
        "0.3",
    ]
    save_checkpoint({"model": official["model"]}, path)
    torch.save(
        torch.load(path, weights_only=True) | {"size": torch.Size([1])}, path
    )  # anything may stand beside it
    before = evaluated(path, tmp_path / "before", *told)
    assert before["gate_threshold"] == 0.5
    after = evaluated(path, tmp_path / "after", *told, "--calibrate")
    assert abs(share_kept(after["gates"]) - 0.3) < 0.02 < abs(share_kept(before["gates"]) - 0.3)
    again = evaluated(tmp_path / "after" / "calibrated_checkpoint.pth", tmp_path / "again", *told)
    assert again["gates"] == after["gates"] and again["gate_threshold"] == after["gate_threshold"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gate-threshold", "0"], "neither `calibrated` nor a probability"),
        (["--gate-threshold", "1"], "neither `calibrated` nor a probability"),
        (["--gate-threshold", "half"], "no number"),
        (["--calibrate"], "--calibrate needs --eval"),
        (
            ["--calibrate", "--eval", "--model-path", "x.pth", "--method", "token"],
            "--calibrate needs --eval",
        ),
        (
            [
                "--calibrate",
                "--eval",
                "--model-path",
                "x.pth",
                "--method",
                "block",
                "--gate-threshold",
                "0.6",
            ],
            "leave out --gate-threshold 0.6",
        ),
    ],
)
def test_mistakes(flags, words):
    with pytest.raises(UsageError, match=words):
        options.parse(flags, {} if "--eval" in flags else None)
