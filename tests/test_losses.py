"""The loss terms where no recording covers them: edge cases, and several processes."""

import pytest
import torch
from torch import nn

from losses import (
    Budgets,
    ClassificationTerms,
    Distillation,
    Objective,
    block_ratio,
    selector_distance,
    token_distance,
    token_ratio,
)
from models import Result, Scored

CLASSIFY = ClassificationTerms(nn.CrossEntropyLoss())


def result(batch=3, patches=6, width=4, classes=5, depth=2):
    torch.manual_seed(0)
    decision = (torch.rand(batch, patches) < 0.5).float().requires_grad_()
    return Result(
        torch.randn(batch, classes, requires_grad=True),
        torch.randn(batch, patches, width, requires_grad=True),
        torch.stack([torch.randperm(patches) for _ in range(batch)]),
        (torch.rand(batch, patches) < 0.5).float(),
        torch.ones(depth, batch, 2, requires_grad=True),
        [decision],
    )


def test_dense_is_classification_alone():
    r = result()
    objective = Objective(CLASSIFY)
    assert objective.statistics(r) is None
    total, terms = objective(r, torch.tensor([0, 1, 2]))
    assert terms.keys() == {"cls"} and total is terms["cls"]
    assert total.item() == pytest.approx(
        nn.functional.cross_entropy(r.logits, torch.tensor([0, 1, 2])).item()
    )


def test_terms_follow_the_parts_of_the_model():
    r, targets = result(), torch.tensor([0, 1, 2])
    names = {}
    for token_keep, block_keep, budget in (
        ((0.5,), 0.8, True),
        ((0.5,), None, True),
        (None, 0.8, True),
        ((0.5,), 0.8, False),
    ):
        loss = Objective(
            CLASSIFY,
            Budgets(token_keep=token_keep if budget else None, block_keep=block_keep),
            Distillation(tokens=token_keep is not None),
        )
        total, terms = loss(r, targets, result())
        assert total.item() == pytest.approx(sum(term.item() for term in terms.values()), rel=1e-6)
        names[token_keep, block_keep, budget] = list(terms)
    assert names == {
        ((0.5,), 0.8, True): ["cls", "token_ratio", "block_ratio", "cls_kl", "token_distill"],
        ((0.5,), None, True): ["cls", "token_ratio", "cls_kl", "token_distill"],
        (None, 0.8, True): ["cls", "block_ratio", "cls_kl"],
        ((0.5,), 0.8, False): ["cls", "block_ratio", "cls_kl", "token_distill"],
    }


def test_budgets_without_a_teacher():
    """And the terms themselves say whether they look at the whole batch."""
    r, targets = result(), torch.tensor([0, 1, 2])
    for budgets, names, needs in (
        (Budgets(token_keep=(0.5,), block_keep=0.8), ["token_ratio", "block_ratio"], True),
        (Budgets(token_keep=(0.5,), ratio_scope="batch"), ["token_ratio"], True),
        (Budgets(token_keep=(0.5,)), ["token_ratio"], False),
        (Budgets(), [], False),
    ):
        objective = Objective(CLASSIFY, budgets)
        total, terms = objective(r, targets)
        assert list(terms) == ["cls", *names]
        assert (objective.statistics(r) is not None) == needs
        assert total.item() == pytest.approx(sum(term.item() for term in terms.values()), rel=1e-6)


def test_no_result_is_computed_for_statistics_that_no_term_needs():
    def results():
        raise AssertionError("computed")
        yield

    assert Objective(CLASSIFY, Budgets(token_keep=(0.5,))).whole_batch(results()) is None


def test_budgets_are_zero_on_target():
    decisions = [torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0]])]
    assert token_ratio(decisions, [0.5]).item() == 0
    assert token_ratio(
        [torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])], [0.5]
    ).item() == pytest.approx(0.25)
    assert (
        token_ratio(
            [torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])], [0.5], torch.tensor([0.5])
        ).item()
        == 0
    )
    gates = torch.ones(2, 3, 2)
    assert block_ratio(gates, 1.0).item() == 0 and block_ratio(gates, 0.8).item() == pytest.approx(
        0.04
    )


def test_distance_compares_the_same_patches():
    r = result()
    teacher = torch.empty(3, 6, 4)
    for image in range(3):
        teacher[image, r.origin[image]] = r.tokens.detach()[image]
    assert token_distance(r, teacher).item() == 0
    dropped = r.alive[0].argmin()
    teacher[0, r.origin[0, dropped]] += 10
    assert r.alive[0, dropped] == 0 and token_distance(r, teacher).item() == 0


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_no_token_kept_gives_no_distance_and_no_gradient(distance):
    r = result()
    r.alive.zero_()
    value = token_distance(r, torch.randn(3, 6, 4), distance)
    value.backward()
    assert value.item() == 0 and not r.tokens.grad.any()


@pytest.mark.parametrize(
    "part, arguments",
    [(Distillation, dict(token_distance="l1")), (Budgets, dict(ratio_scope="epoch"))],
)
def test_unknown_choices(part, arguments):
    with pytest.raises(ValueError, match="must be one of"):
        part(**arguments)


def test_scores_are_drawn_to_the_importance_of_the_tokens_that_are_there():
    """Zero where the scores are the logarithms of the importance, whatever the order; teaches
    nothing in a step without importance.
    """
    torch.manual_seed(0)
    importance = torch.rand(3, 8) + 0.1
    origin = torch.stack([torch.randperm(8)[:5] for _ in range(3)])
    alive = torch.ones(3, 5)
    alive[0, 2] = 0
    right = (importance.gather(1, origin).log() + 3).requires_grad_()
    distance = selector_distance([Scored(right, origin, alive)], [importance])
    assert distance.item() == pytest.approx(0, abs=1e-6)
    off = torch.randn(3, 5, requires_grad=True)
    selector_distance([Scored(off, origin, alive)], [importance]).backward()
    assert (off.grad[alive == 0] == 0).all() and (off.grad[alive > 0] != 0).all()
    scores = torch.randn(3, 5, requires_grad=True)
    distance = selector_distance([Scored(scores, origin, torch.ones(3, 5))], [importance])
    target = importance.gather(1, origin)
    target = target / target.sum(1, keepdim=True)
    expected = (target * (target.log() - scores.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(distance, expected)
    distance.backward()
    torch.testing.assert_close(scores.grad, (scores.softmax(1) - target).detach() / 3)

    scores.grad = None
    nothing = selector_distance([Scored(scores, origin, alive)], [])
    nothing.backward()
    assert nothing.item() == 0 and not scores.grad.any()
