"""What becomes of the patch tokens at a stage: one class per strategy.

A reduction is called before each pruning layer. In training it decides which tokens go, keeps all
slots and re-arranges them: kept tokens in front, dropped ones behind and masked. At evaluation it
gathers the tokens that stay. It also reports how many stay, from which operations are counted.

B images, M patches, m slots that enter a stage, L = m + n with the n class tokens, k slots that
leave it, d width. Source: "Dynamic Vision Mamba" (arXiv 2504.04787), section 3.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import sampling
from .layouts import TokenLayout, extract, insert, reordered, take
from .pruning import best_in_order, kept_first
from .tokens import Frozen, Tokens, thaw

SCORER_INPUTS = ("hidden", "B", "delta")


class Staged(Protocol):
    """What a reduction needs of its model."""

    training: bool
    layers: nn.ModuleList
    layout: TokenLayout
    num_patches: int
    pruning_layers: tuple[int, ...]
    score_predictors: nn.ModuleList


class Reduction:
    """Drops tokens; at evaluation each stage keeps a fixed fraction of the original patches.

    A subclass that drops tokens chooses them: `decide` in training, `choose` at evaluation. One
    that does something else with them overrides `__call__`.
    """

    learns = False  # whether it has score predictors, which a budget term holds to the fractions
    freezes = False  # whether feature maps go on to show dropped patches, and so teach decisions
    zeroes = False  # as DyVM's release: dropped tokens become 0, with its gradients (see `freeze`)

    def __init__(self, token_keep: Sequence[float] = ()):
        self.token_keep = tuple(token_keep)  # fraction of the original patches after each stage

    def kept_counts(self, patches: int) -> list[int]:
        """How many of `patches` original patches each stage keeps at evaluation."""
        return [int(ratio * patches) for ratio in self.token_keep]

    def __call__(self, stage: int, tokens: Tokens, model: Staged, images: Tensor) -> Tokens:
        """The sequence after a stage; its hidden state is then part of the residual, unless what
        is dropped is frozen in training.
        """
        if model.training and self.freezes:
            whole = thaw(tokens, model.layout)
            mixed = whole.residual + whole.hidden
            decision = self.decide(stage, whole, mixed, model, images)
            return freeze(whole, decision, model.layout, self.zeroes)
        drop_path = model.layers[model.pruning_layers[stage]].drop_path
        mixed = tokens.residual + drop_path(tokens.hidden)
        if model.training:
            decision = self.decide(stage, tokens, mixed, model, images)
            return rearrange(tokens, mixed, decision, model.layout)
        return gather(tokens, mixed, self.choose(stage, tokens, mixed, model, images), model.layout)

    def decide(
        self, stage: int, tokens: Tokens, mixed: Tensor, model: Staged, images: Tensor
    ) -> Tensor:
        """Training: cumulative decision [B, m], 1 or 0, with gradient; dropped tokens stay dropped.

        mixed [B, L, d]: hidden + residual.
        """
        raise NotImplementedError

    def choose(
        self, stage: int, tokens: Tokens, mixed: Tensor, model: Staged, images: Tensor
    ) -> Tensor:
        """Evaluation: the slots that stay, ascending [B, k]."""
        raise NotImplementedError


class LearnedScores(Reduction):
    """The paper's strategy: a predictor scores each token.

    Training makes a noisy decision, evaluation keeps the best k. scorer_input: what the predictor
    reads, see `scores`.
    """

    learns = True

    def __init__(self, token_keep: Sequence[float] = (), scorer_input: str = "hidden"):
        super().__init__(token_keep)
        if scorer_input not in SCORER_INPUTS:
            raise ValueError(
                f"scorer_input {scorer_input!r} must be one of {', '.join(SCORER_INPUTS)}"
            )
        self.scorer_input = scorer_input

    def scores(
        self, stage: int, tokens: Tokens, mixed: Tensor, policy: Tensor, model: Staged
    ) -> Tensor:
        """Log-probabilities (keep, drop) [B, m, 2] of the patch tokens that enter a stage.

        The predictor reads the hidden state with its residual, or B or the raw step of the layer
        before. policy [B, m]: 1 for tokens that are still alive.
        """
        predictor = model.score_predictors[stage]
        if self.scorer_input == "hidden":
            return predictor(extract(mixed, tokens.class_slots)[0], policy)
        previous = model.layers[model.pruning_layers[stage] - 1]
        norm = previous.norm
        weight = norm.weight.to(tokens.residual.dtype)
        normed = F.rms_norm(tokens.residual, weight.shape, weight, norm.eps)
        B, step = previous.mixer.scan_inputs(normed.to(norm.weight.dtype), tokens.mask)
        features, _ = extract(B if self.scorer_input == "B" else step, tokens.class_slots)
        return predictor(features, policy)

    def decide(self, stage, tokens, mixed, model, images):
        log_probs = self.scores(stage, tokens, mixed, tokens.alive, model)
        return sampling.keep_decision(log_probs, f"token.stage{stage}") * tokens.alive

    def choose(self, stage, tokens, mixed, model, images):
        log_probs = self.scores(stage, tokens, mixed, mixed.new_ones(tokens.alive.shape), model)
        return best_in_order(log_probs[..., 0], self.kept_counts(model.num_patches)[stage])


class FixedBudget(Reduction):
    """Baselines that keep the same number of tokens of every image, in training too."""

    def decide(self, stage, tokens, mixed, model, images):
        counts = [model.num_patches, *self.kept_counts(model.num_patches)]
        chosen = self.slots(stage, images, counts[stage], counts[stage + 1], fresh=True)
        alive_first, _ = kept_first(tokens.alive)
        return torch.zeros_like(tokens.alive).scatter_(1, take(alive_first, chosen), 1.0)

    def choose(self, stage, tokens, mixed, model, images):
        count = self.kept_counts(model.num_patches)[stage]
        return self.slots(stage, images, tokens.alive.shape[1], count, fresh=False)

    def slots(self, stage: int, images: Tensor, alive: int, count: int, fresh: bool) -> Tensor:
        """`count` of the first `alive` slots, ascending [B, count]; `fresh` in training."""
        raise NotImplementedError


class RandomTokens(FixedBudget):
    """Keeps a random choice: newly drawn in training, determined by the image at evaluation."""

    def slots(self, stage, images, alive, count, fresh):
        return best_in_order(sampling.image_noise(images, alive, stage, fresh=fresh), count)


class StaticTokens(FixedBudget):
    """Keeps evenly spread tokens."""

    def slots(self, stage, images, alive, count, fresh):
        slots = torch.arange(count, device=images.device) * alive // max(count, 1)
        return slots.expand(images.shape[0], -1)


STRATEGIES: dict[str, type[Reduction]] = {
    "learned": LearnedScores,
    "random": RandomTokens,
    "static": StaticTokens,
}
TOKEN_STRATEGIES = tuple(STRATEGIES)


def make_reduction(strategy: str, scorer_input: str) -> Reduction:
    """The reduction named by `--token-strategy`. Raises ValueError for an unknown name."""
    if strategy not in STRATEGIES:
        raise ValueError(f"token_strategy {strategy!r} must be one of {', '.join(STRATEGIES)}")
    if strategy == "learned":
        return LearnedScores(scorer_input=scorer_input)
    return STRATEGIES[strategy]()


def rearrange(
    tokens: Tokens,
    residual: Tensor,
    decision: Tensor,
    layout: TokenLayout,
    hidden: Tensor | None = None,
) -> Tokens:
    """Training: kept tokens to the front, dropped ones behind them and masked.

    residual, hidden [B, L, d]; decision [B, m], 1 or 0, with gradient.
    """
    order, kept = kept_first(decision.detach())
    class_slots = layout.class_slots(kept)
    alive = take(decision, order)
    slots = torch.arange(order.shape[1], device=order.device).expand_as(order)
    moved = torch.where(decision > 0.5, torch.empty_like(order).scatter_(1, order, slots), -1)
    index = reordered(order, tokens.class_slots, class_slots)
    return replace(
        tokens,
        hidden=None if hidden is None else take(hidden, index),
        residual=take(residual, index),
        class_slots=class_slots,
        origin=take(tokens.origin, order),
        alive=alive,
        owner=follow(tokens.owner, moved),
        mask=insert(alive, alive.new_ones(class_slots.shape), class_slots),
        decisions=(*tokens.decisions, decision),
    )


def freeze(whole: Tokens, decision: Tensor, layout: TokenLayout, zeroes: bool) -> Tokens:
    """Training: as `rearrange`; feature maps keep what they showed of the dropped tokens.

    The decision is taught through these maps, and through the mask. With `zeroes` dropped tokens
    are multiplied by their decision too, as in DyVM's release: the values are equal, but RMSNorm
    has a slope of 316 at 0, and the gradients that come back through it are tens of times too
    large.

    whole: from `thaw`; decision [B, M] in raster order.
    """
    hidden, class_tokens = extract(whole.hidden, whole.class_slots)
    residual, _ = extract(whole.residual, whole.class_slots)
    keep = decision.unsqueeze(-1)
    frozen = Frozen((1 - keep) * hidden, (1 - keep) * residual)
    sequence = whole.hidden, whole.residual
    if zeroes:
        factor = insert(keep, torch.ones_like(class_tokens[..., :1]), whole.class_slots)
        sequence = tuple((factor * part).to(part.dtype) for part in sequence)
    arranged = rearrange(whole, sequence[1], decision, layout, sequence[0])
    return replace(arranged, frozen=frozen)


def gather(tokens: Tokens, mixed: Tensor, chosen: Tensor, layout: TokenLayout) -> Tokens:
    """Evaluation: the chosen slots [B, k], ascending, of mixed [B, L, d]; the others are gone."""
    patches, class_tokens = extract(mixed, tokens.class_slots)
    class_slots = layout.class_slots(chosen.shape[1])
    origin = take(tokens.origin, chosen)
    slots = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    moved = torch.full_like(tokens.origin, -1).scatter_(1, chosen, slots)
    return replace(
        tokens,
        hidden=None,
        residual=insert(take(patches, chosen), class_tokens, class_slots),
        class_slots=class_slots,
        origin=origin,
        alive=tokens.alive[:, : chosen.shape[1]],
        owner=follow(tokens.owner, moved),
        kept=(*tokens.kept, origin),
    )


def follow(owner: Tensor, moved: Tensor) -> Tensor:
    """Owners [B, M] after their slots moved to moved [B, m]; -1: dropped."""
    moved = F.pad(moved, (0, 1), value=-1)  # the entry that an owner of -1 indexes
    return take(moved, owner % moved.shape[1])
