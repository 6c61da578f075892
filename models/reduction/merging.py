"""Merging: tokens become means of several, so that nothing is dropped.

B images, M patches, m slots that enter a stage, L = m + n with the n class tokens, k slots that
leave it, d width.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts import extract, insert, take
from ..tokens import Tokens
from .base import Reduction, Staged, gather, mix, observed

LARGEST_TABLE = 1 << 20  # similarities of an image that are held at once


def average(
    tokens: Tokens, mixed: Tensor, into: Tensor, weight: Tensor | None = None
) -> tuple[Tokens, Tensor]:
    """Each token becomes the mean of those that go into it, weighted by the patches they hold.

    mixed [B, L, d]; into [B, m], a token's destination, its own slot if it stays; weight [B, m],
    0 for tokens that do not count. -> tokens with their new sizes, mixed.
    """
    patches, class_tokens = extract(mixed, tokens.class_slots)
    size = patches.new_ones(into.shape) if tokens.size is None else tokens.size
    counted = size if weight is None else size * weight
    total = torch.zeros_like(size).scatter_add_(1, into, counted)
    index = into.unsqueeze(-1).expand_as(patches)
    summed = torch.zeros_like(patches).scatter_add_(1, index, patches * counted.unsqueeze(-1))
    received = (total > 0).unsqueeze(-1)
    means = torch.where(received, summed / total.clamp_min(1).unsqueeze(-1), patches)
    return replace(tokens, size=total), insert(means, class_tokens, tokens.class_slots)


def nearest_chosen(features: Tensor, chosen: Tensor) -> Tensor:
    """The most similar chosen slot of each token [B, m], by the cosine; its own for a chosen one.

    features [B, m, d]; chosen [B, k], ascending. Only similarities of others to chosen ones are
    computed.
    """
    batch, count, _ = features.shape
    own = torch.arange(count, device=features.device).expand(batch, -1)
    if not chosen.shape[1]:
        return own
    left_over = torch.ones_like(own).scatter_(1, chosen, 0)
    others = left_over.argsort(dim=1, descending=True, stable=True)[:, : count - chosen.shape[1]]
    normed = F.normalize(features.float(), dim=-1)
    targets = take(normed, chosen).transpose(1, 2)
    rows = max(1, LARGEST_TABLE // chosen.shape[1])
    nearest = [(part @ targets).argmax(dim=-1) for part in take(normed, others).split(rows, dim=1)]
    return own.scatter(1, others, take(chosen, torch.cat(nearest, dim=1)))


def nearest_kept(features: Tensor, keep: Tensor) -> Tensor:
    """The same for any number of kept slots, keep [B, m] bool."""
    batch, count, _ = features.shape
    own = torch.arange(count, device=features.device).expand(batch, -1)
    normed = F.normalize(features.float(), dim=-1)
    rows = max(1, LARGEST_TABLE // max(1, count))
    nearest = [
        (part @ normed.transpose(1, 2)).masked_fill(~keep.unsqueeze(1), -2).argmax(dim=-1)
        for part in normed.split(rows, dim=1)
    ]
    return torch.where(keep, own, torch.cat(nearest, dim=1)) if nearest else own


class Merging(Reduction):
    """Merges tokens; the same in training and at evaluation."""

    merges = True

    def __call__(self, stage: int, tokens: Tokens, model: Staged, images: Tensor) -> Tokens:
        leaving = self.kept_counts(model.num_patches)[stage]
        into, chosen = self.match(stage, tokens, leaving, model)
        tokens, mixed = self.averaged(tokens, mix(stage, tokens, model), into)
        return gather(tokens, mixed, chosen, model.layout, into)

    def averaged(self, tokens: Tokens, mixed: Tensor, into: Tensor) -> tuple[Tokens, Tensor]:
        return average(tokens, mixed, into)

    def match(
        self, stage: int, tokens: Tokens, leaving: int, model: Staged
    ) -> tuple[Tensor, Tensor]:
        """Each token's destination [B, m], and the slots that stay, ascending [B, k]."""
        raise NotImplementedError


class BipartiteMerging(Merging):
    """R-MeeTo's: alternate tokens form two sets; the most similar pairs between them are merged.

    Similarity is the cosine of the last mixer's output. A stage merges `merge_tokens` tokens.
    Source: R-MeeTo (arXiv 2412.12496) after ToMe (arXiv 2210.09461).
    """

    name = "merge"

    def __init__(self, merge_tokens: int):
        super().__init__()
        self.merge_tokens = merge_tokens

    def kept_counts(self, patches: int) -> list[int]:
        return [patches - self.merge_tokens * (s + 1) for s in range(len(self.token_keep))]

    def own_keep(self, patches: int, stages: int) -> list[float]:
        left = [patches - self.merge_tokens * stage for stage in range(1, stages + 1)]
        if left and left[-1] < 1:
            raise ValueError(
                f"merge_tokens {self.merge_tokens} at each of {stages} stages are more than the "
                f"{patches} patches"
            )
        return [count / patches for count in left]

    def check_counts(self, patches: int) -> None:
        if list(self.token_keep) != self.own_keep(patches, len(self.token_keep)):
            raise ValueError(
                f"token_keep {list(self.token_keep)} has no meaning with reduction 'merge', which "
                f"merges {self.merge_tokens} tokens at each stage"
            )
        entering = patches
        for stage, leaving in enumerate(self.kept_counts(patches), start=1):
            merged = entering - leaving
            if merged > entering // 2:
                raise ValueError(
                    f"stage {stage} would merge {merged} of {entering} tokens; a stage merges "
                    f"pairs, and so at most {entering // 2}: fewer merge_tokens, or fewer stages"
                )
            entering = leaving

    def operations(self, entering: int, leaving: int, model: Staged) -> int:
        return (entering - entering // 2) * (entering // 2) * model.embed_dim

    def match(self, stage, tokens, leaving, model):
        features, _ = extract(tokens.hidden.detach(), tokens.class_slots)
        features = F.normalize(features.float(), dim=-1)
        batch, entering, _ = features.shape
        slots = torch.arange(entering, device=features.device).expand(batch, -1)
        if entering < 2:
            return slots, slots
        similarity, partner = (features[:, ::2] @ features[:, 1::2].transpose(1, 2)).max(dim=-1)
        merged = similarity.topk(entering - leaving, dim=1).indices
        into = slots.scatter(1, 2 * merged, 2 * take(partner, merged) + 1)
        stays = torch.ones_like(slots).scatter_(1, 2 * merged, 0)
        # A stable sort puts the slots that stay in front, in their order.
        return into, stays.argsort(dim=1, descending=True, stable=True)[:, :leaving]


class StepGroups(Merging):
    """MTR's: tokens with the smallest steps are merged into those of the middle.

    A token's step is the mean over channels, summed over both scans, in the layer before. Those
    with the largest are left alone; each of the m - k smallest goes to the most similar of the
    m - k next ones (of all others, if fewer remain), with equal weights. The paper's abstract
    leaves the size of the middle group open. Source: MTR (arXiv 2507.14042).
    """

    name = "mtr"
    observes = "steps"

    def operations(self, entering: int, leaving: int, model: Staged) -> int:
        merged = entering - leaving
        matched = merged * min(merged, leaving) * model.embed_dim
        length = entering + model.layout.num_tokens
        return matched + model.layers[0].mixer.step_operations(length)

    def averaged(self, tokens: Tokens, mixed: Tensor, into: Tensor) -> tuple[Tokens, Tensor]:
        _, mixed = average(replace(tokens, size=None), mixed, into)
        return tokens, mixed

    def match(self, stage, tokens, leaving, model):
        step = observed(stage, tokens, model)
        entering = step.shape[1]
        merged = entering - leaving
        ranked = step.argsort(dim=1, descending=True, stable=True)
        middle = ranked[:, max(0, leaving - merged) : leaving]
        source = ranked[:, leaving:]
        features = F.normalize(
            extract(tokens.hidden.detach(), tokens.class_slots)[0].float(), dim=-1
        )
        similarity = take(features, source) @ take(features, middle).transpose(1, 2)
        slots = torch.arange(entering, device=step.device).expand_as(step)
        chosen = ranked[:, :leaving].sort(dim=1).values
        if not merged:
            return slots, chosen
        return slots.scatter(1, source, take(middle, similarity.argmax(dim=-1))), chosen
