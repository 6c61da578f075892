"""No forward pass makes the host wait for the device.

The models run on PyTorch's fake tensors, which say that they are on a GPU and have no values:
whatever would read one on the host (`.item()`, `.tolist()`, `nonzero`, boolean indexing, a Python
`if` on a tensor) fails. Tensors off the GPU are refused beside it, since copies between devices
wait too and cannot be captured in a CUDA graph.
"""

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import measured_rates
from losses import Budgets, ClassificationTerms, Distillation, Objective
from models import FAMILIES, DynamicVisionMamba, VisionMamba
from ops import rms_norm
from ops.selective_scan import torch_lean, windows

SIZES = dict(img_size=32, patch_size=8, embed_dim=16, depth=3, num_classes=7)
DYNAMIC = dict(pruning_layers=(1, 2), token_keep=(0.7, 0.4))
FAMILY_ARGUMENTS = {
    "vim": {},
    "videomamba": {},
    "mambareg": dict(num_registers=4, register_reduction=2),
}


class NoHostTensors(TorchDispatchMode):
    """Fails on every operation that takes or gives a tensor off the GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cuda":
                raise AssertionError(
                    f"{function} has a tensor {list(tensor.shape)} on {tensor.device}"
                )
        return result


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.setenv("DYVM_BACKEND", "reference")


@pytest.fixture(autouse=True)
def fake_tensors():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def fake(model_class, family: str, **arguments):
    with unset_fake_temporarily(), torch.device("meta"):
        model = model_class(FAMILIES[family], **SIZES, **FAMILY_ARGUMENTS[family], **arguments)
    return model.to_empty(device="cuda")


def images() -> torch.Tensor:
    return torch.zeros(3, 3, 32, 32, device="cuda")


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: torch.masked_select(t, t > 0),
        lambda t: t if t.sum() > 0 else None,
        lambda t: int(t.sum()),
        lambda t: t + torch.ones(3).to(t.device),
    ],
)
def test_the_guard_sees(wait):
    with pytest.raises((AssertionError, RuntimeError)), NoHostTensors():
        wait(torch.zeros(3, device="cuda"))


VARIANTS = [
    {},
    dict(scorer_input="B"),
    dict(scorer_input="delta"),
    dict(token_strategy="random"),
    dict(token_strategy="static"),
    dict(token_strategy="norm"),
    dict(token_strategy="top"),
    dict(token_strategy="distilled"),
    dict(reduction="prune+merge"),
    dict(reduction="prune+merge", token_strategy="distilled"),
    dict(reduction="merge", merge_tokens=3),
    dict(reduction="mtr"),
    dict(prune_tokens=False),
    dict(route_blocks=False),
]
MODELS = [*(("vim", variant) for variant in VARIANTS), ("videomamba", {}), ("mambareg", {})]


def evaluate(family: str, variant: dict) -> None:
    model = fake(DynamicVisionMamba, family, **DYNAMIC, **variant).eval()
    with torch.no_grad(), NoHostTensors():
        assert model(images()).logits.shape == (3, 7)


def train(family: str, variant: dict) -> None:
    """Both forward passes of a training step, and its loss."""
    model = fake(DynamicVisionMamba, family, **DYNAMIC, **variant, drop_path_rate=0.1).train()
    teacher = fake(VisionMamba, family).eval()
    objective = Objective(
        ClassificationTerms(SoftTargetCrossEntropy()),
        Budgets(
            model.token_keep if model.token_keep and model.reduction.draws else None,
            0.8 if model.route_blocks else None,
        ),
        Distillation(tokens=bool(model.token_keep)),
    )
    targets = torch.zeros(3, 7, device="cuda")
    with NoHostTensors():
        result = model(images())
        with torch.no_grad():
            teacher_result = teacher(images())
        # no backward pass runs on faked devices
        teacher_result.importance = [torch.ones(3, 16, device="cuda")] * len(result.scored)
        loss, _ = objective(result, targets, teacher_result)
        measured_rates(result)
        assert loss.requires_grad


@pytest.mark.parametrize("family, variant", MODELS)
def test_evaluation(family, variant):
    evaluate(family, variant)


@pytest.mark.parametrize("family, variant", MODELS)
def test_training(family, variant):
    train(family, variant)


def test_lean_pytorch_backend(monkeypatch):
    monkeypatch.setenv("DYVM_BACKEND", "torch")
    evaluate("vim", {})
    train("vim", {})


def test_inside_the_operators():
    """What the operators hide from the checks above, by their implementations."""
    delta, inputs = (torch.zeros(11, 2, 6, device="cuda") for _ in range(2))
    B, C = (torch.zeros(11, 2, 3, device="cuda") for _ in range(2))
    A = torch.zeros(3, 6, device="cuda")
    hidden, weight = torch.zeros(2, 5, 8, device="cuda"), torch.zeros(8, device="cuda")
    with torch.no_grad(), NoHostTensors():
        y, heads = torch_lean._scan(delta, inputs, A, B, C, True, True)
        torch_lean._scan_backward(y, delta, inputs, A, B, C, heads, True)
        mask, taps = hidden[..., 0], weight.unsqueeze(1).expand(8, 4)
        y = windows._forward(hidden, mask, taps, weight, True)
        windows._backward(y, hidden, mask, taps, True)
        normed, total, scale = rms_norm._forward(hidden, hidden, weight, 1e-5, torch.float32)
        rms_norm._backward(normed, total, total, scale, weight, torch.bfloat16)
