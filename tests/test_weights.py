"""Strict loading: what may differ, what is refused, and with which words."""

import argparse
import pickle

import pytest
import torch
from safetensors.torch import save_file

from models import FAMILIES, DynamicVisionMamba, VisionMamba
from models.weights import checkpoint_family, load_weights, resize_pos_embed
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=3, num_classes=7)


def dense(family="vim", **kwargs):
    return VisionMamba(FAMILIES[family], **(SMALL | kwargs))


def dynamic(family="vim", **kwargs):
    return DynamicVisionMamba(
        FAMILIES[family], pruning_layers=(1,), token_keep=(0.5,), **(SMALL | kwargs)
    )


def test_official_envelopes_load(tmp_path):
    """{'model': state, ...} with an argparse.Namespace, a bare state dict, and safetensors."""
    source = dense()
    torch.save(
        {
            "model": source.state_dict(),
            "args": argparse.Namespace(model="vim_small_patch16"),
            "epoch": 3,
        },
        tmp_path / "envelope.pth",
    )
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    save_file(
        {key: value.contiguous() for key, value in source.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    images = torch.randn(2, 3, 32, 32)
    expected = source.eval()(images).logits
    for name in ("envelope.pth", "bare.pth", "w.safetensors"):
        model = dense().eval()
        load_weights(model, load_checkpoint(tmp_path / name), name)
        assert torch.equal(model(images).logits, expected)


def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(UserError, match="evil.pth.*nothing in it was executed"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_new_parts_alone_may_be_absent_from_a_dense_start():
    state, student = dense().state_dict(), dynamic()
    router = student.layers[0].mixer.block_head.bias.clone()
    load_weights(student, {"model": state}, "dense.pth", from_dense=True)
    assert torch.equal(student.layers[0].mixer.block_head.bias, router) and (router == 5).all()
    assert torch.equal(student.norm_f.weight, state["norm_f.weight"])
    with pytest.raises(UserError, match="missing"):
        load_weights(student, {"model": state}, "dense.pth")
    del state["norm_f.weight"]
    with pytest.raises(UserError, match="1 missing: norm_f.weight"):
        load_weights(student, {"model": state}, "dense.pth", from_dense=True)
    partly = dynamic().state_dict()
    del partly["layers.1.mixer.block_head.bias"]
    with pytest.raises(UserError, match="1 missing: layers.1.mixer.block_head.bias"):
        load_weights(student, {"model": partly}, "partly.pth", from_dense=True)


def test_differences_are_counted_and_listed():
    state = dense().state_dict()
    del state["norm_f.weight"]
    state["extra"] = torch.zeros(1)
    state["layers.0.mixer.D"] = torch.zeros(5)
    with pytest.raises(UserError) as error:
        load_weights(dense(), {"model": state}, "some.pth")
    text = str(error.value)
    assert "1 missing: norm_f.weight" in text and "1 unexpected: extra" in text and "\n" not in text
    assert "1 misshapen: layers.0.mixer.D [5] instead of [32]" in text and "some.pth" in text


def test_a_refused_checkpoint_changes_nothing():
    model = dense()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = dense().state_dict() | {"extra": torch.zeros(1)}
    with pytest.raises(UserError):
        load_weights(model, {"model": state}, "some.pth")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_another_class_count_needs_a_new_head(caplog):
    state = dense(num_classes=11).state_dict()
    with pytest.raises(
        UserError, match="misshapen: head.weight.*trained on 11 classes, the data set has 7"
    ):
        load_weights(dense(), {"model": state}, "eleven.pth")
    with caplog.at_level("INFO"):
        load_weights(dense(), {"model": state}, "eleven.pth", new_head=True)
    assert "head of 11 classes replaced by a new one of 7" in caplog.text
    del state["head.weight"], state["head.bias"]
    with pytest.raises(UserError, match="2 missing: head"):
        load_weights(dense(), {"model": state}, "headless.pth", new_head=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_size_resizes_the_position_embedding(family, caplog):
    small, large = dense(family), dense(family, img_size=48)
    with caplog.at_level("INFO"):
        load_weights(large, {"model": small.state_dict()}, "small.pth")
    assert "resized from 16 to 36 patches" in caplog.text
    row, new_row = small.class_row(), large.class_row()
    expected = resize_pos_embed(small.pos_embed.detach(), (6, 6), row, new_row)
    assert torch.equal(large.pos_embed, expected) and expected.shape[1] == 36 + (row is not None)
    if row is not None:
        assert torch.equal(large.pos_embed[:, new_row], small.pos_embed[:, row])


def test_the_class_row_does_not_leak_into_the_grid():
    table = torch.zeros(1, 17, 4)
    table[:, 8] = 100.0
    resized = resize_pos_embed(table, (6, 6), 8, 18)
    assert (resized[:, 18] == 100).all() and resized.sum() == 400


def test_a_position_embedding_without_a_square_grid_is_refused():
    state = dense().state_dict()
    state["pos_embed"] = torch.zeros(1, 13, 16)
    with pytest.raises(UserError, match="13 rows cannot be resized to 16 patches"):
        load_weights(dense(), {"model": state}, "odd.pth")


def test_families_are_told_apart():
    state = dense("vim").state_dict()
    for checkpoint in (
        {"family": "vim"},
        {"args": argparse.Namespace(model="vim_small_patch16_224")},
        {"args": {"model": "dyvm_vim_micro"}},
    ):
        assert checkpoint_family({"model": state, **checkpoint}) == "vim"
        with pytest.raises(UserError, match="this is a vim checkpoint, the model is a videomamba"):
            load_weights(dense("videomamba"), {"model": state, **checkpoint}, "vim.pth")
    assert checkpoint_family({"model": state}) is None
    assert (
        checkpoint_family({"model": state, "args": argparse.Namespace(model="videomamba_small")})
        == "videomamba"
    )
    with pytest.raises(UserError, match="this is a mambareg checkpoint"):
        load_weights(dense("vim"), {"model": dense("mambareg").state_dict()}, "reg.pth")


@pytest.mark.parametrize(
    "table", [torch.zeros(()), torch.zeros(1, 1, 16), torch.zeros(17, 16), torch.zeros(2, 17, 16)]
)
def test_a_malformed_position_embedding_is_listed(table):
    with pytest.raises(UserError, match="1 misshapen: pos_embed"):
        load_weights(dense(), {"model": dense().state_dict() | {"pos_embed": table}}, "odd.pth")


def test_entries_that_are_no_tensors_are_refused():
    with pytest.raises(UserError, match="name of 'model' are no tensors"):
        load_weights(dense(), {"model": {"name": "x"}}, "odd.pth")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_position_embedding_knows_its_grid(family):
    """The same number of rows, or a square number, does not make two grids the same."""
    wide = dense(family, img_size=(8, 32), patch_size=4)
    assert wide.patch_embed.grid == (2, 8)
    checkpoint = {"model": wide.state_dict(), "grid": [2, 8]}
    same, square, tall = (
        dense(family, img_size=size, patch_size=4) for size in ((8, 32), (16, 16), (32, 8))
    )
    load_weights(same, checkpoint, "wide.pth")
    assert torch.equal(same.pos_embed, wide.pos_embed)
    for model in (square, tall):
        load_weights(model, checkpoint, "wide.pth")
        rows = (wide.class_row(), model.class_row())
        expected = resize_pos_embed(wide.pos_embed.detach(), model.patch_embed.grid, *rows, (2, 8))
        assert torch.equal(model.pos_embed, expected)
        assert not torch.equal(model.pos_embed, wide.pos_embed)
    ramp = torch.arange(16.0).view(1, 16, 1)  # in raster order of 2 x 8: 8 times the row
    resized = resize_pos_embed(ramp, (4, 4), None, None, (2, 8)).view(4, 4)
    assert (resized.diff(dim=0) > 0).all() and (resized.diff(dim=1) > 0).all()
