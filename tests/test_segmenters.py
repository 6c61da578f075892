"""Segmenters as models: loss, maps of dropped patches, operations, batch norm on two processes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.processes import launch

from models.build import ModelSpec, build_model
from models.flops import count_flops, decoder_operations
from models.segmentation import as_segmenter, make_head
from tasks import segmentation_measures
from tasks.segmentation import SegmentationTerms, pixel_cross_entropy
from utils.distributed import Distributed


def test_ignored_pixels_count_nothing_in_the_sum_and_one_each_in_the_mean():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 8, 8))
    labels[0] = 255
    half = pixel_cross_entropy(logits, labels)
    alone = pixel_cross_entropy(logits[1:], labels[1:])
    torch.testing.assert_close(half, alone / 2)
    assert pixel_cross_entropy(logits, torch.full_like(labels, 255)) == 0


def test_what_dropped_patches_show():
    """Two of four patches are dropped; the shares are of their labelled pixels."""
    labels = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 255], [2, 2, 0, 0], [2, 2, 0, 0]])[None]
    owner = torch.tensor([[-1, -1, 0, 1]])  # the upper two patches are gone
    frozen = segmentation_measures.frozen_pixels(SimpleNamespace(owner=owner), (2, 2), (8, 8))
    assert frozen.shape == (1, 8, 8) and frozen[0, :4].all() and not frozen[0, 4:].any()
    meter = segmentation_measures.SegmentationMeter(3, torch.device("cpu"))
    shown = SimpleNamespace(labels=labels, logits=None, frozen=frozen)
    meter.update(SimpleNamespace(targets=labels), shown)
    values = meter.compute(Distributed(torch.device("cpu")))
    assert values["frozen_per_class"] == pytest.approx([3 / 7, 3 / 7, 1 / 7])
    assert values["aacc"] == 100
    meter.update(SimpleNamespace(targets=labels), SimpleNamespace(**vars(shown) | {"frozen": None}))
    values = meter.compute(Distributed(torch.device("cpu")))
    assert values["frozen_per_class"] is None, "an image of several windows is not told apart"


def segmenter(dynamic: bool, **sizes):
    sizes = dict(embed_dim=16, depth=4, class_token=False) | sizes
    spec = ModelSpec("vim_micro", kwargs=sizes, img_size=32)
    if dynamic:
        spec = replace(spec, name="dyvm_vim_micro", method="dyvm", pruning_layers=(1, 2, 3))
    model = build_model(spec, 0)
    return as_segmenter(model, make_head("light", model, 3), 3)


def test_dropped_patches_show_in_later_maps_what_they_were():
    """The map of the last layer at a patch that stage 1 dropped is its map before stage 1."""
    torch.manual_seed(0)
    model = segmenter(dynamic=True).eval()
    with torch.no_grad():
        result = model(torch.randn(2, 3, 32, 32))
    first, last = (result.maps[layer].flatten(2) for layer in (0, 3))
    for image, kept in enumerate(result.kept[0]):
        gone = [patch for patch in range(model.num_patches) if patch not in set(kept.tolist())]
        assert gone and torch.equal(first[image][:, gone], last[image][:, gone])
    assert not torch.equal(first, last)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("features", ["hidden", "residual"])
def test_training_and_evaluation_agree_on_the_maps(class_token, features, monkeypatch):
    """For equal decisions, all maps of masked training are those of evaluation's kept tokens."""
    torch.manual_seed(0)
    model = segmenter(dynamic=True, class_token=class_token)
    model.head.features = features
    for layer in model.layers:
        layer.mixer.block_head.bias.data.fill_(50.0)  # every scan runs
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        evaluated = model.eval()(images)
        kept = evaluated.kept

        def chosen(stage, tokens, scores):
            decision = torch.zeros_like(tokens.alive)
            return decision.scatter_(1, kept[stage], 1.0)

        monkeypatch.setattr(model.reduction, "decide", chosen)
        trained = model.train()(images)
    for layer, expected in evaluated.maps.items():
        torch.testing.assert_close(trained.maps[layer], expected, atol=2e-5, rtol=1e-4)


def test_every_parameter_is_taught():
    """None is without gradient, which several processes would wait for."""
    torch.manual_seed(0)
    model = segmenter(dynamic=True).train()
    result = model(torch.randn(2, 3, 32, 32))
    terms = SegmentationTerms(0.4)(result, torch.randint(3, (2, 32, 32)))
    sum(terms.values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_operations_of_a_segmenter():
    model = segmenter(dynamic=False)
    total, decoder = count_flops(model), decoder_operations(model)
    backbone = build_model(
        ModelSpec("vim_micro", kwargs=dict(embed_dim=16, depth=4, class_token=False), img_size=32),
        0,
    )
    assert decoder > 0 and total.exact == count_flops(backbone).exact + decoder
    assert decoder_operations(backbone) == 0


BATCH_NORM = """
import torch
from models.batch_norm import BatchNorm2d
from utils.distributed import init_distributed

distributed = init_distributed("cpu")
generator = torch.Generator().manual_seed(0)
x = torch.randn(6, 3, 5, 4, generator=generator) * 3 + 7
weight = torch.randn(6, 3, 5, 4, generator=generator)
norm = BatchNorm2d(3)
mine = slice(None) if distributed.world_size == 1 else [slice(0, 2), slice(2, 6)][distributed.rank]
part = x[mine].clone().requires_grad_()
y = norm(part)
(y * weight[mine]).sum().backward()
rows = [y, part.grad]
grads = torch.stack([norm.weight.grad, norm.bias.grad])
if distributed.world_size > 1:
    torch.distributed.all_reduce(grads)
name = f"{OUT}/{distributed.world_size}_{distributed.rank}.pt"
torch.save([rows, grads, norm.running_mean, norm.running_var], name)
distributed.shutdown()
"""


def test_batch_norm_of_two_processes_is_that_of_one(tmp_path):
    for processes in (1, 2):
        launch(processes, ["-c", f"OUT = {str(tmp_path)!r}\n{BATCH_NORM}"])
    (whole, grads, mean, variance), *parts = (
        torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1")
    )
    for expected, *halves in zip(whole, *(part[0] for part in parts), strict=True):
        torch.testing.assert_close(torch.cat(halves), expected, atol=1e-5, rtol=1e-4)
    for _, grads_here, mean_here, variance_here in parts:
        torch.testing.assert_close(grads_here, grads, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mean_here, mean)
        torch.testing.assert_close(variance_here, variance)
