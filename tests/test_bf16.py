"""Mixed precision is float32 but for its roundings: recorded cases at bfloat16, and trainings side
by side.

bfloat16 rounds to 8 bits where float32 rounds to 24, so that an error of float32 explains one of
bfloat16 up to 2^16 times as large. The tolerances stay below the float32 errors that the
recordings' README measured, times 2^16. Decisions that are nearly ties would turn: the recorded
outputs of routers and score predictors are put in place of our own, which are compared too.
"""

import pytest
import torch
from helpers import golden
from test_golden import dynamic_loss
from timm.loss import LabelSmoothingCrossEntropy
from torch import Tensor, nn

from benchmarks.checking import deciders, decisions_replayed
from losses import Budgets, ClassificationTerms, Distillation, Objective
from models import FAMILIES, DynamicVisionMamba, VisionMamba, sampling
from utils.precision import autocast
from utils.seeding import seed_everything

RATIO = 2.0**16
# (largest error of bfloat16 allowed, float32 error of the recordings), relative to the largest
# entry of a tensor
OUTPUTS, LOSSES, GRADIENTS = (2.5e-2, 4e-6), (1.3e-2, 2e-7), (1.5e-1, 2.2e-5)
# Routers and score predictors read single tokens of the stream, whose error is that of its largest
# entries.
DECIDERS = (1e-1, 4e-6)
CPU = torch.device("cpu")
CLASSIFY = ClassificationTerms(LabelSmoothingCrossEntropy(0.1))


def close(actual: Tensor, expected: Tensor, allowed: tuple[float, float], what: str) -> None:
    error = (actual.detach().float().reshape(expected.shape) - expected).abs().max().item()
    limit = allowed[0] * expected.abs().max().item() + 1e-6
    assert error <= limit, f"{what}: error {error:.3g} above {limit:.3g}"


def recorded_decisions(case: golden.Case, model: VisionMamba) -> dict[str, Tensor]:
    mid = case.group("mid.")
    names = {f"layers.{i}.mixer.block_head": f"router_logits.layer{i}" for i in range(model.depth)}
    names |= {f"score_predictors.{s}": f"pred_logprob.stage{s}" for s in range(len(mid))}
    return {name: mid[names[name]] for name in deciders(model)}


def test_tolerances_are_explained_by_the_float32_errors():
    for allowed, float32_error in (OUTPUTS, LOSSES, GRADIENTS, DECIDERS):
        assert allowed <= float32_error * RATIO


@pytest.mark.skipif(
    not golden.GOLDEN_DIR.is_dir(), reason=f"no recorded cases at {golden.GOLDEN_DIR}"
)
@pytest.mark.parametrize(
    "name", golden.names("dense_", "eval_", "train_", "video_dense", "video_eval", "video_train")
)
@pytest.mark.parametrize("backend", golden.backends())
def test_recorded_cases(name, backend, monkeypatch):
    device = golden.use_backend(backend, monkeypatch)
    precision = autocast(torch.device(device), "bf16")
    case, training = golden.load(name, device), "train_" in name
    t = case.tensors
    dynamic = "dense" not in name
    model = golden.build_loaded(case, "weights_file", dynamic, device).train(training)
    recorded = recorded_decisions(case, model)
    with (
        decisions_replayed(model, recorded) as said,
        sampling.replay(case.group("noise.")),
        precision,
    ):
        result = model(case.inputs)
    for decider, value in recorded.items():
        close(said[decider], value, DECIDERS, decider)
    close(result.logits, t["out.logits"], OUTPUTS, "logits")
    if "out.other_tokens" in t:
        close(result.tokens, t["out.other_tokens"], OUTPUTS, "tokens")
    if not training:
        return
    teacher = golden.build_loaded(case, "teacher_weights_file", dynamic=False, device=device).eval()
    with precision:
        with torch.no_grad():
            teacher_result = teacher(case.inputs)
        total, terms = dynamic_loss(case.info["loss_config"])(
            result, t["input.soft_targets"], teacher_result
        )
    for term, expected in zip(case.info["loss_part_names"], t["loss.parts"], strict=True):
        close(terms[term], expected, LOSSES, term)
    close(total, t["loss.total"], LOSSES, "loss")
    total.backward()
    parameters = dict(model.named_parameters())
    for key, expected in case.group("grad.").items():
        close(parameters[key].grad, expected, GRADIENTS, key)


STEPS, BATCH, WINDOW = 200, 32, 20
SMALL = dict(img_size=16, patch_size=4, embed_dim=32, depth=4, num_classes=10)


def digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits [N, 3, 16, 16] and their labels [N], in a fixed random order."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = nn.functional.interpolate(images, scale_factor=2).expand(-1, 3, -1, -1)
    return images[order], torch.from_numpy(labels)[order]


def train(
    model: VisionMamba, objective: Objective, amp: str, teacher=None, lr: float = 2e-3
) -> Tensor:
    """The loss of each step [STEPS]. Every step's noise comes from its number, the same in every
    precision.
    """
    images, labels = digits()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr)
    losses = []
    for step in range(STEPS):
        seed_everything(0, step)
        batch = torch.arange(step * BATCH, (step + 1) * BATCH) % len(images)
        with autocast(CPU, amp):
            result = model(images[batch])
            with torch.no_grad():
                teacher_result = teacher(images[batch]) if teacher is not None else None
            loss, _ = objective(result, labels[batch], teacher_result)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def smoothed(losses: Tensor) -> Tensor:
    return losses.unfold(0, WINDOW, WINDOW).mean(dim=1)


@pytest.fixture(scope="module")
def teacher() -> tuple[VisionMamba, Tensor]:
    """A dense model trained in float32, and its losses."""
    seed_everything(0)
    model = VisionMamba(FAMILIES["vim"], **SMALL)
    losses = train(model, Objective(CLASSIFY), "off")
    return model.eval().requires_grad_(False), losses


def test_200_dense_steps(teacher):
    seed_everything(0)
    model = VisionMamba(FAMILIES["vim"], **SMALL)
    losses = train(model, Objective(CLASSIFY), "bf16")
    expected = smoothed(teacher[1])
    assert expected[-1] < 0.6 * expected[0], "the model learns"
    torch.testing.assert_close(smoothed(losses), expected, rtol=0.02, atol=0)


def test_200_dyvm_steps(teacher):
    def student_losses(amp: str) -> Tensor:
        seed_everything(0)
        model = DynamicVisionMamba(FAMILIES["vim"], **SMALL, pruning_layers=(1, 2, 3))
        model.load_state_dict(teacher[0].state_dict(), strict=False)
        objective = Objective(CLASSIFY, Budgets(model.token_keep, 0.8), Distillation())
        return train(model, objective, amp, teacher[0])

    expected = smoothed(student_losses("off"))
    assert expected[-1] < 0.8 * expected[0], "the model learns"
    torch.testing.assert_close(smoothed(student_losses("bf16")), expected, rtol=0.02, atol=0)
