"""The loss of DyVM and its named terms.

    total = task terms + w_tok token ratio + w_blk block ratio
            + w_distill (distance of the answers + distance of kept tokens)

In classification the task's term is cross entropy, and the distance of the answers is the KL
divergence of the logits.

B images, M patches, S stages, d width. Source: "Dynamic Vision Mamba" (arXiv 2504.04787), section
3.4.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Result, Scored
from models.layouts import take
from utils.distributed import mean_over_ranks

TOKEN_DISTANCES = ("mse", "kl")
RATIO_SCOPES = ("image", "batch")


def batch_statistics(result: Result) -> Tensor:
    """Whole-batch statistics for the terms that are not means over images, without gradient.

    [2 + S]: mean gate, number of kept tokens, kept fraction of each stage.
    """
    stages = [decision.detach().mean() for decision in result.decisions]
    return torch.stack(
        [result.gates.detach().mean().float(), result.alive.detach().sum().float(), *stages]
    )


def _with_value(local: Tensor, value: Tensor) -> Tensor:
    """The whole batch's value with the gradient of this part.

    Gradients are averaged over the parts (by DDP over ranks, by the loop over accumulated batches);
    with this value in a non-linear term, the average is the gradient of the term on the joined
    batch.
    """
    return local + (value - local).detach()


def token_ratio(
    decisions: Sequence[Tensor], targets: Sequence[float], batch_means: Tensor | None = None
) -> Tensor:
    """Mean over stages of (kept fraction - target)^2; decisions S x [B, M].

    Each image is held to the target, or, with `batch_means` [S], only the batch as a whole.
    """
    kept = torch.stack([decision.mean(dim=1) for decision in decisions])  # [S, B]
    if batch_means is not None:
        kept = _with_value(kept.mean(dim=1), batch_means)
    return torch.stack(
        [(stage - target).square().mean() for stage, target in zip(kept, targets, strict=True)]
    ).mean()


def block_ratio(gates: Tensor, target: float, batch_mean: Tensor | None = None) -> Tensor:
    """(mean of all gates - target)^2; gates [depth, B, 2]; `batch_mean`: of the whole batch."""
    mean = gates.mean()
    return ((mean if batch_mean is None else _with_value(mean, batch_mean)) - target) ** 2


def logits_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the class probabilities, mean over the batch; logits [B, C]."""
    return F.kl_div(
        student.float().log_softmax(-1),
        teacher.float().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


class ClassificationTerms(nn.Module):
    """`cls`: a loss of (logits [B, C], targets), logits in float32."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(self, result: Result, targets: Tensor) -> dict[str, Tensor]:
        return {"cls": self.criterion(result.logits.float(), targets)}


def logits_terms(result: Result, teacher_result: Result) -> dict[str, Tensor]:
    """`cls_kl`: KL divergence to the teacher's class probabilities."""
    return {"cls_kl": logits_distance(result.logits, teacher_result.logits)}


def token_distance(
    result: Result, teacher_tokens: Tensor, distance: str = "mse", kept: Tensor | None = None
) -> Tensor:
    """Distance of kept tokens to the teacher's at the same patches, mean over kept tokens.

    0 if none is kept. teacher_tokens [B, M, d] in raster order. "mse": mean over d too; "kl": KL
    over the feature axis. `kept`: number of kept tokens, as a mean over the parts of the whole
    batch.
    """
    student, teacher = result.tokens.float(), take(teacher_tokens, result.origin).float()
    if distance == "mse":
        per_token = (student - teacher).square().mean(dim=-1)
    else:
        student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        per_token = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    alive = result.alive.detach()
    kept = alive.sum() if kept is None else kept
    return (per_token * alive).sum() / kept.clamp_min(torch.finfo(kept.dtype).tiny)


def selector_distance(scored: Sequence[Scored], importance: Sequence[Tensor]) -> Tensor:
    """KL divergence of a selector's scores, as a distribution over the tokens of an image, from
    their shares of the importance to the teacher; mean over stages and images.

    importance S x [B, M], from `models.importance`; empty: nothing is taught in this step.
    """
    if not importance:
        return sum(stage.scores.sum() for stage in scored) * 0.0
    distances = []
    for stage, matters in zip(scored, importance, strict=True):
        target = take(matters, stage.origin).float() * stage.alive
        target = target / target.sum(dim=1, keepdim=True).clamp_min(torch.finfo().tiny)
        lowest = torch.finfo(torch.float32).min / 2
        scores = stage.scores.float().masked_fill(stage.alive < 0.5, lowest)
        surprise = torch.special.xlogy(target, target) - target * scores.log_softmax(dim=1)
        distances.append(surprise.sum(dim=1).mean())
    return torch.stack(distances).mean()


@dataclass(frozen=True)
class Budgets:
    """The terms that hold a dynamic model to its budgets.

    Args:
        token_keep: target of each stage, as fractions of the original patches; None: no such term
            (nothing is dropped, or a fixed number of tokens, which meets its budget anyway).
        block_keep: target of the mean gate; None: no such term (nothing is routed).
        ratio_scope: whether each "image" or the "batch" as a whole meets the stages' targets.
    """

    token_keep: Sequence[float] | None = None
    block_keep: float | None = None
    token_weight: float = 10.0
    block_weight: float = 10.0
    ratio_scope: str = "image"

    def __post_init__(self):
        _check_choice("ratio_scope", self.ratio_scope, RATIO_SCOPES)

    @property
    def reads_whole_batch(self) -> bool:
        return self.block_keep is not None or (
            self.token_keep is not None and self.ratio_scope == "batch"
        )

    def terms(self, result: Result, whole: Tensor | None) -> dict[str, Tensor]:
        """`token_ratio` and `block_ratio`, weighted; `whole`: `batch_statistics` of the batch."""
        terms = {}
        if self.token_keep is not None:
            means = whole[2:] if self.ratio_scope == "batch" else None
            ratio = token_ratio(result.decisions, self.token_keep, means)
            terms["token_ratio"] = self.token_weight * ratio
        if self.block_keep is not None:
            ratio = block_ratio(result.gates, self.block_keep, whole[0])
            terms["block_ratio"] = self.block_weight * ratio
        return terms


@dataclass(frozen=True)
class Distillation:
    """The terms that draw a dynamic model towards its dense teacher.

    Args:
        answers: (result, teacher's result) -> the task's unweighted terms by name.
        tokens: whether to add the distance of kept tokens, for models that drop any.
        token_distance: "mse" or "kl".
        selector_weight: of the term that teaches a distilled selector; it is there whenever the
            model's result holds scores.
    """

    answers: Callable[[Result, Result], dict[str, Tensor]] = logits_terms
    tokens: bool = True
    weight: float = 0.5
    token_distance: str = "mse"
    selector_weight: float = 1.0

    def __post_init__(self):
        _check_choice("token_distance", self.token_distance, TOKEN_DISTANCES)

    @property
    def reads_whole_batch(self) -> bool:
        return self.tokens

    def terms(
        self, result: Result, teacher_result: Result, whole: Tensor | None
    ) -> dict[str, Tensor]:
        """The task's terms and `token_distill`, weighted; `whole`: `batch_statistics`."""
        terms = dict(self.answers(result, teacher_result))
        if self.tokens:
            terms["token_distill"] = token_distance(
                result, teacher_result.tokens, self.token_distance, whole[1]
            )
        terms = {name: self.weight * term for name, term in terms.items()}
        if result.scored:
            taught = selector_distance(result.scored, teacher_result.importance)
            terms["selector"] = self.selector_weight * taught
        return terms


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} must be one of {', '.join(choices)}")


class Objective(nn.Module):
    """The sum of the task's terms, the budgets and the distillation, as far as they are present.

    Args:
        criterion: (result, targets) -> the task's weighted terms by name.
    """

    def __init__(
        self,
        criterion: Callable[[Result, Tensor], dict[str, Tensor]],
        budgets: Budgets | None = None,
        distillation: Distillation | None = None,
    ):
        super().__init__()
        self.criterion, self.budgets, self.distillation = criterion, budgets, distillation

    @property
    def reads_whole_batch(self) -> bool:
        """Whether a term is not a mean over images, and so needs `batch_statistics`."""
        parts = (self.budgets, self.distillation)
        return any(part is not None and part.reads_whole_batch for part in parts)

    def statistics(self, result: Result) -> Tensor | None:
        """This part's share of what the terms need to know of the whole batch; None: nothing."""
        return batch_statistics(result) if self.reads_whole_batch else None

    @torch.no_grad()
    def whole_batch(self, results: Iterable[Result]) -> Tensor | None:
        """Mean of the statistics over accumulated parts and ranks.

        None if no term needs them; then no result is computed.
        """
        if not self.reads_whole_batch:
            return None
        return mean_over_ranks(torch.stack([batch_statistics(r) for r in results]).mean(dim=0))

    def forward(
        self,
        result: Result,
        targets: Tensor,
        teacher_result: Result | None = None,
        whole: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> total, and the weighted terms by name that it is the sum of.

        Args:
            teacher_result: required for distillation.
            whole: from `whole_batch`; by default, this batch on all ranks is the whole one.
        """
        statistics = self.statistics(result) if whole is None else None
        if statistics is not None:
            whole = mean_over_ranks(statistics)
        terms = dict(self.criterion(result, targets))
        if self.budgets is not None:
            terms |= self.budgets.terms(result, whole)
        if self.distillation is not None:
            terms |= self.distillation.terms(result, teacher_result, whole)
        return total_of(terms), terms


def total_of(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of scalars, at least one."""
    values = list(terms.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum()
