"""What becomes of the patch tokens at a stage: one class per way.

A reduction is called before each pruning layer. `selection` drops tokens: selectors that decide
freely in training (the paper's) keep all slots there, with dropped tokens masked, behind the kept
ones or in place; all others gather the tokens that stay, as at evaluation. `merging` averages
tokens. A reduction also reports how many stay, from which operations are counted.

Source: "Dynamic Vision Mamba" (arXiv 2504.04787), section 3; other ways name theirs.
"""

from .base import Reduction, Staged, staged_before
from .merging import BipartiteMerging, StepGroups
from .selection import SCORER_INPUTS, SELECTORS, LearnedScores, Selection

__all__ = [
    "REDUCTIONS",
    "SCORER_INPUTS",
    "SELECTING",
    "SELECTOR_GRADIENTS",
    "TOKEN_STRATEGIES",
    "LearnedScores",
    "Reduction",
    "Selection",
    "Staged",
    "cumulative_keep",
    "make_reduction",
    "staged_before",
    "uniform_stages",
]

REDUCTIONS = ("prune", "prune+merge", "merge", "mtr")
SELECTING = ("prune", "prune+merge")  # read a token strategy
TOKEN_STRATEGIES = tuple(SELECTORS)
SELECTOR_GRADIENTS = ("paper", "inplace")


def make_reduction(
    reduction: str = "prune",
    strategy: str = "learned",
    scorer_input: str = "hidden",
    merge_tokens: int | None = None,
    selector_gradient: str = "paper",
) -> Reduction:
    """The reduction named by `--reduction`, with the selector `--token-strategy`.

    Raises ValueError for an unknown name, and for arguments that it does not read.
    """
    for argument, value, names in (
        ("reduction", reduction, REDUCTIONS),
        ("token_strategy", strategy, TOKEN_STRATEGIES),
        ("selector_gradient", selector_gradient, SELECTOR_GRADIENTS),
    ):
        if value not in names:
            raise ValueError(f"{argument} {value!r} must be one of {', '.join(names)}")
    if (reduction == "merge") != (merge_tokens is not None):
        raise ValueError("merge_tokens is how many tokens each stage of reduction 'merge' merges")
    if reduction not in SELECTING:
        if selector_gradient != "paper":
            raise ValueError(f"selector_gradient: reduction {reduction!r} selects nothing")
        if strategy != "learned":
            raise ValueError(f"token_strategy {strategy!r}: {reduction!r} selects nothing")
        return BipartiteMerging(merge_tokens) if reduction == "merge" else StepGroups()
    selector = SELECTORS[strategy]
    if issubclass(selector, LearnedScores):
        selection = selector((), scorer_input, selector_gradient == "inplace")
    elif selector_gradient != "paper":
        raise ValueError(
            f"selector_gradient {selector_gradient!r}: token_strategy {strategy!r} learns nothing"
        )
    else:
        selection = selector()
    selection.absorbs = reduction == "prune+merge"
    return selection


def uniform_stages(reduction: str, depth: int) -> tuple[int, ...]:
    """The pruning layers of a model that names none: before every second layer for R-MeeTo's."""
    return tuple(range(2, depth, 2)) if reduction == "merge" else (6, 12, 18)


def cumulative_keep(ratio: float, stages: int) -> tuple[float, ...]:
    """Fractions of the original patches that stages 1, 2, ... keep: r, r^2, ..."""
    return tuple(ratio**stage for stage in range(1, stages + 1))
