"""Which tokens stay: one class per selector.

A selector that decides freely in training (the paper's) keeps all slots there, re-arranged and
masked. The others keep a fixed number of tokens of every image and prune physically in training
too, as at evaluation. What is not chosen is dropped or, with `absorbs`, merged into the most
similar chosen token.

B images, m slots that enter a stage, L = m + n with the n class tokens, k slots that leave it, d
width. Source: "Dynamic Vision Mamba" (arXiv 2504.04787), section 3; the other selectors name
theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import sampling
from ..layouts import existing, extract
from ..pruning import best_in_order
from ..tokens import Scored, Tokens, thaw
from .base import (
    Reduction,
    Staged,
    freeze,
    gather,
    keep_passing,
    mask_in_place,
    mix,
    observed,
    rearrange,
)
from .merging import average, nearest_chosen, nearest_kept

SCORER_INPUTS = ("hidden", "B", "delta")


class Selection(Reduction):
    """Keeps some tokens; the others are dropped, or with `absorbs` merged into those.

    A subclass chooses: `choose`, and `decide` in training if it `draws`.
    """

    absorbs = False
    in_place = False  # whether a free decision's mask is one in place, see `mask_in_place`

    @property
    def merges(self) -> bool:
        return self.absorbs

    def operations(self, entering: int, leaving: int, model: Staged) -> int:
        """The similarities of dropped to kept tokens."""
        return (entering - leaving) * leaving * model.embed_dim if self.absorbs else 0

    def __call__(self, stage: int, tokens: Tokens, model: Staged, images: Tensor) -> Tokens:
        draws = model.training and self.draws
        freezes = self.freezes and not self.absorbs and not self.in_place
        if draws and freezes:
            tokens = thaw(tokens, model.layout)
            mixed = tokens.residual + tokens.hidden
        else:
            mixed = mix(stage, tokens, model)
        differ = draws or tokens.lengths is not None
        policy = tokens.alive if differ else mixed.new_ones(tokens.alive.shape)
        scores = self.score(stage, tokens, mixed, policy, model)
        if model.training and self.taught:
            entry = Scored(scores[..., 0] - scores[..., 1], tokens.origin, tokens.alive.detach())
            tokens = replace(tokens, scored=(*tokens.scored, entry))
        if draws:
            decision = self.decide(stage, tokens, scores)
            if freezes:
                return freeze(tokens, decision, model.layout, self.zeroes)
            tokens, mixed, into = self._absorbed(tokens, mixed, decision > 0.5, nearest_kept)
            mask = mask_in_place if self.in_place else rearrange
            return mask(tokens, mixed, decision, model.layout, into=into)
        if self.thresholds and not model.training:
            decision = passing(scores, tokens.alive, self.thresholds[stage])
            return keep_passing(tokens, mixed, decision, model.layout)
        chosen = self.choose(stage, tokens, scores, model, images)
        tokens, mixed, into = self._absorbed(tokens, mixed, chosen, nearest_chosen)
        return gather(tokens, mixed, chosen, model.layout, into)

    def _absorbed(
        self,
        tokens: Tokens,
        mixed: Tensor,
        stay: Tensor,
        nearest: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tokens, Tensor, Tensor | None]:
        """Other tokens averaged into those that stay, as `nearest` names them, if it absorbs."""
        if not self.absorbs:
            return tokens, mixed, None
        patches, _ = extract(mixed, tokens.class_slots)
        into = nearest(patches.detach(), stay)
        return *average(tokens, mixed, into, tokens.alive.detach()), into

    def score(
        self, stage: int, tokens: Tokens, mixed: Tensor, policy: Tensor, model: Staged
    ) -> Tensor | None:
        """Scores [B, m], or log-probabilities (keep, drop) [B, m, 2]; None for a blind choice.

        mixed [B, L, d]: hidden + residual; policy [B, m]: 1 for tokens that are still alive.
        """
        return None

    def decide(self, stage: int, tokens: Tokens, scores: Tensor) -> Tensor:
        """Training: decision [B, m], 1 or 0, with gradient; dropped tokens stay dropped."""
        raise NotImplementedError

    def choose(
        self, stage: int, tokens: Tokens, scores: Tensor | None, model: Staged, images: Tensor
    ) -> Tensor:
        """The slots that stay, ascending [B, k]: those with the best scores."""
        best = scores[..., 0] if scores.dim() == 3 else scores
        return best_in_order(best.detach(), self.kept_counts(model.num_patches)[stage])


def log_odds(scores: Tensor) -> Tensor:
    """Log-probabilities (keep, drop) [..., 2] -> how much more likely it is to be kept."""
    return (scores[..., 0] - scores[..., 1]).float()


def passing(scores: Tensor, alive: Tensor, threshold: float) -> Tensor:
    """Which alive tokens have log-odds above a threshold, and the best one of each image.

    scores [B, m, 2], alive [B, m] -> [B, m], 1 or 0.
    """
    odds = log_odds(scores).masked_fill(alive < 0.5, -torch.inf)
    best = torch.zeros_like(odds).scatter_(1, odds.argmax(dim=1, keepdim=True), 1.0)
    return torch.maximum(best, (odds > threshold).to(odds.dtype))


class LearnedScores(Selection):
    """The paper's selector: a predictor scores each token.

    Training makes a noisy decision, evaluation keeps the best k.

    Args:
        scorer_input: what the predictor reads: the hidden state with its residual, or B or the raw
            step of the layer before.
        in_place: the decision's gradient is that of a token which is put where it stands. In the
            paper's training a dropped token's decision has none (docs/method.md).
    """

    name = "learned"
    learns = draws = True

    def __init__(
        self, token_keep: Sequence[float] = (), scorer_input: str = "hidden", in_place: bool = False
    ):
        super().__init__(token_keep)
        if scorer_input not in SCORER_INPUTS:
            raise ValueError(
                f"scorer_input {scorer_input!r} must be one of {', '.join(SCORER_INPUTS)}"
            )
        self.scorer_input, self.in_place = scorer_input, in_place

    def operations(self, entering: int, leaving: int, model: Staged) -> int:
        """Also what the predictor reads, where that is computed for it alone."""
        matching = super().operations(entering, leaving, model)
        if self.scorer_input == "hidden":
            return matching
        length = entering + model.layout.num_tokens
        return matching + model.layers[0].mixer.scan_inputs_operations(length)

    def score(self, stage, tokens, mixed, policy, model):
        predictor = model.score_predictors[stage]
        if self.scorer_input == "hidden":
            return predictor(extract(mixed, tokens.class_slots)[0], policy)
        previous = model.layers[model.pruning_layers[stage] - 1]
        norm = previous.norm
        weight = norm.weight.to(tokens.residual.dtype)
        normed = F.rms_norm(tokens.residual, weight.shape, weight, norm.eps)
        mask = tokens.mask if tokens.lengths is None else existing(tokens.lengths, normed)
        B, step = previous.mixer.scan_inputs(normed.to(norm.weight.dtype), mask)
        features, _ = extract(B if self.scorer_input == "B" else step, tokens.class_slots)
        return predictor(features, policy)

    def decide(self, stage, tokens, scores):
        noisy = sampling.keep_decision(scores, f"token.stage{stage}", self.noise)
        return noisy * tokens.alive


class DistilledScores(LearnedScores):
    """A predictor that is taught which tokens matter to the teacher, see `models.importance`.

    The number of tokens is fixed and the choice has no gradient of its own, so that training prunes
    physically; with `in_place` it decides freely and has both. This project's own.
    """

    name = "distilled"
    taught = True

    @property
    def draws(self) -> bool:
        return self.in_place


class RandomTokens(Selection):
    """Keeps a random choice: newly drawn in training, determined by the image at evaluation."""

    name = "random"

    def choose(self, stage, tokens, scores, model, images):
        entering, fresh = tokens.alive.shape[1], model.training
        noise = sampling.image_noise(images, entering, stage, fresh=fresh)
        return best_in_order(noise, self.kept_counts(model.num_patches)[stage])


class StaticTokens(Selection):
    """Keeps evenly spread tokens."""

    name = "static"

    def choose(self, stage, tokens, scores, model, images):
        count, entering = self.kept_counts(model.num_patches)[stage], tokens.alive.shape[1]
        slots = torch.arange(count, device=tokens.alive.device) * entering // max(count, 1)
        return slots.expand(tokens.alive.shape[0], -1)


class LargestNorm(Selection):
    """Keeps the tokens of the largest norm: a baseline without predictors."""

    name = "norm"

    def score(self, stage, tokens, mixed, policy, model):
        return extract(mixed, tokens.class_slots)[0].norm(dim=-1)

    def operations(self, entering, leaving, model):
        return super().operations(entering, leaving, model) + entering * model.embed_dim


class LargestOutput(Selection):
    """Keeps the tokens with the largest sum over channels of the scans' output, clipped at 0.

    Source: ToP-ViM (arXiv 2409.18962), without its alignment of the states; here both directions
    with their gates count. All scores are 0 for an image whose scans are both off in that layer:
    the choice is then arbitrary.
    """

    name = "top"
    observes = "outputs"

    def score(self, stage, tokens, mixed, policy, model):
        return observed(stage, tokens, model)


SELECTORS: dict[str, type[Selection]] = {
    selector.name: selector
    for selector in (
        LearnedScores,
        DistilledScores,
        RandomTokens,
        StaticTokens,
        LargestNorm,
        LargestOutput,
    )
}
