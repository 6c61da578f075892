"""The loss of DyVM and its named terms.

total = w_cls CE + w_tok token ratio + w_blk block ratio + w_distill (KL of logits + distance of
kept tokens)

B images, M patches, S stages, d width. Source: "Dynamic Vision Mamba" (arXiv 2504.04787), section
3.4.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models import Result
from models.layouts import take

TOKEN_DISTANCES = ("mse", "kl")
RATIO_SCOPES = ("image", "batch")
TERMS = ("cls", "token_ratio", "block_ratio", "cls_kl", "token_distill")


def batch_statistics(result: Result) -> Tensor:
    """What the terms that are not sums over images need to know of a whole batch, without gradient.

    [2 + S]: mean gate, number of kept tokens, kept fraction of each stage.
    """
    stages = [decision.detach().mean() for decision in result.decisions]
    return torch.stack(
        [result.gates.detach().mean().float(), result.alive.detach().sum().float(), *stages]
    )


def mean_over_ranks(statistics: Tensor) -> Tensor:
    """Statistics of a part of the batch -> their mean over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return statistics
    total = statistics.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _with_value(local: Tensor, value: Tensor) -> Tensor:
    """The value of the whole batch with the gradient of this part.

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


def token_distance(
    result: Result, teacher_tokens: Tensor, distance: str = "mse", kept: Tensor | None = None
) -> Tensor:
    """Distance of the kept tokens to the teacher's same patches, mean over kept tokens; 0 when none
    is kept.

    teacher_tokens [B, M, d] in raster order. "mse": mean over d too; "kl": KL over the feature
    axis. `kept`: how many are kept, as a mean over the parts of the whole batch.
    """
    student, teacher = result.tokens.float(), take(teacher_tokens, result.origin).float()
    if distance == "mse":
        per_token = (student - teacher).square().mean(dim=-1)
    else:
        student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        per_token = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    keep = result.alive.detach()
    kept = keep.sum() if kept is None else kept
    return (per_token * keep).sum() / kept.clamp_min(torch.finfo(kept.dtype).tiny)


class DynamicLoss(nn.Module):
    """Classification, budget and distillation terms; a term is left out where its part of the model
    is missing.

    Args:
        criterion: classification loss of (logits, targets).
        token_keep: target of each stage, as fractions of the original patches; None: no token terms
            (block-only).
        block_keep: target of the mean gate; None: no block term (token-only).
        token_budget: False leaves out the ratio term alone (random and static pruning meet their
            budget anyway).
    """

    def __init__(
        self,
        criterion: nn.Module,
        *,
        token_keep: Sequence[float] | None,
        block_keep: float | None,
        token_weight: float = 10.0,
        block_weight: float = 10.0,
        distill_weight: float = 0.5,
        cls_weight: float = 1.0,
        token_distance: str = "mse",
        ratio_scope: str = "image",
        token_budget: bool = True,
    ):
        super().__init__()
        if token_distance not in TOKEN_DISTANCES:
            raise ValueError(
                f"token_distance {token_distance!r} must be one of {', '.join(TOKEN_DISTANCES)}"
            )
        if ratio_scope not in RATIO_SCOPES:
            raise ValueError(
                f"ratio_scope {ratio_scope!r} must be one of {', '.join(RATIO_SCOPES)}"
            )
        self.criterion, self.token_keep, self.block_keep = criterion, token_keep, block_keep
        self.token_weight, self.block_weight = token_weight, block_weight
        self.distill_weight, self.cls_weight = distill_weight, cls_weight
        self.token_distance, self.ratio_scope, self.token_budget = (
            token_distance,
            ratio_scope,
            token_budget,
        )

    def forward(
        self, result: Result, targets: Tensor, teacher: Result, whole: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> total, the weighted terms by name (their sum is the total).

        whole: `batch_statistics`, mean over the parts of the whole batch; by default this batch on
            all ranks.
        """
        whole = mean_over_ranks(batch_statistics(result)) if whole is None else whole
        mean_gate, kept, stage_means = whole[0], whole[1], whole[2:]
        terms = {"cls": self.cls_weight * self.criterion(result.logits.float(), targets)}
        if self.token_keep is not None and self.token_budget:
            batch_means = stage_means if self.ratio_scope == "batch" else None
            terms["token_ratio"] = self.token_weight * token_ratio(
                result.decisions, self.token_keep, batch_means
            )
        if self.block_keep is not None:
            terms["block_ratio"] = self.block_weight * block_ratio(
                result.gates, self.block_keep, mean_gate
            )
        terms["cls_kl"] = self.distill_weight * logits_distance(result.logits, teacher.logits)
        if self.token_keep is not None:
            distance = token_distance(result, teacher.tokens, self.token_distance, kept)
            terms["token_distill"] = self.distill_weight * distance
        return torch.stack(list(terms.values())).sum(), terms


class DenseLoss(nn.Module):
    """Classification alone, with the same signature as `DynamicLoss`."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(
        self,
        result: Result,
        targets: Tensor,
        teacher: Result | None = None,
        whole: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> total, {"cls": total}."""
        total = self.criterion(result.logits.float(), targets)
        return total, {"cls": total}
