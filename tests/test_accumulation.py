"""`--accum-steps`, `--grad-checkpointing` and `--layer-decay`: what they change and what not."""

import pytest
import torch

import engine
import options
from engine import accumulate_gradients, train_one_epoch
from loading.loaders import Batch
from models import sampling
from models.build import ModelSpec, build_model
from tasks import Experiment
from tests.helpers.flags import tiny
from training import build_training
from utils.checkpoint import save_checkpoint
from utils.distributed import Distributed
from utils.logging import Averages

SMALL = tiny(*("--mixup", "0", "--cutmix", "0", "--opt", "sgd", "--lr", "2"), epochs=2, subset=48)
METHODS = {
    "dense": [],
    "dyvm": ["--method", "dyvm", "--pruning-layers", "1", "3", "--block-keep-ratio", "0.5"],
}


@pytest.fixture
def training(tmp_path):
    """(method, flags...) -> experiment, training; a dynamic one's teacher has random weights."""

    def build(method: str, *flags: str):
        torch.manual_seed(1)
        dense = build_model(ModelSpec.from_args(options.parse(SMALL)), 10)
        teacher = tmp_path / "teacher.pth"
        save_checkpoint({"model": dense.state_dict()}, teacher)
        dynamic = METHODS[method] and [*METHODS[method], "--model-path", str(teacher)]
        args = options.parse([*SMALL, *dynamic, *flags])
        experiment = Experiment.prepare(args, ALONE)
        return experiment, build_training(experiment)

    return build


ALONE = Distributed(torch.device("cpu"))


def noise(step: int, batch: int = 16) -> dict[str, torch.Tensor]:
    """Of a step of the larger batch; the routers' is wide, so that gates differ."""
    generator = torch.Generator().manual_seed(step)
    found = {f"token.stage{s}": torch.randn(batch, 16, 2, generator=generator) for s in range(2)}
    return found | {
        f"router.layer{i}.gumbels{k}": 8 * torch.randn(batch, 2, generator=generator)
        for i in range(4)
        for k in (1, 2)
    }


@pytest.mark.parametrize("method", METHODS)
def test_two_batches_of_8_equal_one_of_16(training, method, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(48, 3, 16, 16, generator=generator), torch.arange(48) % 10
    forward, ends = engine._forward, []
    for accum, size in ((1, 16), (2, 8)):
        experiment, run = training(method, "--batch-size", str(size), "--accum-steps", str(accum))
        batches = [
            Batch(*parts)
            for parts in zip(
                images.split(size), targets.split(size), torch.arange(48).split(size), strict=True
            )
        ]
        monkeypatch.setattr(
            experiment.data.train_loader,
            "batches",
            lambda epoch, start, batches=batches: iter(batches),
        )

        def replayed(run, model, part, index, *rest, accum=accum, size=size):
            rows = slice(index * size, (index + 1) * size)
            with sampling.replay(
                {name: value[rows] for name, value in noise(run.step // accum).items()}
            ):
                return forward(run, model, part, index, *rest)

        monkeypatch.setattr(engine, "_forward", replayed)
        before = [p.detach().clone() for p in run.model.parameters()]
        averages = Averages()
        assert train_one_epoch(run, experiment, averages)
        ends.append((run, averages.means()))
        moved = max(
            (p - q).abs().max() for p, q in zip(run.model.parameters(), before, strict=True)
        )
        assert moved > 1e-3
    (one, one_means), (two, two_means) = ends
    assert one_means["lr"] == two_means["lr"] and two_means["loss"] == pytest.approx(
        one_means["loss"], rel=1e-5
    )
    if method == "dyvm":
        assert 0 < one_means["gate_forward"] < 1 and one_means["block_ratio"] > 0
    for (name, value), other in zip(
        one.model.named_parameters(), two.model.parameters(), strict=True
    ):
        torch.testing.assert_close(
            other, value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_layers_give_the_same_gradients(training, method):
    """In training mode, with noise in the routers and drop path."""
    gradients = []
    for flags in ([], ["--grad-checkpointing"]):
        experiment, run = training(method, "--batch-size", "16", "--drop-path", "0.2", *flags)
        assert run.model.grad_checkpointing == bool(flags)
        run.parallel.train()
        accumulate_gradients(run, [next(experiment.data.train_batches(0))], experiment)
        gradients.append({name: p.grad for name, p in run.model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_layer_decay_halves_the_learning_rate_from_layer_to_layer(training):
    experiment, run = training("dense", "--batch-size", "16", "--layer-decay", "0.5")
    averages = Averages()
    assert train_one_epoch(run, experiment, averages)
    groups = run.optimizer.param_groups
    lr = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    model = run.model
    layers = [{lr[id(parameter)] for parameter in layer.parameters()} for layer in model.layers]
    head = lr[id(model.head.weight)]
    assert head == averages.means()["lr"] > 0  # what the log says is the undecayed one
    assert layers == [{head * 0.5**k} for k in (4, 3, 2, 1)]


def test_a_batch_can_be_looked_at_twice(training):
    """Mixup works in place; a trial of a schedule and the statistics of a joined batch come before
    the pass that teaches.
    """
    experiment, run = training("dense", "--mixup", "0.8", "--cutmix", "1")
    images = torch.randn(8, 3, 16, 16)
    part, before = Batch(images, torch.arange(8) % 10, torch.arange(8)), images.clone()
    one, other = (engine._prepare(run, part, 0, experiment) for _ in range(2))
    assert torch.equal(images, before) and not torch.equal(one[0], before)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
