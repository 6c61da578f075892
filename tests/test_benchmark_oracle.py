"""The benchmark of what a choice of tokens is worth without training: what it keeps, and tells."""

import json
import sys

import pytest
import torch
from helpers.seeing import DYNAMIC, save_model

from benchmarks import oracle
from models.build import ModelSpec, build_model
from models.reduction import staged_before
from utils.checkpoint import load_checkpoint
from utils.errors import UsageError, UserError


def run(monkeypatch, model, *more):
    words = ["oracle.py", "--device", "cpu", "--model-path", str(model), *more]
    monkeypatch.setattr(sys, "argv", words)
    oracle.main()


@pytest.fixture
def dense(tmp_path):
    return save_model(tmp_path / "dense.pth", "--method", "dense", "--data-set", "DIGITS")


def test_with_all_tokens_every_way_is_the_dense_model(dense, tmp_path, monkeypatch, capsys):
    output = tmp_path / "record.json"
    flags = "--pruning-layer 1 --keep 1 0.3 --images 40 --output"
    run(monkeypatch, dense, *flags.split(), str(output), "--", "--batch-size", "16")
    record = json.loads(output.read_text())
    top1 = record["top1"]
    whole = top1.pop("all tokens")
    assert list(top1) == ["importance", "object", "norm", "static", "random"]
    assert {of["1"] for of in top1.values()} == {whole}
    assert len({of["0.3"] for of in top1.values()}) > 1
    assert record["images"] == 40 and record["pruning_layer"] == 1
    assert "top-1, %, keeping" in capsys.readouterr().out


def test_the_largest_given_values_stay(dense):
    spec = ModelSpec.from_checkpoint(load_checkpoint(dense), str(dense))
    model = build_model(spec, 10).eval()
    values = torch.rand(2, model.num_patches)
    with torch.no_grad(), staged_before(model, (2,), oracle.Given([0.25], values)):
        kept = model(torch.rand(2, 3, *model.patch_embed.img_size)).kept[0]
    assert kept.tolist() == values.topk(model.num_patches // 4).indices.sort().values.tolist()
    assert model.pruning_layers == ()


def test_refusals(dense, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="has 4 layers; give 1 to 3"):
        run(monkeypatch, dense, "--pruning-layer", "4")
    with pytest.raises(UsageError, match="--keep 0.001 leaves none of"):
        run(monkeypatch, dense, "--pruning-layer", "1", "--keep", "0.001")
    dynamic = save_model(tmp_path / "dynamic.pth", *DYNAMIC)
    with pytest.raises(UserError, match="dynamic.pth is not a dense classifier"):
        run(monkeypatch, dynamic, "--pruning-layer", "1")
