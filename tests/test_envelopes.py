"""Checkpoints of other programs: loaded where there is one way to read them, else one line."""

import sys
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.build import recorded_arguments
from tasks import task_of_checkpoint
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

STATE = {"patch_embed.proj.weight": torch.ones(2, 3, 4, 4), "head.bias": torch.arange(2.0)}


def under(prefix: str) -> dict:
    return {prefix + key: value for key, value in STATE.items()}


def loaded(tmp_path, content) -> dict:
    torch.save(content, tmp_path / "w.pth")
    return load_checkpoint(tmp_path / "w.pth")


def is_state(state) -> bool:
    return state.keys() == STATE.keys() and all(torch.equal(state[k], STATE[k]) for k in STATE)


@pytest.mark.parametrize(
    "content",
    [
        {"model": under("module.")},
        under("_orig_mod."),
        {"model": under("module._orig_mod.")},
        {"model": {"n_averaged": torch.tensor(3)} | under("module.")},
        {"state_dict": under("model.") | {"loss.weight": torch.ones(2)}, "epoch": 1},
        {"state_dict": STATE, "arch": "vim_tiny"},
        {"model": {"name": "vim"}, "state_dict": STATE},
        {"net": STATE, "optimizer": {"state": {}, "param_groups": []}},
        {"model": {key: value.numpy() for key, value in STATE.items()}},
    ],
)
def test_weights_in_any_envelope_under_any_prefix(tmp_path, content):
    assert is_state(loaded(tmp_path, content)["model"])


def test_parts_of_one_layer_may_be_wrapped_too(tmp_path):
    state = {"patch_embed._orig_mod.proj.weight": 1, "head._fsdp_wrapped_module.bias": 2}
    state = dict(zip(state, STATE.values(), strict=True))
    assert is_state(loaded(tmp_path, state)["model"])


def test_prefixes_and_what_they_leave_out_are_told(tmp_path, caplog):
    with caplog.at_level("INFO"):
        loaded(tmp_path, {"state_dict": under("model.") | {"loss.weight": torch.ones(2)}})
    assert "the weights are those under 'model.'; left out: loss.weight" in caplog.text


@pytest.mark.parametrize("name", ["ema", "model_ema", "state_dict_ema"])
def test_averages_of_other_programs(tmp_path, name):
    content = loaded(tmp_path, {"model": STATE, name: under("module.")})
    assert is_state(content["ema"]) and "model_ema" not in content


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"state_dict": under("student.") | under("teacher.")}, "several models, under student., "),
        ({"generator": STATE, "critic": STATE}, "no 'model' entry.* but weights in generator, cri"),
        ({"epoch": 1}, r"no 'model' entry .*\(it holds epoch\)"),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path, content, reason):
    with pytest.raises(UserError, match=reason):
        loaded(tmp_path, content)


def test_harmless_extras_become_plain_values(tmp_path):
    extras = {
        "best": np.float64(91.5),
        "count": np.int64(3),
        "done": np.bool_(True),
        "history": [np.float32(0.5), (Path("a/b"),)],
        "counts": np.arange(3),
        "by_name": defaultdict(list, {"a": [1]}),
    }
    content = loaded(tmp_path, {"model": STATE, **extras})
    assert content["best"] == 91.5 and type(content["best"]) is float
    assert content["count"] == 3 and content["done"] is True
    assert content["history"] == [0.5, ("a/b",)]
    assert content["counts"].tolist() == [0, 1, 2] and content["by_name"] == {"a": [1]}


def test_lightnings_hyper_parameters(tmp_path, monkeypatch):
    module = types.ModuleType("pytorch_lightning.utilities.parsing")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.utilities", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    content = {"state_dict": under("net."), "hyper_parameters": module.AttributeDict(lr=0.1)}
    found = loaded(tmp_path, content)
    assert is_state(found["model"]) and found["hyper_parameters"] == {"lr": 0.1}


@pytest.mark.parametrize(
    "entries",
    [
        {"ema": 0.9999},
        {"ema": {"decay": 0.99}},
        {"ema": {"shadow": torch.ones(2)}},
        {"model_ema": under("student.") | under("teacher.")},
        {"args": {"method": "mae", "lr": 1e-3}},
        {"args": {"method": "dyvm"}},
        {"args": "--lr 1e-3"},
        {"task": "finetune"},
        {"task": ["finetune"], "family": ["vim"], "grid": "14x14", "gate_threshold": 0.5},
    ],
)
def test_entries_of_our_names_with_other_meanings(tmp_path, entries):
    content = loaded(tmp_path, {"model": STATE, **entries})
    assert is_state(content["model"]) and content.get("ema") is None
    assert recorded_arguments(content) == {}
    assert task_of_checkpoint(content).name == "classification"


@pytest.mark.parametrize(
    "entry, names",
    [
        ({"class_names": {0: "cat", 1: "dog"}}, ["cat", "dog"]),
        ({"class_names": {"1": "dog", "0": "cat"}}, ["cat", "dog"]),
        ({"class_names": {"dog": 1, "cat": 0}}, ["cat", "dog"]),
        ({"class_names": np.array(["cat", "dog"])}, ["cat", "dog"]),
        ({"class_to_idx": {"dog": 1, "cat": 0}}, ["cat", "dog"]),
        ({"meta": {"CLASSES": ("bed ", "dog")}}, ["bed", "dog"]),
        ({"class_names": "cat, dog"}, None),
        ({"class_names": {0: "cat", 2: "dog"}}, None),
    ],
)
def test_class_names_in_any_form(tmp_path, entry, names):
    assert loaded(tmp_path, {"model": STATE, **entry}).get("class_names") == names


def test_the_content_decides_not_the_name(tmp_path):
    save_file(STATE, tmp_path / "w.pth")
    torch.save({"model": STATE}, tmp_path / "w.safetensors")
    save_file(STATE, tmp_path / "W.SAFETENSORS")
    for name in ("w.pth", "w.safetensors", "W.SAFETENSORS"):
        assert is_state(load_checkpoint(tmp_path / name)["model"])
    save_file(under("module."), tmp_path / "w.pth")
    assert is_state(load_checkpoint(tmp_path / "w.pth")["model"])
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:60])
    with pytest.raises(UserError, match="w.pth: it is safetensors, and cut off"):
        load_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "content, kind",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer .*"),
        (b"\n<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"<?xml version='1.0'?><Error/>", "an XML text"),
        (b'{"message": "Not Found"}', "a JSON text"),
        (b"\x1f\x8b\x08\0\0\0", "a gzip archive"),
    ],
)
def test_files_that_are_something_else_are_called_so(tmp_path, content, kind, ending):
    (tmp_path / f"w.{ending}").write_bytes(content)
    with pytest.raises(UserError, match=f"cannot load checkpoint .*: it is {kind}"):
        load_checkpoint(tmp_path / f"w.{ending}")


def test_a_content_that_contains_itself_is_refused(tmp_path):
    loop = []
    loop.append(loop)
    torch.save({"model": STATE, "loop": loop}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="it is damaged: a part of it contains itself"):
        load_checkpoint(tmp_path / "w.pth")


def test_whole_models_are_told_how_to_be_stored(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"it holds torch.nn.*Linear, .* or the model's state_dict"):
        load_checkpoint(tmp_path / "w.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "w.pth")
    with pytest.raises(UserError, match="it is a TorchScript program"):
        load_checkpoint(tmp_path / "w.pth")
