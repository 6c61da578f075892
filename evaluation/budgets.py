"""Equal operations: the knob at which each way of reducing tokens meets a budget.

A budget is the `exact` operations of evenly spread tokens (`static`) at a token keep ratio, which
names it. Predictors, matching and merges before other layers cost more or less; the method's own
knob makes up for it: its token keep ratio, or how many pairs each stage merges.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from models import VisionMamba
from models.build import ModelSpec
from models.flops import count_flops
from utils.errors import UsageError

TOLERANCE = 0.02  # a larger deviation from the budget is marked and told
STEPS = 10_000  # a token keep ratio that is searched for has four decimals

Build = Callable[[ModelSpec], VisionMamba]


@dataclass(frozen=True)
class Method:
    """A way to reduce tokens; flags: its words of main.py, without the knob.

    training_free: evaluated with the teacher's weights.
    """

    name: str
    flags: tuple[str, ...]
    training_free: bool = False


@dataclass(frozen=True)
class Cell:
    """A method at a budget.

    Args:
        keep: the token keep ratio that names the budget.
        knob: flag and value that meet it, such as ("--token-keep-ratio", "0.4873").
        exact, budget: operations of an image.
    """

    method: Method
    keep: float
    knob: tuple[str, str]
    exact: float
    budget: float

    @property
    def name(self) -> str:
        return cell_name(self.method, self.keep)

    @property
    def deviation(self) -> float:
        """Of the operations from the budget, as a fraction of it."""
        return self.exact / self.budget - 1

    @property
    def is_off(self) -> bool:
        return abs(self.deviation) > TOLERANCE


def cell_name(method: Method, keep: float) -> str:
    """Its folder in that of the comparison."""
    return f"{method.name}/keep{keep:g}"


class Priced:
    """A method's model without weights (on the meta device), which only counts operations.

    Raises UsageError for a model that cannot be built.
    """

    def __init__(self, spec: ModelSpec, build: Build):
        self.spec, self.build = spec, build
        self.model = self._built(spec)

    def _built(self, spec: ModelSpec) -> VisionMamba:
        with torch.device("meta"):
            return self.build(spec)

    def at_ratio(self, ratio: float) -> float:
        """`exact` operations of an image at a token keep ratio."""
        self.model.set_token_keep(ratio)
        return count_flops(self.model).exact

    def at_pairs(self, pairs: int) -> float | None:
        """The same for so many tokens merged at each stage; None if there are not so many."""
        try:
            model = self._built(dataclasses.replace(self.spec, merge_tokens=pairs))
        except UsageError:
            return None
        return count_flops(model).exact


def budgets(static: Priced, keeps: Sequence[float]) -> dict[float, float]:
    """{token keep ratio: `exact` operations of an image}.

    Raises UsageError for ratios that leave no patch, or the same ones as another.
    """
    found, counts = {}, {}
    for keep in keeps:
        found[keep] = static.at_ratio(keep)
        left = tuple(static.model.kept_counts())
        if not left[-1]:
            raise UsageError(
                f"--keep {keep:g} leaves none of the {static.model.num_patches} patches after "
                f"{len(left)} stages; give a larger one"
            )
        if left in counts:
            raise UsageError(
                f"--keep {counts[left]:g} and {keep:g} leave the same patches, {list(left)} of "
                f"{static.model.num_patches}; leave one of them out"
            )
        counts[left] = keep
    return found


def solve(
    method: Method, priced: Priced, wanted: Mapping[float, float]
) -> tuple[list[Cell], dict[str, str]]:
    """A method at each budget of `wanted`; -> cells, {cell that is left out: why}."""
    cells, left_out = [], {}
    for keep, budget in wanted.items():
        if priced.spec.reduction == "merge":
            pairs, exact, most = nearest_pairs(priced, budget)
            knob = "--merge-tokens", str(pairs)
        else:
            ratio, exact = nearest_ratio(priced, keep, budget)
            knob, most = ("--token-keep-ratio", repr(ratio)), False
        cell = Cell(method, keep, knob, exact, budget)
        if most and cell.is_off:
            layers = priced.model.pruning_layers
            before = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
            left_out[cell.name] = (
                f"pairs cannot reach it: merged before {before}, at most {pairs} each time, "
                f"they leave {exact / 1e6:.2f} MFLOPs, {100 * cell.deviation:.1f} % more than the "
                f"budget of {budget / 1e6:.2f}"
            )
        else:
            cells.append(cell)
    return cells, left_out


def nearest_ratio(priced: Priced, keep: float, budget: float) -> tuple[float, float]:
    """The token keep ratio whose operations are nearest to the budget, and these; `keep` itself
    where it is as near.
    """
    patches, stages = priced.model.num_patches, len(priced.model.pruning_layers)
    # The first ratio that leaves a patch.
    low = next(n for n in range(1, STEPS + 1) if int((n / STEPS) ** stages * patches))
    high = STEPS
    tried = {ratio: priced.at_ratio(ratio) for ratio in {max(keep, low / STEPS), low / STEPS, 1.0}}
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle / STEPS] = priced.at_ratio(middle / STEPS)
        if tried[middle / STEPS] > budget:
            high = middle
        else:
            low = middle
    return min(tried.items(), key=lambda pair: (abs(pair[1] - budget), abs(pair[0] - keep)))


def nearest_pairs(priced: Priced, budget: float) -> tuple[int, float, bool]:
    """How many tokens each stage has to merge to come nearest to the budget, the operations then,
    and whether it would take more than there are.
    """
    low, high = 0, priced.model.num_patches  # no pairs; more than can be merged
    tried: dict[int, float | None] = {}
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = priced.at_pairs(middle)
        if tried[middle] is not None and tried[middle] > budget:
            low = middle
        else:
            high = middle
    possible = {pairs: exact for pairs, exact in tried.items() if exact is not None}
    pairs, exact = min(possible.items(), key=lambda pair: abs(pair[1] - budget))
    return pairs, exact, exact > budget and tried.get(high) is None
