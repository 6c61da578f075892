"""Parity of segmentation with recorded inputs, outputs and gradients of the published
implementation, on every backend that runs here.

Tolerances are those of the recordings' own README.
"""

import pytest
import torch
from helpers import golden
from safetensors.torch import load_file
from torch import Tensor, nn

from losses import Budgets, Objective
from models import FAMILIES, DynamicVisionMamba, VisionMamba, sampling
from models.flops import count_flops, decoder_operations, sequence_lengths
from models.official_names import from_official
from models.segmentation import AUX_MAP, SegmentationHead, as_segmenter, follow_release
from models.upernet import FCNHead, UPerHead, resize
from models.weights import load_weights
from tasks.segmentation import SegmentationTerms
from tasks.sliding_window import sliding_logits, windows

pytestmark = [
    pytest.mark.skipif(
        not golden.GOLDEN_DIR.is_dir(), reason=f"no recorded cases at {golden.GOLDEN_DIR}"
    ),
    pytest.mark.usefixtures("two_threads"),
]

BACKBONES = [
    name
    for name in golden.names("seg_dense_vim_")
    if "num_classes" not in golden.load(name).info["config"]
]
DENSE = [name for name in golden.names("seg_dense_vim") if name not in BACKBONES]
TRAINED_DENSE = golden.names("seg_train_dense")
TRAINED = golden.names("seg_train_vim")


@pytest.fixture(params=golden.backends())
def device(request, monkeypatch) -> str:
    """Forces each backend in turn; where it runs."""
    return golden.use_backend(request.param, monkeypatch)


def build(info: dict, dynamic: bool = False) -> VisionMamba:
    """The segmenter of a case's configuration, without dropout; a backbone alone has no head."""
    config = info["config"]
    sizes = dict(
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        stride=config["stride"],
        in_chans=config["channels"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        d_state=config["d_state"],
        num_classes=0,
        class_token=False,
    )
    family = FAMILIES[info["family"]]
    if dynamic:
        stages = dict(pruning_layers=config["pruning_loc"], token_keep=config["token_ratio"])
        model = DynamicVisionMamba(family, **sizes, **stages)
    else:
        model = VisionMamba(family, **sizes, rope=config.get("rope", False))
    classes, width = config.get("num_classes", 2), config["embed_dim"]
    head = SegmentationHead(
        UPerHead(width, config.get("head_channels", 4), classes),
        width,
        config["patch_size"],
        classes,
        config["out_layers"],
        config["feature"],
        aux_channels=config.get("aux_channels", 4),
    )
    for module in head.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return as_segmenter(model, head, classes)


def build_loaded(case: golden.Case, dynamic: bool = False, device: str = "cpu") -> VisionMamba:
    model = build(case.info, dynamic)
    file = case.info["weights_file"]
    state = from_official(load_file(golden.GOLDEN_DIR / file) | case.group("override."))
    if "num_classes" not in case.info["config"]:  # the backbone alone was recorded
        heads = {k: v for k, v in model.state_dict().items() if ".decode" in k or ".auxil" in k}
        state |= heads
        if case.info["config"].get("rope") is False:
            state = {key: value for key, value in state.items() if not key.startswith("rope.")}
    load_weights(model, {"model": state}, file)
    return model.to(device)


def images_of(case: golden.Case, device: str) -> Tensor:
    if "input.images" in case.tensors:
        return case.tensors["input.images"]
    name = case.info["images_file"].removesuffix(".safetensors")
    return golden.load(name, device).tensors["input.images"]


def compare_features(model: VisionMamba, result, case: golden.Case) -> None:
    maps = [result.maps[layer] for layer in model.head.layers]
    for j, feature in enumerate(maps):
        golden.close(feature, case.tensors[f"mid.feature.{j}"], 1e-4, 1e-4, f"feature {j}")
    for j, level in enumerate(model.head.pyramid(maps) if not model.training else ()):
        expected = case.tensors.get(f"mid.fpn.{j}", case.tensors.get(f"out.map.{j}"))
        golden.close(level, expected, 1e-4, 1e-4, f"pyramid {j}")


def compare_labels(logits: Tensor, case: golden.Case, size) -> None:
    whole = resize(logits, size)
    expected = case.tensors["out.labels"].long().view(len(whole), *size)
    best = whole.topk(2, dim=1).values
    sure = (best[:, 0] - best[:, 1]) > 1e-4
    wrong = (whole.argmax(1) != expected) & sure
    assert not wrong.any(), f"{wrong.sum()} labels differ"
    if case.info["label_margins"]["pixels_with_margin_below_1e_4"] == 0:
        assert torch.equal(whole.argmax(1), expected)


@pytest.mark.parametrize("name", DENSE + BACKBONES)
def test_dense(name, device):
    case = golden.load(name, device)
    model = build_loaded(case, device=device).eval()
    recorder = golden.LayerRecorder(model)
    images = images_of(case, device)
    with torch.no_grad():
        result = model(images)
        compare_features(model, result, case)
        assert recorder.compare(case) >= model.depth
        if name in BACKBONES:
            return
        golden.close(result.logits, case.tensors["out.logits"], 1e-4, 1e-4, "logits")
        levels = model.head.pyramid([result.maps[layer] for layer in model.head.layers])
        aux_logits = model.head.auxiliary_head(levels[AUX_MAP])
        golden.close(aux_logits, case.tensors["out.aux_logits"], 1e-4, 1e-4, "auxiliary")
    compare_labels(result.logits, case, images.shape[-2:])


@pytest.mark.parametrize("name", golden.names("seg_eval_"))
def test_dynamic_evaluation(name, device):
    case = golden.load(name, device)
    t = case.tensors
    model = build_loaded(case, dynamic=True, device=device).eval()
    recorder = golden.LayerRecorder(model)
    with torch.no_grad():
        result = model(t["input.images"])
        compare_features(model, result, case)
    assert sequence_lengths(model) == case.info["seq_len_per_layer"]
    for s, kept in enumerate(result.kept):
        assert torch.equal(kept, t[f"mid.keep_origin.stage{s}"]), f"stage {s}"
        log_probs = recorder.seen.pop(f"pred_logprob.stage{s}")
        alive = result.kept[s - 1] if s else torch.arange(model.num_patches).expand(len(kept), -1)
        expected = t[f"mid.pred_logprob.stage{s}"]
        chosen = alive.to(expected.device).unsqueeze(-1).expand(-1, -1, 2)
        golden.close(log_probs, expected.gather(1, chosen), 1e-4, 1e-4, f"scores {s}")
    assert torch.equal(result.gates.unsqueeze(2), t["out.block_policy"])
    assert recorder.compare(case) >= 2 * model.depth
    golden.close(result.logits, t["out.logits"], 1e-4, 1e-4, "logits")
    compare_labels(result.logits, case, t["input.images"].shape[-2:])


@pytest.mark.parametrize("name", golden.names("seg_slide"))
def test_sliding_windows(name, device):
    """Mean logits and labels of a whole image; a dynamic model decides for each window."""
    case = golden.load(name, device)
    t, info = case.tensors, case.info
    dynamic = "pruning_loc" in info["config"]
    model, results = build_loaded(case, dynamic=dynamic, device=device).eval(), []

    def forward(images: Tensor) -> Tensor:
        results.append(model(images))
        return results[-1].logits

    image = t["input.image"]
    crop, stride = tuple(info["crop"]), tuple(info["stride"])
    assert windows(image.shape[-2:], crop, stride) == [tuple(w) for w in info["windows_top_left"]]
    logits = sliding_logits(forward, image, crop, stride, batch=4)
    golden.close(logits, t["out.logits"], 1e-4, 1e-4, "logits")
    compare_labels(logits, case, info["original_shape"])
    for s in range(len(model.pruning_layers)):
        kept = torch.cat([result.kept[s] for result in results])
        assert torch.equal(kept, t[f"mid.keep_origin.stage{s}"]), f"stage {s}"


def official(name: str) -> str:
    """The recordings' name of one of our parameters."""
    if name.startswith("head.pyramid."):
        return name.replace("head.pyramid", "backbone")
    return name.removeprefix("head.") if name.startswith("head.") else f"backbone.{name}"


def compare_training(model: VisionMamba, case: golden.Case, values: golden.Case, device) -> None:
    """One training step: decisions, losses, gradients and statistics."""
    t, config = values.tensors, values.info["config"]
    loss_config = values.info.get("loss_config", {})
    budgets = None
    if "token_weight" in loss_config:
        budgets = Budgets(
            token_keep=loss_config["token_keep_ratio"],
            block_keep=loss_config["block_keep_ratio"],
            token_weight=loss_config["token_weight"],
            block_weight=loss_config["block_weight"],
        )
    objective = Objective(SegmentationTerms(config["aux_weight"]), budgets)
    recorder = golden.LayerRecorder(model.train())
    with sampling.replay(values.group("noise.")):
        result = model(images_of(values, device))
    loss, terms = objective(result, t["input.labels"])
    loss.backward()
    for s, decision in enumerate(result.decisions):
        assert torch.equal(decision.detach(), t[f"out.decision.stage{s}"]), f"stage {s}"
    recorder.compare(values)
    compare_features(model, result, values)
    golden.close(result.logits, t["out.logits"], 1e-4, 1e-4, "logits")
    golden.close(result.aux_logits, t["out.aux_logits"], 1e-4, 1e-4, "auxiliary")
    names = ("token_ratio", "block_ratio", "decode", "aux")[-len(t["loss.parts"]) :]
    for term, expected in zip(names, t["loss.parts"], strict=True):
        golden.close(terms[term], expected, 1e-6, 1e-5, term)
    golden.close(loss, t["loss.total"], 1e-6, 1e-5, "loss")
    gradients = case.group("grad.")
    compared = 0
    for name, parameter in model.named_parameters():
        if official(name) in gradients:
            compared += 1
            golden.gradient_close(parameter.grad, gradients[official(name)], 2e-4, name)
    assert compared == len(gradients)
    state = {official(name): value for name, value in model.state_dict().items()}
    for name, expected in values.group("bn_after.").items():
        golden.close(state[name].float(), expected.float(), 1e-5, 1e-4, name)


@pytest.mark.parametrize("name", TRAINED_DENSE)
def test_dense_training(name, device):
    case = golden.load(name, device)
    compare_training(build_loaded(case, device=device), case, case, device)


@pytest.mark.parametrize("name", TRAINED)
def test_training_with_the_releases_gradients(name, device):
    case = golden.load(name, device)
    model = build_loaded(case, dynamic=True, device=device)
    follow_release(model)
    compare_training(model, case, case, device)


@pytest.mark.parametrize("name", golden.names("seg_gradients_masked"))
def test_training_with_sound_gradients(name, device):
    """Values, decisions and losses of the release; gradients without its artefact."""
    case = golden.load(name, device)
    values = golden.load(case.info["values_file"].removesuffix(".safetensors"), device)
    model = build_loaded(values, dynamic=True, device=device)
    for layer in model.layers:
        layer.mixer.router_mean.extra = 1
    compare_training(model, case, values, device)


@pytest.mark.parametrize("name", golden.names("seg_uperhead"))
def test_heads(name):
    """Both heads on given maps: evaluation, training, recorded dropout, gradients, statistics."""
    case = golden.load(name)
    config = case.info["config"]
    width = config["in_channels"][0]
    for info, t in golden.subcases(case):
        heads = nn.ModuleDict(
            dict(
                decode_head=UPerHead(width, config["head_channels"], config["num_classes"]),
                auxiliary_head=FCNHead(width, config["aux_channels"], config["num_classes"]),
            )
        )
        heads.load_state_dict(case.group("param."))
        maps = [t[f"in.feature.{j}"].requires_grad_() for j in range(len(config["in_channels"]))]
        labels = t["in.labels"]
        for mode in ("eval", "train"):
            heads.train(mode == "train")
            for head, part in (("decode_head", "decode"), ("auxiliary_head", "aux")):
                factor = t.get(f"train.dropout.{part}")
                heads[head].dropout = Factor(factor) if mode == "train" else nn.Identity()
            logits = heads["decode_head"](maps)
            aux_logits = heads["auxiliary_head"](maps[config["aux_index"]])
            golden.close(logits, t[f"{mode}.logits"], 1e-4, 1e-4, f"{info['name']} {mode}")
            golden.close(aux_logits, t[f"{mode}.aux_logits"], 1e-4, 1e-4, info["name"])
        terms = SegmentationTerms(config["aux_weight"])(Outputs(logits, aux_logits), labels)
        for name, value in info["loss_parts"].items():
            term = terms[name.split(".")[0]]
            assert term.item() == pytest.approx(value, rel=1e-5, abs=1e-6)
        sum(terms.values()).backward()
        gradients = {f"in.feature.{j}": x.grad for j, x in enumerate(maps)}
        gradients |= {name: p.grad for name, p in heads.named_parameters()}
        recorded = {
            key.removeprefix("train.grad."): value
            for key, value in t.items()
            if key.startswith("train.grad.")
        }
        for key, expected in recorded.items():
            golden.gradient_close(gradients[key], expected, 2e-4, f"{info['name']} {key}")
        for key in info["gradients_zero"]:
            assert not gradients[key].any(), key
        statistics = dict(heads.named_buffers())
        for key, expected in t.items():
            if key.startswith("train.bn_after."):
                actual = statistics[key.removeprefix("train.bn_after.")].float()
                golden.close(actual, expected.float(), 1e-5, 1e-4, key)


class Outputs:
    """What the loss reads of a Result."""

    def __init__(self, logits: Tensor, aux_logits: Tensor):
        self.logits, self.aux_logits = logits, aux_logits


class Factor(nn.Module):
    """Recorded dropout [B, c]: factors in front of the classifier; None for none."""

    def __init__(self, factor: Tensor | None):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x if self.factor is None else x * self.factor[:, :, None, None]


def counts():
    names = golden.names("seg_counts")
    return [pytest.param(e, id=e["name"]) for n in names for e in golden.load(n).info["entries"]]


@pytest.mark.parametrize("entry", counts())
def test_parameters_and_operations(entry):
    config, parameters = entry["config"], entry["parameters"]
    with torch.device("meta"):
        models = {
            dynamic: build({"family": "vim", "config": config}, dynamic) for dynamic in (0, 1)
        }

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    dense, dynamic = models[0], models[1]
    pyramid = size(dense.head.pyramid)
    assert pyramid == parameters["fpn"]
    assert size(dense) - size(dense.head) + pyramid == parameters["backbone_dense"]
    assert size(dynamic) - size(dynamic.head) + pyramid == parameters["backbone_dynamic"]
    assert size(dense.head.decode_head) == parameters["decode_head"]
    assert size(dense.head.auxiliary_head) == parameters["auxiliary_head"]
    assert sequence_lengths(dynamic) == entry["seq_len_per_layer"]
    assert dynamic.kept_counts() == entry["kept_per_stage"]
    operations = entry["multiply_adds"]
    head = decoder_operations(dense)
    assert head == operations["fpn"] + operations["decode_head"]
    assert count_flops(dense).paper > head + operations["patch_embed"]
