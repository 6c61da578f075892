"""A training as its flags set it up: criterion, optimizer, schedule, average of the weights."""

import pytest
import torch

import main
from tasks import Experiment
from tests.helpers.runs import SMALL
from training import build_training, ema_decay
from utils.distributed import Distributed


@pytest.mark.parametrize(
    "flags, criterion",
    [
        ([], "SoftTargetCrossEntropy"),
        (["--mixup", "0", "--cutmix", "0"], "LabelSmoothingCrossEntropy"),
        (["--mixup", "0", "--cutmix", "0", "--smoothing", "0"], "CrossEntropyLoss"),
    ],
)
def test_training_is_built_as_the_recipe_says(flags, criterion):
    args = main.options.parse(
        [
            "--batch-size",
            "64",
            "--accum-steps",
            "2",
            "--lr",
            "1e-3",
            "--weight-decay",
            "0.1",
            "--warmup-epochs",
            "0",
            "--num-workers",
            "0",
            *flags,
        ]
    )
    alone = Distributed(torch.device("cpu"))
    training = build_training(Experiment.prepare(args, alone))
    assert type(training.objective.criterion.criterion).__name__ == criterion
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 128 / 512)
    decay = {
        id(p): group["weight_decay"]
        for group in training.optimizer.param_groups
        for p in group["params"]
    }
    for name, parameter in training.model.named_parameters():
        plain = parameter.ndim < 2 or name.endswith(("A_log", "A_b_log", "pos_embed", "cls_token"))
        assert decay[id(parameter)] == (0 if plain else 0.1), name


def built(*flags):
    args = main.options.parse([*SMALL, *flags])
    return build_training(Experiment.prepare(args, Distributed(torch.device("cpu"))))


def test_betas_as_each_optimizer_takes_them(few_validation_images):
    for flags, betas in (
        (["--opt", "cadanw"], (0.98, 0.92, 0.99)),
        (["--opt", "adan", "--opt-betas", "0.9", "0.8", "0.7"], (0.9, 0.8, 0.7)),
        (["--opt", "adamw", "--opt-betas", "0.8", "0.9"], (0.8, 0.9)),
    ):
        assert tuple(built(*flags).optimizer.param_groups[0]["betas"]) == betas
    sgd = built("--opt", "sgd", "--opt-betas", "0.7").optimizer
    assert sgd.param_groups[0]["momentum"] == 0.7


def test_a_schedule_that_is_upside_down_is_told(few_validation_images, caplog):
    caplog.set_level("WARNING")
    upside_down = ["--lr", "5e-5", "--warmup-epochs", "1"]  # SMALL says --unscale-lr
    built(*upside_down)
    assert caplog.messages == []
    built(*upside_down, "--min-lr", "1e-4", "--warmup-lr", "6e-5")
    low, warm_up = caplog.messages
    assert "--min-lr 0.0001 is above the learning rate 5e-05 (--lr 5e-05)" in low
    assert "--warmup-lr 6e-05 is above" in warm_up and "goes down in warm-up" in warm_up


def test_the_average_of_a_short_run_forgets_the_initial_weights():
    for updates in (50, 660, 75_000):
        assert ema_decay(0.99996, updates) == 0.99996
        assert 1e-3 < ema_decay(None, updates) ** updates < 0.01
    assert ema_decay(None, 3) == 0
    assert ema_decay(None, 30 * 5004) == 0.99996  # ImageNet-1K, batches of 256
