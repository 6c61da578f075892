"""Models of clips: one sequence of all frames' patches."""

import pytest
import timm
import torch

from benchmarks.checking import set_telling_weights
from models import FAMILIES, VisionMamba
from models.clip_weights import load_images
from models.weights import load_weights
from utils.errors import UserError

SIZES = dict(img_size=16, patch_size=4, embed_dim=32, depth=4, num_classes=5)
CLIPS = dict(SIZES, num_frames=6, tubelet_size=2)
VIDEOMAMBA = FAMILIES["videomamba"]


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def test_a_clip_of_one_frame_is_an_image():
    images, clips = (
        VisionMamba(VIDEOMAMBA, **SIZES, **more).eval() for more in ({}, dict(num_frames=1))
    )
    load_images(clips, {"model": images.state_dict()}, "image model")
    clips.head.load_state_dict(images.head.state_dict())
    batch = torch.randn(3, 3, 16, 16)
    assert torch.equal(clips(batch.unsqueeze(2)).logits, images(batch).logits)


def test_a_clip_that_stands_still_is_seen_as_its_image_in_every_slot():
    images, clips = VisionMamba(VIDEOMAMBA, **SIZES).eval(), VisionMamba(VIDEOMAMBA, **CLIPS).eval()
    load_images(clips, {"model": images.state_dict()}, "image model")
    batch = torch.randn(2, 3, 16, 16)
    patches, class_token = images.embed(batch)
    of_clip, class_of_clip = clips.embed(batch.unsqueeze(2).expand(-1, -1, 6, -1, -1))
    torch.testing.assert_close(of_clip, patches.repeat(1, 3, 1))
    assert torch.equal(class_of_clip, class_token)


def test_every_frame_and_its_time_are_read():
    model = VisionMamba(VIDEOMAMBA, **CLIPS).eval()
    set_telling_weights(model)
    torch.nn.init.normal_(model.temporal_pos_embedding)
    clip = torch.randn(1, 3, 6, 16, 16)
    before = model.forward_features(clip).class_tokens
    for frame in range(6):
        changed = clip.clone()
        changed[:, :, frame] += 1
        assert not torch.allclose(model.forward_features(changed).class_tokens, before)
    reverse = clip.flip(2)
    assert not torch.allclose(model.forward_features(reverse).class_tokens, before)


def test_feature_maps_have_an_axis_of_time():
    model = timm.create_model("videomamba_tiny", **CLIPS | dict(depth=3))
    clips = torch.randn(2, 3, 6, 16, 16)
    result, maps = model.forward_intermediates(clips, indices=[0, 2])
    assert [list(m.shape) for m in maps] == [[2, 32, 3, 4, 4]] * 2
    rows = maps[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(model._normed(rows, True), result.tokens)
    features = timm.create_model("videomamba_tiny", features_only=True, out_indices=[1], **CLIPS)
    assert list(features(clips)[0].shape) == [2, 32, 3, 4, 4]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            dict(num_frames=7, tubelet_size=2),
            "num_frames 7 is not divided by tubelet_size 2; 6 and 8",
        ),
        (dict(num_frames=1, tubelet_size=2), "tubelet_size 2; 2 fits"),
        (dict(num_frames=0), "num_frames must be a positive integer"),
        (dict(tubelet_size=2), "give num_frames too"),
        (dict(num_frames=4, class_token=False), "with their class token"),
    ],
)
def test_sizes_that_do_not_fit(wrong, words):
    with pytest.raises(ValueError, match=words):
        VisionMamba(VIDEOMAMBA, **SIZES, **wrong)


def test_other_families_have_no_clips():
    with pytest.raises(ValueError, match="num_frames is for videomamba"):
        VisionMamba(FAMILIES["vim"], **SIZES, num_frames=4)


def test_clips_of_another_length_or_size():
    model = VisionMamba(VIDEOMAMBA, **CLIPS)
    with pytest.raises(ValueError, match=r"clips are \[B, 3, 6, H, W\].*not \[1, 3, 5, 16, 16\]"):
        model(torch.zeros(1, 3, 5, 16, 16))
    with pytest.raises(ValueError, match="images are 16 x 20"):
        model(torch.zeros(1, 3, 6, 16, 20))


def test_weights_of_images_and_of_clips_are_told_apart():
    images, clips = VisionMamba(VIDEOMAMBA, **SIZES), VisionMamba(VIDEOMAMBA, **CLIPS)
    with pytest.raises(UserError, match="old.pth: this is a checkpoint of images"):
        load_weights(clips, {"model": images.state_dict()}, "old.pth")
    with pytest.raises(UserError, match=r"old.pth: this is a checkpoint of clips \(3 temporal"):
        load_weights(images, {"model": clips.state_dict()}, "old.pth")


def test_a_temporal_table_of_another_length_is_resampled_and_told(caplog):
    old, new = (
        VisionMamba(VIDEOMAMBA, **CLIPS),
        VisionMamba(VIDEOMAMBA, **CLIPS | dict(num_frames=8)),
    )
    torch.nn.init.normal_(old.temporal_pos_embedding)
    with caplog.at_level("INFO"):
        load_weights(new, {"model": old.state_dict()}, "k400_f64.pth")
    assert "k400_f64.pth: temporal position embedding resampled from 3 to 4" in caplog.text
    ends = new.temporal_pos_embedding[:, [0, -1]]
    torch.testing.assert_close(ends, old.temporal_pos_embedding[:, [0, -1]])


def test_layer_decay_and_weight_decay_know_the_temporal_table():
    model = VisionMamba(VIDEOMAMBA, **CLIPS)
    assert "temporal_pos_embedding" in model.no_weight_decay()
    assert not model.temporal_pos_embedding.any() and not model.cls_token.any()
