"""The benchmark of exported models: what it times is right, or gets no time."""

import json
import sys

import pytest
import timm

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from benchmarks import exported  # noqa: E402
from benchmarks.model import BLOCK_KEEP, random_images, set_routers  # noqa: E402
from ops import selective_scan  # noqa: E402
from utils.errors import UserError  # noqa: E402


def tiny_models(size, args):
    deit = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=2, num_classes=5
    )
    shape = {"img_size": 32, "embed_dim": 16, "depth": 2, "d_state": 4, "num_classes": 5}
    vim = timm.create_model("vim_micro", **shape)
    dyvm = timm.create_model("dyvm_vim_micro", pruning_layers=(1,), token_keep=0.5, **shape)
    found = {f"DeiT-{size}": deit, f"Vim-{size}": vim, f"DyVM-{size}": dyvm}
    for model in found.values():
        model.eval().requires_grad_(False)
    set_routers(dyvm, random_images(8, 32, "cpu"), BLOCK_KEEP)
    return found


def once(calls, device, rounds, seconds, retries):
    for call in calls.values():
        call()
    return {name: {"ms": 2.0, "cpu_ms": 4.0, "samples": 1, "disturbed": 0} for name in calls}


@pytest.mark.parametrize("fmt", ["onnx", "aoti"])
def test_a_record_and_a_wrong_file(fmt, monkeypatch, tmp_path, capsys):
    if fmt == "aoti" and not selective_scan.available("cpu"):
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(exported, "build", tiny_models)
    monkeypatch.setattr(exported, "interleaved", once)
    output = tmp_path / "record.json"
    flags = f"--format {fmt} --img-size 32 --batch 1 3 --seconds 0 --output"
    monkeypatch.setattr(sys, "argv", ["exported.py", *flags.split(), str(output)])
    export, kept = exported.exported, {}
    monkeypatch.setattr(exported, "exported", lambda *of: kept.update(export(*of)) or kept)
    exported.main()
    record = json.loads(output.read_text())
    assert [part["batch"] for part in record["parts"]] == [1, 3]
    kinds = ["", *exported.KINDS[fmt]]
    names = [f"{model}-T{kind}" for model in ("DeiT", "Vim", "DyVM") for kind in kinds]
    for part in record["parts"]:
        assert list(part["models"]) == names and 0 < part["gain"]["flops_ratio"]
    programs = [own["programs"] for own in record["files"].values()]
    first, *others = (kind.removeprefix(", ") for kind in kinds[1:])
    assert all(each[first]["error"] < 1e-5 for each in programs)
    assert all(1e-5 < each[kind]["error"] for each in programs for kind in others)
    assert f"x DeiT{kinds[1]}" in capsys.readouterr().out
    kept["DyVM-T"]["programs"][kinds[1]].error = 1e-3
    monkeypatch.setattr(exported, "exported", lambda *of: kept)
    with pytest.raises(UserError, match="DyVM-T"):
        exported.main()
    part = json.loads(output.read_text())["parts"][0]
    assert not [name for name in part["models"] if name.startswith("DyVM")] and "gain" not in part
