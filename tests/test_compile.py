"""Models compiled, exported, in bfloat16, copied and pickled give what the eager model gives."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from models import FAMILIES, DynamicVisionMamba, VisionMamba, sampling

SIZES = dict(img_size=16, patch_size=4, embed_dim=16, d_state=4, depth=2, num_classes=5)
DYNAMIC = dict(pruning_layers=(1,), token_keep=(0.6,))
FAMILY_ARGUMENTS = {
    "vim": {},
    "videomamba": {},
    "mambareg": dict(num_registers=4, register_reduction=2),
}
OPERATORS = {"cpu": "dyvm.cpu_infer.default", "torch": "dyvm.torch_scan.default"}


@pytest.fixture(params=OPERATORS)
def backend(request, monkeypatch):
    monkeypatch.setenv("DYVM_BACKEND", request.param)
    torch.compiler.reset()
    yield request.param
    torch.compiler.reset()


def model_of(kind: type[VisionMamba], family: str = "vim", **arguments) -> VisionMamba:
    """With weights that are telling: fresh ones leave biases and class tokens at zero."""
    torch.manual_seed(0)
    dynamic = DYNAMIC if kind is DynamicVisionMamba else {}
    model = kind(FAMILIES[family], **SIZES, **FAMILY_ARGUMENTS[family], **dynamic | arguments)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


def noise_of(model: VisionMamba, count: int) -> dict[str, Tensor]:
    """All noise of one training step, for `sampling.replay`."""
    torch.manual_seed(2)
    noise = {"token.stage0": torch.randn(count, model.num_patches, 2)}
    for layer in range(model.depth):
        for name in ("gumbels1", "gumbels2"):
            noise[f"router.layer{layer}.{name}"] = torch.randn(count, 2)
    return noise


def compiled_of(model: VisionMamba, thorough: bool):
    """With C++ code (minutes), or traced as for it and run by PyTorch."""
    return torch.compile(model, fullgraph=True, backend="inductor" if thorough else "aot_eager")


@pytest.mark.parametrize("kind", [VisionMamba, DynamicVisionMamba])
def test_compiled_evaluation(backend, kind):
    model = model_of(kind).eval()
    compiled = compiled_of(model, thorough=kind is DynamicVisionMamba and backend == "torch")
    with torch.no_grad():
        expected, actual = model(images()), compiled(images())
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(actual.gates, expected.gates)
    assert all(map(torch.equal, actual.kept, expected.kept))


def gradients(model: VisionMamba, forward) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with sampling.replay(noise_of(model, 3)):
        result = forward(images())
    kept = sum(decision.mean() for decision in result.decisions)
    (result.logits.square().sum() + result.gates.mean() + kept).backward()
    return result.logits.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", [VisionMamba, DynamicVisionMamba])
def test_compiled_training(backend, kind):
    model = model_of(kind).train()
    expected_logits, expected = gradients(model, model)
    thorough = kind is DynamicVisionMamba and backend == "cpu"
    logits, actual = gradients(model, compiled_of(model, thorough))
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-6)
    for name, wanted in expected.items():
        if wanted is None:
            assert actual[name] is None, name
            continue
        largest = wanted.abs().max().item()
        error = (actual[name] - wanted).abs().max().item()
        assert error <= 1e-5 * largest + 1e-9, f"{name}: {error} of {largest}"


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [VisionMamba, DynamicVisionMamba])
def test_exported_program_takes_any_batch(backend, kind, grad):
    model = model_of(kind).eval()
    with torch.set_grad_enabled(grad):
        program = torch.export.export(
            model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        for count in (1, 3, 6):
            torch.testing.assert_close(
                program.module()(images(count)).logits,
                model(images(count)).logits,
                rtol=1e-5,
                atol=1e-6,
            )
    parts = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = {str(node.target) for part in parts for node in part.graph.nodes}
    assert "dyvm.add_rms_norm.default" in targets
    assert grad or OPERATORS[backend] in targets


@pytest.mark.parametrize(
    "way",
    [
        dict(token_strategy="top"),
        dict(reduction="mtr"),
        dict(reduction="prune+merge"),
        dict(reduction="merge", merge_tokens=5),
    ],
    ids=lambda way: "-".join(map(str, way.values())),
)
def test_other_reductions_are_exported(way):
    model = model_of(DynamicVisionMamba, **way).eval()
    with torch.no_grad():
        program = torch.export.export(
            model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        for count in (1, 6):
            torch.testing.assert_close(
                program.module()(images(count)).logits,
                model(images(count)).logits,
                rtol=1e-5,
                atol=1e-6,
            )


VARIANTS = [None, {}, dict(scorer_input="B"), dict(scorer_input="delta"), dict(prune_tokens=False)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family, variant):
    """A rounding of 2^-9 in every product; decisions that turn would show as far more."""
    kind = VisionMamba if variant is None else DynamicVisionMamba
    model = model_of(kind, family, **variant or {}).eval()
    low = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        expected, actual = model(images(4)).logits, low(images(4).bfloat16()).logits
    assert actual.dtype == torch.bfloat16
    error = (actual.float() - expected).abs().max() / expected.abs().max()
    assert error < 0.2


@pytest.mark.parametrize("kind", [VisionMamba, DynamicVisionMamba])
def test_copies_and_pickles(kind):
    model = model_of(kind).eval()
    with torch.no_grad():
        expected = model(images()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images()).logits, expected)
