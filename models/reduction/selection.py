"""Which tokens stay: one class per selector.

A selector that decides freely in training (the paper's) keeps all slots there, re-arranged and
masked. The others keep a fixed number of tokens of every image and prune physically in training
too, as at evaluation. What is not chosen is dropped or, with `absorbs`, merged into the most
similar chosen token.

B images, m slots that enter a stage, L = m + n with the n class tokens, k slots that leave it, d
width. Source: "Dynamic Vision Mamba" (arXiv 2504.04787), section 3; the other selectors name
theirs.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import sampling
from ..layouts import extract
from ..pruning import best_in_order
from ..tokens import Scored, Tokens, thaw
from .base import Reduction, Staged, freeze, gather, mix, rearrange
from .merging import average, nearest_kept

SCORER_INPUTS = ("hidden", "B", "delta")


class Selection(Reduction):
    """Keeps some tokens; the others are dropped, or with `absorbs` merged into those.

    A subclass chooses: `choose`, and `decide` in training if it `draws`.
    """

    absorbs = False

    @property
    def merges(self) -> bool:
        return self.absorbs

    def operations(self, entering: int, leaving: int, model: Staged) -> int:
        """The similarities of dropped to kept tokens."""
        return (entering - leaving) * leaving * model.embed_dim if self.absorbs else 0

    def __call__(self, stage: int, tokens: Tokens, model: Staged, images: Tensor) -> Tokens:
        if model.training and self.draws and self.freezes and not self.absorbs:
            whole = thaw(tokens, model.layout)
            mixed = whole.residual + whole.hidden
            decision = self.decide(stage, whole, mixed, model, images)
            return freeze(whole, decision, model.layout, self.zeroes)
        mixed = mix(stage, tokens, model)
        if model.training and self.draws:
            decision = self.decide(stage, tokens, mixed, model, images)
            tokens, mixed, into = self._absorbed(tokens, mixed, decision > 0.5, model)
            return rearrange(tokens, mixed, decision, model.layout, into=into)
        scored = self.score(stage, tokens, mixed, model)
        chosen = self.choose(stage, tokens, mixed, model, images, scored)
        if model.training and scored is not None:
            entry = Scored(scored, tokens.origin, tokens.alive.detach())
            tokens = replace(tokens, scored=(*tokens.scored, entry))
        keep = torch.zeros_like(tokens.alive, dtype=torch.bool).scatter_(1, chosen, True)
        tokens, mixed, into = self._absorbed(tokens, mixed, keep, model)
        return gather(tokens, mixed, chosen, model.layout, into)

    def _absorbed(
        self, tokens: Tokens, mixed: Tensor, keep: Tensor, model: Staged
    ) -> tuple[Tokens, Tensor, Tensor | None]:
        """Tokens that are not kept [B, m] averaged into kept ones, if this selector absorbs."""
        if not self.absorbs:
            return tokens, mixed, None
        patches, _ = extract(mixed, tokens.class_slots)
        into = nearest_kept(patches.detach(), keep)
        alive = tokens.alive.detach()
        return *average(tokens, mixed, into, alive), into

    def score(self, stage: int, tokens: Tokens, mixed: Tensor, model: Staged) -> Tensor | None:
        """Scores [B, m] of a selector with predictors, where it prunes physically."""
        return None

    def decide(
        self, stage: int, tokens: Tokens, mixed: Tensor, model: Staged, images: Tensor
    ) -> Tensor:
        """Training: cumulative decision [B, m], 1 or 0, with gradient; dropped tokens stay dropped.

        mixed [B, L, d]: hidden + residual.
        """
        raise NotImplementedError

    def choose(
        self,
        stage: int,
        tokens: Tokens,
        mixed: Tensor,
        model: Staged,
        images: Tensor,
        scores: Tensor | None,
    ) -> Tensor:
        """The slots that stay, ascending [B, k]; scores as `score` gave them."""
        raise NotImplementedError


class ScoredSelection(Selection):
    """Keeps the tokens with the best scores."""

    def choose(self, stage, tokens, mixed, model, images, scores):
        if scores is None:
            scores = self.rank(stage, tokens, mixed, model)
        return best_in_order(scores.detach(), self.kept_counts(model.num_patches)[stage])

    def rank(self, stage: int, tokens: Tokens, mixed: Tensor, model: Staged) -> Tensor:
        """Scores [B, m] of a selector without predictors."""
        raise NotImplementedError


class LearnedScores(ScoredSelection):
    """The paper's selector: a predictor scores each token.

    Training makes a noisy decision, evaluation keeps the best k. scorer_input: what the predictor
    reads, see `predict`.
    """

    name = "learned"
    learns = draws = True

    def __init__(self, token_keep: Sequence[float] = (), scorer_input: str = "hidden"):
        super().__init__(token_keep)
        if scorer_input not in SCORER_INPUTS:
            raise ValueError(
                f"scorer_input {scorer_input!r} must be one of {', '.join(SCORER_INPUTS)}"
            )
        self.scorer_input = scorer_input

    def predict(
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

    def score(self, stage, tokens, mixed, model):
        policy = mixed.new_ones(tokens.alive.shape)
        return self.predict(stage, tokens, mixed, policy, model)[..., 0]

    def decide(self, stage, tokens, mixed, model, images):
        log_probs = self.predict(stage, tokens, mixed, tokens.alive, model)
        return sampling.keep_decision(log_probs, f"token.stage{stage}") * tokens.alive


class DistilledScores(LearnedScores):
    """A predictor that is taught which tokens matter to the teacher, see `models.importance`.

    The number of tokens is fixed and the choice has no gradient of its own, so that training prunes
    physically. This project's own.
    """

    name = "distilled"
    draws, taught = False, True

    def score(self, stage, tokens, mixed, model):
        policy = mixed.new_ones(tokens.alive.shape)
        log_probs = self.predict(stage, tokens, mixed, policy, model)
        return log_probs[..., 0] - log_probs[..., 1]


class RandomTokens(Selection):
    """Keeps a random choice: newly drawn in training, determined by the image at evaluation."""

    name = "random"

    def choose(self, stage, tokens, mixed, model, images, scores):
        entering, fresh = tokens.alive.shape[1], model.training
        noise = sampling.image_noise(images, entering, stage, fresh=fresh)
        return best_in_order(noise, self.kept_counts(model.num_patches)[stage])


class StaticTokens(Selection):
    """Keeps evenly spread tokens."""

    name = "static"

    def choose(self, stage, tokens, mixed, model, images, scores):
        count = self.kept_counts(model.num_patches)[stage]
        slots = torch.arange(count, device=mixed.device) * tokens.alive.shape[1] // max(count, 1)
        return slots.expand(mixed.shape[0], -1)


class LargestNorm(ScoredSelection):
    """Keeps the tokens of the largest norm: a baseline that costs nothing."""

    name = "norm"

    def rank(self, stage, tokens, mixed, model):
        return extract(mixed, tokens.class_slots)[0].norm(dim=-1)

    def operations(self, entering, leaving, model):
        return super().operations(entering, leaving, model) + entering * model.embed_dim


class LargestOutput(ScoredSelection):
    """Keeps the tokens with the largest sum over channels of the scans' output, clipped at 0.

    Source: ToP-ViM (arXiv 2409.18962), without its alignment of the states; here both directions
    with their gates count.
    """

    name = "top"
    observes = "outputs"

    def rank(self, stage, tokens, mixed, model):
        observed = model.layers[model.pruning_layers[stage] - 1].mixer.observed
        return extract(observed.unsqueeze(-1), tokens.class_slots)[0].squeeze(-1)


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
