"""Thresholds of tokens are chosen so that the mean image costs what the fixed budget does."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.exports import decided
from helpers.runs import loaded
from helpers.seeing import DYNAMIC, SMALL, save_model

from evaluation import calibration
from evaluation.calibration import calibrate_tokens, nearest_threshold
from models.flops import flops_per_image
from utils.errors import UserError


def test_the_mean_cost_is_met_where_images_with_more_patches_open_more_gates(tmp_path, monkeypatch):
    """The mean numbers of patches are then not enough."""
    experiment, model = loaded(decided(save_model(tmp_path / "model.pth", *DYNAMIC, *SMALL)))

    def cost() -> float:
        own = fixed = 0.0
        with torch.no_grad():
            for batch in experiment.data.calibration_loader.batches():
                result = model(batch.images)
                own += flops_per_image(model, result.gates, result.counts).exact.sum().item()
                fixed += flops_per_image(model, result.gates).exact.sum().item()
        return own / fixed

    def open_by_number(_module, _inputs, result):
        opened = torch.stack(result.counts).sum(0).argsort().argsort() * 2 >= result.gates.shape[1]
        return dataclasses.replace(
            result, gates=opened[None, :, None].expand_as(result.gates).float()
        )

    model.register_forward_hook(open_by_number)
    with monkeypatch.context() as patched:
        patched.setattr(calibration, "COST_PASSES", 1)  # none follows what it finds
        calibrate_tokens({"model": model, "ema": None}, experiment)
    assert cost() > 1.01, "the test needs a model that costs more than its numbers say"
    found = calibrate_tokens({"model": model, "ema": None}, experiment)
    assert found == {"model": list(model.reduction.thresholds)}
    assert cost() == pytest.approx(1, abs=0.001)


def test_steps_follow_what_the_last_one_did(tmp_path: Path, monkeypatch, caplog):
    """Where a step changes the cost thrice as much as expected, the next one does not."""
    experiment, model = loaded(decided(save_model(tmp_path / "model.pth", *DYNAMIC, *SMALL)))
    seen, scaled, cost = calibration._Seen, calibration._Seen.scaled, calibration._Seen.cost
    factors, shares = [], []

    def costs(own, model):
        share, slope, kept = cost(own, model)
        share = 1.01 * share if not shares else shares[0] + 3 * slope * (factors[-1] - 1)
        shares[:1] = shares[:1] or [share]
        return share, slope, kept

    def overshooting(own, factor):
        factors.append(factors[-1] * factor if factors else factor)
        return scaled(own, 1.0)

    monkeypatch.setattr(seen, "cost", costs)
    monkeypatch.setattr(seen, "scaled", overshooting)
    with caplog.at_level("INFO"):
        calibrate_tokens({"model": model, "ema": None}, experiment)
    share = float(re.search(r"at ([\d.]+) % of its cost", caplog.text)[1])
    assert len(factors) == 2 and share == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("stage", [0, 1])
def test_scores_that_are_no_numbers(tmp_path: Path, stage):
    experiment, model = loaded(save_model(tmp_path / "model.pth", *DYNAMIC, *SMALL))
    with torch.no_grad():
        next(model.score_predictors[stage].parameters()).fill_(math.nan)
    with pytest.raises(UserError, match=f"stage {stage + 1} scores patches of training data with"):
        calibrate_tokens({"model": model, "ema": None}, experiment)


def test_equal_scores_are_told(tmp_path: Path, caplog):
    experiment, model = loaded(save_model(tmp_path / "model.pth", *DYNAMIC, *SMALL))
    with torch.no_grad():
        for weight in model.score_predictors.parameters():
            weight.zero_()
    calibrate_tokens({"model": model, "ema": None}, experiment)
    assert "no thresholds of the model's tokens that come closer were found" in caplog.text


@pytest.mark.parametrize(
    "share, exceed",
    [(0.05, 1), (0.1, 1), (0.4, 1), (0.6, 9), (0.8, 9), (0.94, 9), (0.96, 10), (1, 10)],
)
def test_equal_scores_go_together(share, exceed):
    values = torch.tensor([2.0, 2, 3, 2, 2, 2, 1, 2, 2, 2])
    assert (values > nearest_threshold(values, share)).sum() == exceed
