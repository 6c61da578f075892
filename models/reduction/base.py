"""What a reduction is, and what may become of tokens: moved behind and masked, frozen, or gone.

B images, M patches, m slots that enter a stage, L = m + n with the n class tokens, k slots that
leave it, d width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layouts import TokenLayout, extract, insert, reordered, take
from ..pruning import kept_first
from ..tokens import Frozen, Tokens


class Staged(Protocol):
    """What a reduction needs of its model."""

    training: bool
    layers: nn.ModuleList
    layout: TokenLayout
    num_patches: int
    embed_dim: int
    reduction: "Reduction"
    pruning_layers: tuple[int, ...]
    score_predictors: nn.ModuleList


class Reduction:
    """Reduces the tokens before each pruning layer; at evaluation to fractions of the patches.

    A subclass implements `__call__`.
    """

    name = ""  # in messages
    learns = False  # whether it has score predictors
    draws = False  # whether training decides freely, held to the fractions by a budget term
    taught = False  # whether its predictors learn what matters to the teacher
    merges = False  # whether tokens become means of several
    freezes = False  # whether feature maps go on to show dropped patches, and so teach decisions
    zeroes = False  # as DyVM's release: dropped tokens become 0, with its gradients (see `freeze`)
    thresholds: Sequence[float] = ()  # per stage, of log-odds: as many tokens as exceed them stay
    noise: Tensor | None = None  # factor of the noise in training's decisions, see `set_noise`
    observes = ""  # what the layer before a stage measures of its tokens, see mixer.Observation

    def __init__(self, token_keep: Sequence[float] = ()):
        self.token_keep = tuple(token_keep)  # fraction of the original patches after each stage

    def kept_counts(self, patches: int) -> list[int]:
        """How many of `patches` original patches each stage keeps at evaluation."""
        return [int(ratio * patches) for ratio in self.token_keep]

    def own_keep(self, patches: int, stages: int) -> list[float] | None:
        """The fractions that follow from this reduction's own arguments, None if they are free.

        Raises ValueError if there are not so many tokens.
        """
        return None

    def check_counts(self, patches: int) -> None:
        """Raise ValueError if a stage cannot leave as many tokens as it should."""

    def operations(self, entering: int, leaving: int, model: Staged) -> int:
        """Multiply-adds of one image in choosing and matching at a stage, without predictors."""
        return 0

    def __call__(self, stage: int, tokens: Tokens, model: Staged, images: Tensor) -> Tokens:
        """The sequence after a stage; its hidden state is then part of the residual, unless what
        is dropped is frozen in training.
        """
        raise NotImplementedError


@contextmanager
def staged_before(model: Staged, layers: Sequence[int], reduction: Reduction) -> Iterator[None]:
    """Within it a model has this reduction before these layers in place of its own."""
    before = model.reduction, model.pruning_layers
    model.reduction, model.pruning_layers = reduction, tuple(layers)
    try:
        yield
    finally:
        model.reduction, model.pruning_layers = before


def mix(stage: int, tokens: Tokens, model: Staged) -> Tensor:
    """hidden + residual [B, L, d], as the layer after the stage would read it."""
    drop_path = model.layers[model.pruning_layers[stage]].drop_path
    return tokens.residual + drop_path(tokens.hidden)


def observed(stage: int, tokens: Tokens, model: Staged) -> Tensor:
    """What the layer before a stage measured of the patches [B, m], see `Reduction.observes`."""
    observation = model.layers[model.pruning_layers[stage] - 1].mixer.observation
    values, observation.value = observation.value, None
    return extract(values.unsqueeze(-1), tokens.class_slots)[0].squeeze(-1)


def rearrange(
    tokens: Tokens,
    residual: Tensor,
    decision: Tensor,
    layout: TokenLayout,
    hidden: Tensor | None = None,
    into: Tensor | None = None,
    cut: bool = False,
) -> Tokens:
    """Kept tokens to the front, dropped ones behind them and masked: as training wants them.

    residual, hidden [B, L, d]; decision [B, m], 1 or 0, with gradient; into as in `gather`; cut:
    what no image keeps is gone.
    """
    order, kept = kept_first(decision.detach())
    class_slots = layout.class_slots(kept)
    places = torch.empty_like(order)
    order = order[:, : int(kept.max())] if cut else order
    alive = take(decision, order)
    slots = torch.arange(order.shape[1], device=order.device).expand_as(order)
    moved = torch.where(decision > 0.5, places.scatter_(1, order, slots), -1)
    if into is not None:
        moved = take(moved, into)
    index = reordered(order, tokens.class_slots, class_slots, residual.shape[1])
    return replace(
        tokens,
        hidden=None if hidden is None else take(hidden, index),
        residual=take(residual, index),
        class_slots=class_slots,
        origin=take(tokens.origin, order),
        alive=alive,
        owner=follow(tokens.owner, moved),
        mask=insert(alive, alive.new_ones(class_slots.shape), class_slots),
        size=None if tokens.size is None else take(tokens.size, order),
        decisions=(*tokens.decisions, decision),
    )


def mask_in_place(
    tokens: Tokens,
    residual: Tensor,
    decision: Tensor,
    layout: TokenLayout,
    into: Tensor | None = None,
) -> Tokens:
    """Training: all tokens stay where they are, dropped ones are masked there.

    Class tokens move to where evaluation puts them among the kept ones. Arguments as of
    `rearrange`.
    """
    kept_up_to = (decision > 0.5).cumsum(dim=1)  # [B, m]
    slots = layout.class_slots(kept_up_to[:, -1])
    index = torch.arange(slots.shape[1], device=slots.device)
    # So many kept patches stand before a class token, and the dropped ones among them.
    ahead = (slots - index).unsqueeze(-1)
    class_slots = (kept_up_to.unsqueeze(1) <= ahead).sum(dim=-1) + index
    patches, class_tokens = extract(residual, tokens.class_slots)
    places = torch.arange(decision.shape[1], device=slots.device).expand_as(tokens.origin)
    moved = torch.where(decision > 0.5, places, -1)
    if into is not None:
        moved = take(moved, into)
    return replace(
        tokens,
        hidden=None,
        residual=insert(patches, class_tokens, class_slots),
        class_slots=class_slots,
        alive=decision,
        owner=follow(tokens.owner, moved),
        mask=insert(decision, decision.new_ones(class_slots.shape), class_slots),
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


def gather(
    tokens: Tokens, mixed: Tensor, chosen: Tensor, layout: TokenLayout, into: Tensor | None = None
) -> Tokens:
    """The chosen slots [B, k], ascending, of mixed [B, L, d]; the others are gone.

    into [B, m]: the slot whose token each one was merged into, which is its own for chosen ones.
    """
    class_slots = layout.class_slots(chosen.shape[1])
    index = reordered(chosen, tokens.class_slots, class_slots, mixed.shape[1])
    origin = take(tokens.origin, chosen)
    slots = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    moved = torch.full_like(tokens.origin, -1).scatter_(1, chosen, slots)
    if into is not None:
        moved = take(moved, into)
    owner = follow(tokens.owner, moved)
    return replace(
        tokens,
        hidden=None,
        residual=take(mixed, index),
        class_slots=class_slots,
        origin=origin,
        alive=tokens.alive[:, : chosen.shape[1]],
        owner=owner,
        size=None if tokens.size is None else take(tokens.size, chosen),
        kept=(*tokens.kept, origin),
        groups=tokens.groups if into is None else (*tokens.groups, take(origin, owner)),
    )


def keep_passing(tokens: Tokens, mixed: Tensor, decision: Tensor, layout: TokenLayout) -> Tokens:
    """Evaluation: each image keeps its own number of tokens; all end behind the longest image.

    mixed [B, L, d]; decision [B, m], 1 or 0.
    """
    arranged = rearrange(tokens, mixed, decision, layout, cut=True)
    return replace(
        arranged,
        mask=None,
        lengths=(decision > 0.5).sum(dim=1) + layout.num_tokens,
        decisions=tokens.decisions,
        kept=(*tokens.kept, arranged.origin.masked_fill(arranged.alive < 0.5, -1)),
    )


def follow(owner: Tensor, moved: Tensor) -> Tensor:
    """Owners [B, M] after their slots moved to moved [B, m]; -1: dropped."""
    moved = F.pad(moved, (0, 1), value=-1)  # the entry that an owner of -1 indexes
    return take(moved, owner % moved.shape[1])
