"""Weights that do not fit although their shapes do."""

import argparse

import pytest
import torch
from test_weights import dense, dynamic

from models import fitting
from models.build import restore
from models.clip_weights import load_images
from models.segmentation import as_segmenter, make_head
from models.segmentation_weights import load_backbone
from models.weights import load_weights
from training import Training
from utils.errors import UserError


@pytest.fixture(autouse=True)
def doubts_are_told_anew():
    fitting.doubt_family.cache_clear()


def warnings_of(caplog) -> list:
    return [record for record in caplog.records if record.levelname == "WARNING"]


def broken(value: float = float("nan")) -> dict:
    state = dense().state_dict()
    state["norm_f.weight"] = state["norm_f.weight"] * value
    return state


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    """For a model, its teacher, its average, a student, a fine-tuning, and a run to resume."""
    message = r"w.pth( .EMA.)?: 1 of its \d+ tensors hold NaN or infinity.* finite .norm_f.weight"
    checkpoint, good = {"model": broken(value)}, {"model": dense().state_dict()}
    for model, settings in (
        (dense(), {}),
        (dense(), {"new_head": True}),
        (dynamic(), {"from_dense": True}),
    ):
        before = model.norm_f.weight.clone()
        with pytest.raises(UserError, match=message):
            load_weights(model, checkpoint, "w.pth", **settings)
        assert torch.equal(model.norm_f.weight, before)
    with pytest.raises(UserError, match=message):
        restore(dense(), good | {"ema": checkpoint["model"]}, "w.pth", ema=True)
    with pytest.raises(UserError, match=message):
        load_backbone(segmenter(), {"model": dense(depth=4).state_dict() | broken()}, "w.pth")
    training = argparse.Namespace(model=dense(), ema=None)
    with pytest.raises(UserError, match="the run to resume, entry 'ema': 1 of its 58"):
        Training.load_state_dict(training, good | {"ema": checkpoint["model"]})


def segmenter():
    model = dense(class_token=False, num_classes=0, depth=4)
    as_segmenter(model, make_head("light", model, 4), 4)
    return model


def test_quantised_weights_are_refused():
    state = dense().state_dict()
    state["head.weight"] = state["head.weight"].to(torch.int8)
    with pytest.raises(UserError, match="1 of its 58 .* torch.int8 .* .head.weight"):
        load_weights(dense(), {"model": state}, "w.pth")
    half = {key: value.half() for key, value in dense().state_dict().items()}
    load_weights(dense(), {"model": half}, "w.pth")


@pytest.mark.parametrize("trained, built", [(4, 8), (8, 4), (2, 8)])
@pytest.mark.parametrize("recorded", [True, False])
def test_patches_at_another_stride(trained, built, recorded, caplog):
    source, model = dense(stride=trained), dense(stride=built)
    checkpoint = {"model": source.state_dict(), "family": "vim"}
    checkpoint |= {"stride": [trained, trained]} if recorded else {}
    before = model.pos_embed.clone()
    with pytest.raises(UserError, match=f"w.pth: its .* give --model-kwargs stride={trained}"):
        load_weights(model, checkpoint, "w.pth")
    with pytest.raises(UserError, match=f"stride={trained}"):
        load_weights(dynamic(stride=built), checkpoint, "w.pth", from_dense=True)
    assert torch.equal(model.pos_embed, before)
    load_weights(dense(stride=trained), checkpoint, "w.pth")
    assert not warnings_of(caplog)
    load_weights(model, checkpoint, "w.pth", new_head=True)  # a fine-tuning may change it
    assert f"stride={trained}" in caplog.text and "position embedding is resized" in caplog.text
    if built == 8:
        load_backbone(segmenter(), {"model": dense(depth=4, stride=trained).state_dict()}, "s.pth")
        assert "s.pth: its" in caplog.text


def test_another_image_size_is_no_other_stride(caplog):
    for size in (24, 40, 48, 64, 72):
        state = {"model": dense(img_size=size).state_dict(), "family": "vim"}
        load_weights(dense(), state, "w.pth")
    # 7 x 7 patches are those of 56 pixels, or of stride 4: only a record tells.
    state = {"model": dense(img_size=56).state_dict(), "family": "vim"}
    with pytest.raises(UserError, match="trained at stride 8 and 56 pixels, --input-size 56"):
        load_weights(dense(), state, "w.pth")
    load_weights(dense(img_size=56), state, "w.pth")
    load_weights(dense(), state | {"stride": [8, 8]}, "w.pth")
    assert not warnings_of(caplog)


def test_a_file_that_names_no_family_is_doubted(caplog):
    """Vim's and VideoMamba's weights have the same shapes, and give other answers."""
    vim, videomamba = dense("vim").eval(), dense("videomamba").eval()
    state = vim.state_dict()
    torch.nn.init.normal_(state["head.weight"])
    for model in (vim, videomamba):
        load_weights(model, {"model": state}, f"{model.family.name}.pth")
        assert f"{model.family.name}.pth does not say which family it is of" in caplog.text
    images = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(vim(images).logits, videomamba(images).logits, atol=1e-3)
    told = len(warnings_of(caplog))
    load_weights(vim, {"model": state}, "vim.pth")  # the teacher, from the student's file
    load_weights(vim, {"model": state, "arch": "vim_tiny"}, "timm.pth")
    load_weights(dense("mambareg"), {"model": dense("mambareg").state_dict()}, "r.pth")
    assert len(warnings_of(caplog)) == told
    load_backbone(segmenter(), {"model": dense(depth=4).state_dict()}, "segmenter.pth")
    assert "segmenter.pth does not say which family" in caplog.text
    clips = dense("videomamba", num_frames=2)
    load_images(clips, {"model": state}, "clips.pth")
    assert "clips.pth does not say which family" in caplog.text


def test_weights_of_another_size_name_the_flag_first():
    with pytest.raises(UserError, match="vim model: it has 3 layers of 32 .*choose --model.*missh"):
        load_weights(dense(), {"model": dense(embed_dim=32).state_dict()}, "w.pth")
    with pytest.raises(UserError, match="4 layers of .* the model 3 layers .*choose --model"):
        load_weights(dense(), {"model": dense(depth=4).state_dict()}, "w.pth")
    other = {"model": dense(embed_dim=32, stride=4).state_dict(), "stride": [4, 4]}
    with pytest.raises(UserError, match="it has 3 layers of 32 .*choose --model"):
        load_weights(dense(), other, "w.pth")  # another stride would not help


def test_learned_scores_in_a_model_without_them():
    with pytest.raises(UserError, match="unexpected: score_.*learned scores: leave out --token-st"):
        load_weights(dynamic(token_strategy="static"), {"model": dynamic().state_dict()}, "w.pth")
