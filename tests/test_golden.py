"""Parity with recorded inputs, outputs and gradients of the published implementation, on every
backend that runs here.

Tolerances are those of the recordings' own README: float32 error measured against float64, with a
margin.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import golden
from torch import nn

import losses
from models import Result, sampling
from models.flops import count_flops, sequence_lengths
from models.layouts import SpreadRegisters, TokenLayout, extract, insert, reordered, take
from models.pruning import kept_first
from models.weights import resize_pos_embed
from ops.selective_scan import reference

pytestmark = [
    pytest.mark.skipif(
        not golden.GOLDEN_DIR.is_dir(), reason=f"no recorded cases at {golden.GOLDEN_DIR}"
    ),
    pytest.mark.usefixtures("two_threads"),
]


@pytest.fixture(params=golden.backends())
def device(request, monkeypatch) -> str:
    """Forces each backend in turn; where it runs."""
    return golden.use_backend(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", golden.names("ops_"))
def test_operators(name):
    """The plain operators: output, last state and every gradient."""
    for info, t in golden.subcases(golden.load(name)):
        inputs = {
            key.removeprefix("in."): value.requires_grad_()
            for key, value in t.items()
            if key.startswith("in.")
        }
        what = f"{name} {info['name']}"
        if "selective_scan" in name:
            y, state = reference.selective_scan(**inputs, delta_softplus=info["delta_softplus"])
            golden.close(state, t["out.last_state"], 1e-5, 1e-4, what)
        else:
            y = reference.causal_conv1d(**inputs, activation=info["activation"])
        golden.close(y, t["out.y"], 1e-5, 1e-4, what)
        (y * t["w"]).sum().backward()
        for key, value in inputs.items():
            golden.gradient_close(value.grad, t[f"grad.{key}"], 1e-4, f"{what} gradient of {key}")


@pytest.mark.parametrize("name", golden.names("dense_", "video_dense"))
def test_dense(name, device):
    case = golden.load(name, device)
    model = golden.build_loaded(case, "weights_file", dynamic=False, device=device).eval()
    recorder = golden.LayerRecorder(model)
    with torch.no_grad():
        result = model(case.inputs)
    assert sequence_lengths(model) == case.info["seq_len_per_layer"]
    assert recorder.compare(case) == 2 * model.depth
    if "mid.embedding" in case.tensors:
        class_slots = model.layout.class_slots(model.num_patches)
        embedded = insert(*model.embed(case.inputs), class_slots)
        golden.close(embedded, case.tensors["mid.embedding"], 1e-5, 1e-4, "embedding")
    golden.close(result.tokens, case.tensors["out.other_tokens"], 1e-4, 1e-4, "tokens")
    golden.close(result.logits, case.tensors["out.logits"], 1e-4, 1e-4, "logits")


@pytest.mark.parametrize("name", golden.names("eval_", "video_eval"))
def test_dynamic_evaluation(name, device):
    case = golden.load(name, device)
    t = case.tensors
    model = golden.build_loaded(case, "weights_file", dynamic=True, device=device).eval()
    recorder = golden.LayerRecorder(model)
    with torch.no_grad():
        result = model(case.inputs)
    assert sequence_lengths(model) == case.info["seq_len_per_layer"]
    for s, kept in enumerate(result.kept):
        assert torch.equal(kept, t[f"mid.keep_origin.stage{s}"]), f"stage {s}"
    assert torch.equal(result.gates.unsqueeze(2), t["out.block_policy"])
    assert recorder.compare(case) >= 3 * model.depth + len(model.pruning_layers)
    golden.close(result.logits, t["out.logits"], 1e-4, 1e-4, "logits")


def objective(criterion, config: dict, tokens: bool = True, blocks: bool = True):
    """The loss of (logits, targets), weighted, with the terms of the method."""

    def classify(result, targets):
        return {"cls": config["clf_weight"] * criterion(result.logits.float(), targets)}

    return losses.Objective(
        classify,
        losses.Budgets(
            token_keep=config["token_keep_ratio"] if tokens else None,
            block_keep=config["block_keep_ratio"] if blocks else None,
            token_weight=config["token_pruning_weight"],
            block_weight=config["block_pruning_weight"],
            ratio_scope="batch" if config["dynamic"] else "image",
        ),
        losses.Distillation(
            tokens=tokens,
            weight=config["distill_weight"],
            token_distance="mse" if config["mse_token"] else "kl",
        ),
    )


def dynamic_loss(config: dict) -> losses.Objective:
    def soft_target(logits, targets):
        return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()

    return objective(soft_target, config)


@pytest.mark.parametrize("name", golden.names("train_", "video_train"))
def test_dynamic_training(name, device):
    """Replayed noise: decisions, re-arrangement, outputs, every loss term, every parameter's
    gradient.
    """
    case = golden.load(name, device)
    t = case.tensors
    model = golden.build_loaded(case, "weights_file", dynamic=True, device=device).train()
    teacher = golden.build_loaded(case, "teacher_weights_file", dynamic=False, device=device).eval()
    recorder = golden.LayerRecorder(model)
    with sampling.replay(case.group("noise.")):
        result = model(case.inputs)
    with torch.no_grad():
        teacher_result = teacher(case.inputs)
    for s, decision in enumerate(result.decisions):
        assert torch.equal(decision.detach(), t[f"out.decision.stage{s}"]), f"stage {s}"
    assert torch.equal(result.origin, t["out.current_pos"])
    assert torch.equal(result.alive.unsqueeze(-1), t["out.token_policy"])
    assert torch.equal(result.gates.detach().unsqueeze(2), t["out.block_policy"])
    assert recorder.compare(case) >= model.depth + len(model.pruning_layers)
    golden.close(result.tokens, t["out.other_tokens"], 1e-4, 1e-4, "tokens")
    golden.close(result.logits, t["out.logits"], 1e-4, 1e-4, "logits")
    golden.close(teacher_result.logits, t["teacher.logits"], 1e-4, 1e-4, "teacher logits")
    golden.close(teacher_result.tokens, t["teacher.other_tokens"], 1e-4, 1e-4, "teacher tokens")

    config = case.info["loss_config"]
    total, terms = dynamic_loss(config)(result, t["input.soft_targets"], teacher_result)
    parts = torch.stack([terms[part] for part in case.info["loss_part_names"]])
    golden.close(parts, t["loss.parts"], 1e-6, 1e-5, "loss terms")
    golden.close(total, t["loss.total"], 1e-6, 1e-5, "loss")
    for variant in case.info["loss_variants_same_outputs"]:
        other, _ = dynamic_loss(config | variant)(result, t["input.soft_targets"], teacher_result)
        assert other.item() == pytest.approx(variant["total"], rel=1e-5, abs=1e-6)

    total.backward()
    gradients = case.group("grad.")
    assert gradients
    for key, parameter in model.named_parameters():
        if key in gradients:
            golden.gradient_close(parameter.grad, gradients[key], 2e-4, key)
        else:
            assert parameter.grad is None or not parameter.grad.any(), key


@pytest.mark.parametrize("name", golden.names("losses"))
def test_losses(name):
    case = golden.load(name)
    t, weights = case.tensors, case.info["weights"]
    for run in case.info["runs"]:
        logits, tokens, gates, *decisions = (
            t[key].clone().requires_grad_()
            for key in [
                "in.logits",
                "in.other_tokens",
                "in.block_policy",
                *(f"in.decision.stage{s}" for s in range(case.info["pruning_stages"])),
            ]
        )
        result = Result(
            logits,
            tokens,
            t["in.current_pos"],
            t["in.token_policy"].squeeze(-1),
            gates.squeeze(2),
            decisions,
        )
        teacher_result = Result(t["teacher.logits"], t["teacher.other_tokens"], *[None] * 3)
        soft = run["base_criterion"] == "soft_target"
        smoothing = 0.0 if soft else float(run["base_criterion"].rsplit("_", 1)[1])
        criterion = objective(
            nn.CrossEntropyLoss(label_smoothing=smoothing),
            {**case.info, **weights, **run},
            tokens=run["loss"] != "block_only",
            blocks=run["loss"] != "token_only",
        )
        total, terms = criterion(
            result, t["in.soft_targets"] if soft else t["in.labels"], teacher_result
        )
        assert list(terms) == list(run["parts"])
        for term, value in run["parts"].items():
            assert terms[term].item() == pytest.approx(value, rel=1e-5, abs=1e-6), (
                run["name"],
                term,
            )
        assert total.item() == pytest.approx(run["total"], rel=1e-5, abs=1e-6)
        total.backward()
        inputs = {"logits": logits, "other_tokens": tokens, "block_policy": gates}
        inputs |= {f"decision{s}": decision for s, decision in enumerate(decisions)}
        for key, value in inputs.items():
            expected = t.get(f"{run['name']}.grad.{key}", torch.zeros_like(value))
            golden.gradient_close(value.grad, expected, 1e-4, f"{run['name']} gradient of {key}")


class Layout(TokenLayout):
    """The layout of a re-arrangement case: one class token in the middle, several spread."""

    def _slot(self, index, patches):
        if self.num_tokens == 1:
            return patches // 2
        return SpreadRegisters(self.num_tokens)._slot(index, patches)


@pytest.mark.parametrize("name", golden.names("rearrange_"))
def test_rearrangement(name):
    case = golden.load(name)
    layout = Layout(case.info.get("class_tokens", 1))
    for _, t in golden.subcases(case):
        policy = t["in.policy"].squeeze(-1)
        order, kept = kept_first(policy)
        assert torch.equal(order, t["out.order"])
        inputs = [t[f"in.{key}"] for key in ("policy", "tokens", "residual", "current_pos")]
        outputs = [t[f"out.{key}"] for key in ("policy", "tokens", "residual", "current_pos")]
        for given, expected in zip(inputs, outputs, strict=True):
            assert torch.equal(take(given, order), expected)
        positions = layout.class_slots(kept)
        assert torch.equal(positions, t["out.cls_pos"].reshape(positions.shape))
        combined = insert(t["out.tokens"], t["in.cls_tokens"], positions)
        assert torch.equal(combined, t["out.combined"])
        patches, class_tokens = extract(combined, positions)
        assert torch.equal(patches, t["out.tokens"]) and torch.equal(
            class_tokens, t["in.cls_tokens"]
        )
        before = layout.class_slots(policy.shape[1])
        sequence = insert(t["in.tokens"], t["in.cls_tokens"], before)
        assert torch.equal(
            take(sequence, reordered(order, before, positions, sequence.shape[1])), combined
        ), "in one step, as the model"


@pytest.mark.parametrize("name", golden.names("mambareg_cls_layout"))
def test_register_layout(name):
    for info, t in golden.subcases(golden.load(name)):
        patches, registers = info["grid"][0] * info["grid"][1], info["class_tokens"]
        positions = SpreadRegisters(registers).class_slots(patches)
        assert torch.equal(torch.tensor(positions), t["cls_positions"])
        index = insert(
            torch.arange(patches)[None], patches + torch.arange(registers)[None], positions
        )
        assert torch.equal(index[0], t["token_idx"])


@pytest.mark.parametrize("name", golden.names("pos_embed_"))
def test_pos_embed(name):
    """Row 0 taken for the class row reproduces the recording; the row where it really stands is
    what we use.
    """
    for info, t in golden.subcases(golden.load(name)):
        grid, row = (info["grid_to"],) * 2, 0 if info["extra_tokens"] else None
        golden.close(resize_pos_embed(t["in"], grid, row, row), t["out"], 1e-5, 0, name)
        if row is None:
            continue
        middle, new_middle = info["grid_from"] ** 2 // 2, info["grid_to"] ** 2 // 2
        ours = resize_pos_embed(t["in"], grid, middle, new_middle)
        assert torch.equal(ours[:, new_middle], t["in"][:, middle]), (
            "the class row is carried over untouched"
        )
        if info["grid_from"] == info["grid_to"]:
            assert torch.equal(ours, t["in"])
        else:
            assert not torch.allclose(ours, t["out"], atol=1e-3), (
                "the recorded defect is not repeated"
            )


@pytest.mark.parametrize("name", golden.names("flops_", "video_flops"))
def test_flops(name):
    for entry in golden.load(name).info["entries"]:
        with torch.device("meta"):
            model = golden.build(entry, dynamic=entry["model"] != "teacher")
        assert sequence_lengths(model) == entry["seq_len_per_layer"]
        assert sum(p.numel() for p in model.parameters()) == entry["parameters"]
        assert count_flops(model, entry["block_keep_ratio"]).paper == pytest.approx(
            entry["flops"], rel=1e-9
        )
