"""What flows between the layers of a backbone, and what a forward pass returns.

B images, M patches, m slots for patches (M, or the k that are left), n class tokens, L = m + n, d
width, C classes; h, w the grid of patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layouts import ClassSlots, TokenLayout, extract, insert, take


class Frozen(NamedTuple):
    """Patches in raster order as they were when they were dropped, 0 where alive.

    With the decisions' gradient: a map that shows a dropped patch teaches its decision.
    """

    hidden: Tensor  # [B, M, d]
    residual: Tensor  # [B, M, d]


class Scored(NamedTuple):
    """What a selector that is taught importance said of the tokens that entered a stage."""

    scores: Tensor  # [B, m], logits, with gradient
    origin: Tensor  # [B, m], original patches
    alive: Tensor  # [B, m], 1 where the token was alive


@dataclass
class Tokens:
    """The state of the sequence between two layers.

    `owner` is the slot that represents each original patch: at first its own, that of the token it
    was merged into, or -1 once it is dropped.
    """

    hidden: Tensor | None  # [B, L, d], the last mixer's output; None: it is in the residual already
    residual: Tensor  # [B, L, d]
    class_slots: ClassSlots  # where the class tokens stand
    origin: Tensor  # [B, m], original patch of each slot
    alive: Tensor  # [B, m], 1 where the slot is alive; with the decisions' gradient in training
    owner: Tensor  # [B, M]
    mask: Tensor | None = None  # [B, L], factor of each token in the scans; None: all ones
    decisions: tuple[Tensor, ...] = ()  # per stage, training: [B, m], with gradient
    kept: tuple[Tensor, ...] = ()  # per stage that gathered: [B, k], original patches; -1: none
    groups: tuple[Tensor, ...] = ()  # per stage that merged: [B, M], which patch speaks for each
    scored: tuple["Scored", ...] = ()  # per stage, training of a distilled selector
    size: Tensor | None = None  # [B, m], patches that a slot is the mean of; None: one each
    frozen: Frozen | None = None  # training of a model that freezes what it drops
    lengths: Tensor | None = None  # [B], tokens of each image, the first ones; None: all L

    @classmethod
    def first(cls, sequence: Tensor, class_slots: ClassSlots, patches: int) -> "Tokens":
        """All patches of a sequence [B, L, d], alive and in raster order."""
        origin = torch.arange(patches, device=sequence.device).expand(sequence.shape[0], -1)
        alive = sequence.new_ones(origin.shape)
        return cls(None, sequence, class_slots, origin, alive, owner=origin)


@dataclass
class Result:
    """What a forward pass returns, dense or dynamic, in training or evaluation.

    A pytree (`torch.utils._pytree`), so that compiled and exported programs can return it.
    """

    logits: Tensor | None  # [B, C]; None from `forward_features`
    tokens: Tensor  # [B, m, d], patch tokens after norm_f in slot order
    origin: Tensor  # [B, m], original patch of each slot
    alive: Tensor  # [B, m], 1 where the slot is alive
    gates: Tensor  # [depth, B, 2], forward and backward; ones where nothing is routed
    decisions: list[Tensor] = field(default_factory=list)  # see Tokens
    kept: list[Tensor] = field(default_factory=list)
    groups: list[Tensor] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    importance: list[Tensor] = field(default_factory=list)  # per stage [B, M], of a teacher
    owner: Tensor | None = None  # [B, M], see Tokens
    class_tokens: Tensor | None = None  # [B, n, d] after norm_f
    maps: dict[int, Tensor] = field(default_factory=dict)  # {layer: [B, d, h, w]}, as requested
    aux_logits: Tensor | None = None  # of an auxiliary head, in training
    view_logits: Tensor | None = None  # [B, V, C] of each view, if several were looked at
    labels: Tensor | None = None  # [B, H, W] in place of logits that would not fit in memory
    frozen: Tensor | None = (
        None  # [B, H, W] bool, pixels of dropped patches, if there is one window
    )

    @property
    def counts(self) -> list[Tensor]:
        """Patches [B] that each stage kept at evaluation."""
        return [(stage >= 0).sum(dim=1) for stage in self.kept]


torch.export.register_dataclass(Result, serialized_type_name="dyvm.Result")


def spread(values: Tensor, owner: Tensor, before: Tensor | None) -> Tensor:
    """Values of slots [B, m, d] -> values of all original patches [B, M, d], by owner.

    A dropped patch keeps its value in `before` [B, M, d], which is None while all are alive.
    """
    if values.shape[1] == 0:
        return before
    owned = take(values, owner.clamp_min(0))
    return owned if before is None else torch.where(owner.unsqueeze(-1) >= 0, owned, before)


def kept_in_all(results: Sequence[Result]) -> list[list[Tensor]]:
    """What each stage kept in several passes: per stage a [B, k] of each, of one width."""
    stages = []
    for parts in zip(*(result.kept for result in results), strict=True):
        most = max(part.shape[1] for part in parts)
        stages.append([F.pad(part, (0, most - part.shape[1]), value=-1) for part in parts])
    return stages


def in_raster(values: Tensor, origin: Tensor) -> Tensor:
    """Values of all slots [B, M] or [B, M, d] in the order of the patches; origin [B, M]."""
    slots = torch.arange(origin.shape[1], device=origin.device).expand_as(origin)
    return take(values, torch.empty_like(origin).scatter_(1, origin, slots))


def thaw(tokens: Tokens, layout: TokenLayout) -> Tokens:
    """All patches in raster order, those dropped before as they were then; not masked."""
    patches = tokens.owner.shape[1]
    class_slots = layout.class_slots(patches)
    alive = in_raster(tokens.alive, tokens.origin)

    def whole(sequence: Tensor, frozen: Tensor | None) -> Tensor:
        values, class_tokens = extract(sequence, tokens.class_slots)
        values = in_raster(values, tokens.origin)
        if frozen is not None:
            values = (frozen + alive.detach().unsqueeze(-1) * values).to(sequence.dtype)
        return insert(values, class_tokens, class_slots)

    hidden, residual = tokens.frozen or (None, None)
    raster = torch.arange(patches, device=tokens.owner.device).expand_as(tokens.owner)
    return replace(
        tokens,
        hidden=whole(tokens.hidden, hidden),
        residual=whole(tokens.residual, residual),
        class_slots=class_slots,
        origin=raster,
        alive=alive,
        owner=torch.where(tokens.owner >= 0, raster, -1),
        mask=None,
    )


class FeatureMaps:
    """Maps of the patches after chosen layers; dropped patches keep their last values in them.

    Args:
        layers: after which layers.
        kind: "hidden", the mixer's output before it is added, or "residual", the stream after it.
    """

    KINDS = ("hidden", "residual")

    def __init__(self, layers: tuple[int, ...], kind: str, grid: tuple[int, ...]):
        if kind not in self.KINDS:
            raise ValueError(f"features {kind!r} must be one of {', '.join(self.KINDS)}")
        self.layers, self.kind, self.grid = layers, kind, grid
        self.maps: dict[int, Tensor] = {}
        self.class_tokens: dict[int, Tensor] = {}  # {layer: [B, n, d]}
        self._canvas: Tensor | None = None

    def look(self, tokens: Tokens) -> None:
        """Record the values of the patches before a stage drops some of them."""
        if self.layers:
            self._update(tokens)

    def after_layer(self, layer: int, tokens: Tokens, following: Tokens | None = None) -> None:
        """Store the map of a requested layer.

        following: the stream as the next layer reads it, if that differs (rotated positions).
        """
        if layer in self.layers:
            other = following if self.kind == "residual" else None
            self.class_tokens[layer] = self._update(tokens if other is None else other)
            self.maps[layer] = self._canvas.transpose(1, 2).unflatten(2, self.grid)

    def _update(self, tokens: Tokens) -> Tensor:
        """Bring the canvas up to date; -> class tokens [B, n, d]."""
        values = tokens.hidden if self.kind == "hidden" else tokens.residual + tokens.hidden
        patches, class_tokens = extract(values, tokens.class_slots)
        if tokens.frozen is None:
            self._canvas = spread(patches, tokens.owner, self._canvas)
        else:
            hidden, residual = tokens.frozen
            if self.kind == "hidden":  # that of a dropped slot is 0, but for its gradient
                frozen = hidden + in_raster(patches, tokens.origin)
            else:
                alive = in_raster(tokens.alive.detach(), tokens.origin).unsqueeze(-1)
                frozen = residual + hidden + alive * in_raster(patches, tokens.origin)
            self._canvas = frozen.to(values.dtype)
        return class_tokens
