"""Dynamic backbones: `VisionMamba` with score predictors at its stages and routers in its layers.

M patches, k of them left after a stage. Source: "Dynamic Vision Mamba" (arXiv 2504.04787).
"""

from collections.abc import Sequence

from torch import nn

from .backbone import VisionMamba
from .family import Family
from .initialization import initialize, initialize_router
from .pruning import ScorePredictor
from .reduction import make_reduction, uniform_stages


class DynamicVisionMamba(VisionMamba):
    """`VisionMamba` that drops patch tokens before `pruning_layers` and skips scan directions.

    Scans are skipped per image and layer. In the paper's training all M slots stay, re-arranged; at
    evaluation, and in training of other reductions, k are left.

    Args:
        pruning_layers: ascending layer indexes; a stage reduces the tokens before each. By default
            6, 12, 18; with reduction "merge" every second layer from 2 on.
        token_keep: fraction of the original patches that each stage keeps at evaluation, or one
            ratio r for r, r^2, ...
        route_blocks: with block routers (False: token pruning alone).
        prune_tokens: with pruning stages (False: block routing alone).
        scorer_input: what the score predictors read: the hidden state, or the previous layer's B
            or raw step.
        token_strategy: which tokens stay, see `reduction.SELECTORS`.
        reduction: what becomes of the others, see `reduction.REDUCTIONS`.
        selector_gradient: how a learned selector hears of tokens that were dropped: "paper" or
            "inplace", see `reduction.LearnedScores`; training alone differs.
        merge_tokens: how many each stage merges, with reduction "merge"; in place of `token_keep`.

    Raises:
        ValueError: stages and fractions that do not fit together, or features that a learned score
            cannot read.
    """

    def __init__(
        self,
        family: Family,
        *,
        pruning_layers: Sequence[int] | None = None,
        token_keep: float | Sequence[float] = (0.7, 0.49, 0.343),
        prune_tokens: bool = True,
        route_blocks: bool = True,
        scorer_input: str = "hidden",
        token_strategy: str = "learned",
        reduction: str = "prune",
        merge_tokens: int | None = None,
        selector_gradient: str = "paper",
        **backbone,
    ):
        self.route_blocks = route_blocks
        super().__init__(family, **backbone)
        if pruning_layers is None:
            pruning_layers = uniform_stages(reduction, self.depth)
        layers = tuple(pruning_layers) if prune_tokens else ()
        if list(layers) != sorted(set(layers)) or not all(0 < p < self.depth for p in layers):
            raise ValueError(
                f"pruning_layers {list(layers)} must ascend within 1 ... {self.depth - 1}"
            )
        self.pruning_layers = layers
        self.reduction = make_reduction(
            reduction, token_strategy, scorer_input, merge_tokens, selector_gradient
        )
        self.scorer_input, self.token_strategy = scorer_input, token_strategy
        own_keep = self.reduction.own_keep(self.num_patches, len(layers))
        token_keep = token_keep if own_keep is None else own_keep
        self.set_token_keep(token_keep if prune_tokens else ())
        for layer in self.pruning_layers:
            self.layers[layer - 1].mixer.observation.of = self.reduction.observes
        for layer in self.layers:
            layer.mixer.mask_in_place = selector_gradient == "inplace"
        if self.pruning_layers and self.reduction.learns:
            widths = {"hidden": self.embed_dim, "B": self.d_state, "delta": 2 * self.embed_dim}
            width = widths[scorer_input]
            if width < 4 or width % 2:
                raise ValueError(
                    f"embed_dim {self.embed_dim}, d_state {self.d_state}: a learned score reads an "
                    f"even number of features, 4 or more, not {width} (scorer_input {scorer_input})"
                )
            self.score_predictors = nn.ModuleList(
                ScorePredictor(width) for _ in self.pruning_layers
            )
            initialize(self.score_predictors)
        if route_blocks:
            initialize_router(self)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As in `TimmInterface`; stages before removed layers are removed with them."""
        layers = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.pruning_layers = tuple(p for p in self.pruning_layers if p < self.depth)
        stages = len(self.pruning_layers)
        self.set_token_keep(self.token_keep[:stages])
        if hasattr(self, "score_predictors"):
            self.score_predictors = self.score_predictors[:stages]
        return layers
