"""What tells a selector which tokens matter: the teacher's gradient, and masks in place."""

import pytest
import torch
import torch.nn.functional as F
from helpers.reductions import SMALL, build

from benchmarks.checking import set_telling_weights
from models import FAMILIES, VisionMamba
from models.importance import Probe, with_importance
from models.layouts import HeadClassToken, MiddleClassToken, SpreadRegisters, insert
from models.reduction.base import mask_in_place
from models.tokens import Tokens


class Weighted(Probe):
    """A probe whose masks have given values."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def __call__(self, stage, tokens, model, images):
        mask = self.values[stage]
        one = torch.ones(len(mask), 1, dtype=mask.dtype)
        tokens.mask = insert(mask, one, tokens.class_slots)
        return tokens


def test_importance_is_the_size_of_the_derivative_by_the_mask(monkeypatch):
    """Finite differences of the loss by a factor of a token, from its stage to the last layer."""
    monkeypatch.setenv("DYVM_BACKEND", "reference")
    torch.manual_seed(0)
    model = VisionMamba(FAMILIES["vim"], **SMALL | dict(depth=3)).double().eval()
    set_telling_weights(model)
    model.requires_grad_(False)
    images, labels = torch.randn(2, 3, 32, 32).double(), torch.tensor([1, 2])

    def loss(result):
        return F.cross_entropy(result.logits, labels)

    result = with_importance(model, images, loss, (1, 2))
    assert model.pruning_layers == () and not isinstance(model.reduction, Probe)
    assert not result.logits.requires_grad and torch.equal(result.logits, model(images).logits)

    model.pruning_layers = (1, 2)
    for stage, token in ((0, 3), (0, 15), (1, 0), (1, 9)):
        values = []
        for change in (1e-5, -1e-5):
            masks = torch.ones(2, 2, 16).double()
            masks[stage:, 1, token] += change
            model.reduction = Weighted(masks)
            values.append(loss(model(images)).item())
        derivative = abs(values[0] - values[1]) / 2e-5
        assert derivative > 1e-6
        assert result.importance[stage][1, token].item() == pytest.approx(derivative, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [{}, dict(reduction="prune+merge")], ids=["prune", "prune+merge"])
def test_a_mask_in_place_has_the_values_of_the_paper_and_of_pruning(family, way, monkeypatch):
    """Two stages; decisions that keep other numbers of tokens in each image."""
    monkeypatch.setenv("DYVM_BACKEND", "torch")
    decisions = {}
    results = {}
    images = torch.randn(3, 3, 32, 32)
    for gradient in ("paper", "inplace"):
        model = build(family, route_blocks=False, selector_gradient=gradient, **way).train()
        set_telling_weights(model)

        def decide(stage, tokens, scores):
            torch.manual_seed(stage)
            drawn = torch.rand(3, 16) < torch.tensor([0.8, 0.5, 0.3])[:, None]
            decisions[stage] = decisions.get(stage - 1, torch.ones(3, 16)) * drawn
            return decisions[stage].gather(1, tokens.origin)

        monkeypatch.setattr(model.reduction, "decide", decide)
        results[gradient] = model(images)
        decisions.clear()
    paper, in_place = results["paper"], results["inplace"]
    torch.testing.assert_close(in_place.logits, paper.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(in_place.origin[0], torch.arange(16)), "nothing moves"
    values = paper.tokens * paper.alive.unsqueeze(-1)
    in_raster = torch.zeros_like(values).scatter_(
        1, paper.origin.unsqueeze(-1).expand_as(values), values
    )
    torch.testing.assert_close(
        in_place.tokens * in_place.alive.unsqueeze(-1), in_raster, rtol=1e-3, atol=1e-3
    )
    owners = [result.origin.gather(1, result.owner.clamp_min(0)) for result in (paper, in_place)]
    dropped = [result.owner < 0 for result in (paper, in_place)]
    assert torch.equal(*dropped) and torch.equal(owners[0][~dropped[0]], owners[1][~dropped[1]])


def test_the_class_token_in_place_stands_where_pruning_puts_it():
    """Alone, at the ends and between dropped tokens."""
    torch.manual_seed(0)
    for layout in (MiddleClassToken(), HeadClassToken(), SpreadRegisters(3)):
        slots = layout.class_slots(9)
        count = layout.num_tokens
        tokens = Tokens.first(torch.zeros(40, 9 + count, 1), slots, 9)
        numbers = torch.arange(9.0).expand(40, -1).unsqueeze(-1)
        mixed = insert(numbers, torch.full((40, count, 1), -1.0), slots)
        decision = (torch.rand(40, 9) < torch.linspace(0, 1, 40)[:, None]).float()
        after = mask_in_place(tokens, mixed, decision, layout)
        for image in range(40):
            left = after.residual[image, after.mask[image] > 0.5, 0].tolist()
            kept = torch.nonzero(decision[image]).flatten()
            expected = insert(
                kept.view(1, -1, 1).float(),
                torch.full((1, count, 1), -1.0),
                layout.class_slots(len(kept)),
            )
            assert left == expected.flatten().tolist()
            assert after.residual[image].flatten().sort().values.tolist() == [
                *[-1.0] * count, *range(9),
            ]  # fmt: skip


def spearman(one, other) -> float:
    ranks = [torch.argsort(torch.argsort(values)).double() for values in (one, other)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


@pytest.mark.parametrize("gradient, family", [("paper", "vim"), ("inplace", "videomamba")])
def test_what_a_dropped_token_hears(gradient, family, monkeypatch):
    """In the paper's training nothing, but for the three tokens behind the kept ones, which the
    backward convolution reads; in place how the loss would change with the token. (Vim's class
    token would move too, which no gradient knows of.)
    """
    monkeypatch.setenv("DYVM_BACKEND", "torch")
    model = build(
        family, depth=3, pruning_layers=(1,), token_keep=(0.5,), route_blocks=False,
        selector_gradient=gradient, patch_size=4, embed_dim=32,
    ).double()  # fmt: skip
    torch.manual_seed(3)
    images, labels = torch.randn(6, 3, 32, 32).double(), torch.randint(0, 7, (6,))
    decision = torch.stack([torch.randperm(64) < 32 for _ in images]).double().requires_grad_()

    def losses(decision):
        model.reduction.decide = lambda stage, tokens, scores: decision
        return F.cross_entropy(model.train()(images).logits, labels, reduction="none")

    heard = torch.autograd.grad(losses(decision).sum(), decision)[0]
    decision = decision.detach()
    dropped = decision < 0.5
    if gradient == "paper":
        assert (heard[dropped].view(6, 32) != 0).sum(1).tolist() == [3] * 6
        assert (heard[~dropped] != 0).all()
        return
    with torch.no_grad():
        before, effects = losses(decision), torch.zeros(6, 64).double()
        for token in range(64):
            flipped = decision.clone()
            flipped[:, token] = 1 - flipped[:, token]
            effects[:, token] = (losses(flipped) - before) * (1 - 2 * decision[:, token])
    for part in (dropped, ~dropped):
        found = [spearman(h[p], e[p]) for h, e, p in zip(heard, effects, part, strict=True)]
        assert sum(found) / 6 > 0.7, found
        assert (heard.sign() == effects.sign())[part].double().mean() > 0.8
