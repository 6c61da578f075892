"""The models as timm and what is built on it use them: names, features, heads, layer decay."""

import copy
import pickle

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2

import models
from models import FAMILIES, DynamicVisionMamba, VisionMamba

SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=4)
NAMES = ["vim_tiny", "dyvm_vim_tiny", "videomamba_tiny", "dyvm_videomamba_tiny", "mambareg_tiny"]
STAGES = dict(pruning_layers=(1, 3), token_keep=(0.7, 0.4))
REGISTERS = dict(num_registers=4, register_reduction=2)


def build(name: str, **kwargs):
    torch.manual_seed(0)
    stages = STAGES if name.startswith("dyvm_") else {}
    registers = REGISTERS if "mambareg" in name else {}
    return timm.create_model(name, **(SMALL | stages | registers | kwargs)).eval()


@pytest.mark.parametrize("name", NAMES)
def test_create_model_takes_timms_arguments(name):
    model = build(name, num_classes=3, in_chans=1, drop_path_rate=0.1)
    assert model(torch.randn(2, 1, 32, 32)).logits.shape == (2, 3)
    assert model.pretrained_cfg["input_size"] == (1, 32, 32)
    with pytest.raises(TypeError, match="typo"):
        build(name, typo=1)
    with pytest.raises(ValueError, match="--model-path"):
        build(name, pretrained=True)


def test_every_configuration_says_the_truth():
    with torch.device("meta"):
        for name in models.model_names():
            model = timm.create_model(name)
            config = model.pretrained_cfg
            modules = dict(model.named_modules())
            assert config["input_size"] == (3, *model.patch_embed.img_size)
            assert isinstance(modules[config["first_conv"]], torch.nn.Conv2d)
            assert modules[config["classifier"]].out_features == config["num_classes"] == 1000
            assert config["architecture"] == name


def test_data_configuration_follows_the_model():
    assert resolve_model_data_config(build("vim_tiny", img_size=64))["input_size"] == (3, 64, 64)
    config = resolve_model_data_config(timm.create_model("vim_micro", num_classes=10))
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 32), 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_heads(name):
    model, images = build(name, num_classes=5), torch.randn(2, 3, 32, 32)
    result = model(images)
    features = model.forward_features(images)
    assert features.logits is None
    assert torch.equal(model.forward_head(features), result.logits)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(images).logits.shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert torch.equal(model(images).logits, pre_logits)
    headless = build(name, num_classes=0)
    headless.load_state_dict(model.state_dict())
    assert torch.equal(headless(images).logits, pre_logits)


def test_pooling():
    images = torch.randn(2, 3, 32, 32)
    for class_token in (True, False):
        model = build("dyvm_vim_tiny", class_token=class_token, global_pool="avg", num_classes=0)
        result = model(images)
        torch.testing.assert_close(result.logits, result.tokens.mean(1))
    model.train()
    result = model(images)
    means = [
        tokens[alive > 0].mean(0) for tokens, alive in zip(result.tokens, result.alive, strict=True)
    ]
    torch.testing.assert_close(result.logits, torch.stack(means))
    with pytest.raises(ValueError, match="'token' needs a class token"):
        model.reset_classifier(3, "token")
    with pytest.raises(ValueError, match="'max' must be one of token, avg"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="reads its registers"):
        build("mambareg_tiny", global_pool="avg")
    with pytest.raises(ValueError, match="reads its registers"):
        build("mambareg_tiny", class_token=False)


@pytest.mark.parametrize("name", ["vim_tiny", "dyvm_vim_tiny"])
def test_no_class_token(name):
    model = build(name, class_token=False, num_classes=5)
    assert "cls_token" not in model.state_dict() and model.pos_embed.shape == (1, 16, 16)
    images = torch.randn(3, 3, 32, 32)
    whole = model(images)
    assert whole.class_tokens.shape == (3, 0, 16) and whole.tokens.shape[1] in (16, 6)
    with torch.no_grad():  # another path on a CPU: some images at a time
        torch.testing.assert_close(model(images).logits, whole.logits)
    assert model.train()(images).logits.shape == (3, 5)


@pytest.mark.parametrize("name", NAMES)
def test_intermediates(name):
    model, images = build(name, num_classes=0), torch.randn(2, 3, 32, 32)
    result, maps = model.forward_intermediates(images)
    assert [tuple(one.shape) for one in maps] == [(2, 16, 4, 4)] * 4
    assert torch.equal(result.tokens, model(images).tokens)
    for indices, layers in ((2, (2, 3)), ([0, 2], (0, 2)), ([-1], (3,))):
        for stop_early in (False, True):
            some = model.forward_intermediates(
                images, indices, stop_early=stop_early, intermediates_only=True
            )
            assert all(torch.equal(a, maps[i]) for a, i in zip(some, layers, strict=True))
    rows = model.forward_intermediates(images, 1, output_fmt="NLC", intermediates_only=True)[0]
    assert torch.equal(rows, maps[3].flatten(2).transpose(1, 2))
    [(one, prefix)] = model.forward_intermediates(
        images, 1, return_prefix_tokens=True, norm=True, intermediates_only=True
    )
    assert prefix.shape == (2, model.num_prefix_tokens, 16)
    torch.testing.assert_close(prefix, result.class_tokens)
    normed = one.flatten(2).transpose(1, 2).gather(1, result.origin[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(normed, result.tokens)
    named = model.forward_intermediates(images, 2, output_dict=True, return_prefix_tokens=True)
    assert set(named) == {"image_features", "image_intermediates", "image_intermediates_prefix"}
    with pytest.raises(ValueError, match="NCHW or NLC"):
        model.forward_intermediates(images, output_fmt="NHWC")


@pytest.mark.parametrize("kind", ["hidden", "residual"])
def test_maps_keep_the_last_value_of_a_dropped_patch(kind):
    model, images = build("dyvm_vim_tiny"), torch.randn(2, 3, 32, 32)
    dense = timm.create_model("vim_tiny", **SMALL).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    for layer in model.layers:  # all scans run, as in the dense model
        torch.nn.init.zeros_(layer.mixer.block_head.weight)
    result = model.forward_features(images, range(4), kind)
    same = dense.forward_features(images, [0], kind).maps[0]
    assert torch.equal(result.maps[0], same)
    gone = torch.ones(2, 16, dtype=torch.bool).scatter(1, result.kept[0], False)
    for layer in (1, 2, 3):
        now = result.maps[layer].flatten(2).transpose(1, 2)
        assert torch.equal(now[gone], same.flatten(2).transpose(1, 2)[gone])
        assert (now[~gone] != same.flatten(2).transpose(1, 2)[~gone]).any()
    for image, owner in enumerate(result.owner):
        alive = owner >= 0
        assert torch.equal(result.origin[image][owner[alive]], alive.nonzero()[:, 0])
        assert set(alive.nonzero()[:, 0].tolist()) == set(result.kept[-1][image].tolist())


def test_maps_are_the_same_in_training_and_evaluation(monkeypatch):
    """For equal decisions; gates are open in both."""
    model, images = build("dyvm_vim_tiny", route_blocks=False), torch.randn(2, 3, 32, 32)
    pruned = model.forward_features(images, range(4))
    decisions = []
    slots = torch.arange(16).expand(2, -1)
    for kept in pruned.kept:
        alive = torch.zeros(2, 16).scatter(1, kept, 1.0)
        decisions.append(alive.gather(1, slots))
        slots = torch.stack(
            [torch.cat([k, s[~torch.isin(s, k)]]) for k, s in zip(kept, slots, strict=True)]
        )
    monkeypatch.setattr(
        models.sampling, "keep_decision", lambda log_probs, name, *_: decisions[int(name[-1])]
    )
    masked = model.train().forward_features(images, range(4))
    for layer in range(4):
        torch.testing.assert_close(masked.maps[layer], pruned.maps[layer], atol=1e-5, rtol=1e-5)
    assert torch.equal(masked.owner, pruned.owner)


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    images = torch.randn(2, 3, 32, 32)
    net = build(name, features_only=True, out_indices=(0, 2))
    assert isinstance(net, FeatureGetterNet)
    assert net.feature_info.channels() == [16, 16] and net.feature_info.reduction() == [8, 8]
    model = build(name, num_classes=0)
    net.model.load_state_dict(model.state_dict(), strict=False)
    whole = model.forward_intermediates(images, [0, 2])[1]
    assert all(torch.equal(a, b) for a, b in zip(net(images), whole, strict=True))
    assert len(net.model.layers) == 3 and net.model.num_classes == 0
    assert not any(name.startswith(("norm_f", "head")) for name, _ in net.model.named_parameters())
    images.requires_grad_()
    sum(one.square().mean() for one in net.train()(images)).backward()
    assert images.grad.any()


def test_a_model_whose_last_layers_were_removed_still_runs():
    model = build("dyvm_vim_tiny")
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert (model.depth, model.pruning_layers, model.token_keep) == (2, (1,), (0.7,))
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 16)


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay(name):
    model = build(name, num_classes=5)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    groups = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    scales = {name: groups[id(p)] for name, p in model.named_parameters()}
    assert {scales[key][0] for key in scales if key.startswith(("patch_embed", "pos_embed"))} == {
        0.5**5
    }
    for i in range(4):
        found = {scale for key, (scale, _) in scales.items() if key.startswith(f"layers.{i}.")}
        assert found == {0.5 ** (4 - i)}
    assert {scales[key][0] for key in ("norm_f.weight", "head.weight")} <= {0.5, 1.0}
    assert scales["head.weight"][0] == 1.0
    assert scales["layers.0.mixer.A_log"][1] == scales["pos_embed"][1] == 0.0
    assert scales["layers.0.mixer.in_proj.weight"][1] == 0.1


def test_images_and_patches_need_not_be_square():
    for name in ("vim_tiny", "dyvm_vim_tiny"):
        model = build(name, img_size=(32, 64), patch_size=(8, 16), num_classes=3)
        assert model.patch_embed.grid == (4, 4) and model.pretrained_cfg["input_size"] == (
            3,
            32,
            64,
        )
        model = build(name, img_size=(32, 64), num_classes=3)
        assert model.patch_embed.grid == (4, 8) and model.num_patches == 32
        images = torch.randn(2, 3, 32, 64)
        assert model(images).logits.shape == (2, 3)
        assert model.forward_features(images, [3]).maps[3].shape == (2, 16, 4, 8)
        with pytest.raises(ValueError, match="images are 64 x 32, the model takes 32 x 64"):
            model(images.transpose(2, 3))
    with pytest.raises(ValueError, match="image size 63 leaves 7 pixels"):
        build("vim_tiny", img_size=(32, 63))
    with pytest.raises(ValueError, match="img_size must be a positive integer"):
        build("vim_tiny", img_size=(32, 32, 32))


def test_a_dense_model_answers_for_itself():
    model = VisionMamba(FAMILIES["vim"], **SMALL)
    assert (model.pruning_layers, model.token_keep, model.kept_counts()) == ((), (), [])
    assert not model.route_blocks and model.gate_threshold == 0
    model.set_token_keep(0.5)
    model.set_gate_threshold(1.0)
    assert model.token_keep == () and model.gate_threshold == 1


@pytest.mark.parametrize("name", ["vim_tiny", "dyvm_vim_tiny"])
def test_copies(name):
    model, images = build(name), torch.randn(2, 3, 32, 32)
    expected = model(images).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(images).logits, expected)
    if isinstance(model, DynamicVisionMamba):
        other = copy.deepcopy(model)
        other.set_token_keep(0.2)
        assert model.token_keep == STAGES["token_keep"]


def test_a_decoder_of_segmentation_models_pytorch():
    smp = pytest.importorskip(
        "segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed"
    )
    model = smp.DPT(
        "tu-vim_tiny",
        encoder_depth=4,
        encoder_weights=None,
        classes=5,
        decoder_intermediate_channels=(16, 16, 16, 16),
        decoder_fusion_channels=16,
        img_size=64,
        embed_dim=32,
    )
    maps = model(torch.randn(2, 3, 64, 64))
    assert maps.shape == (2, 5, 64, 64)
    maps.mean().backward()
    assert model.encoder.model.layers[0].mixer.in_proj.weight.grad.any()
