"""What is made of weights at evaluation, once and not at every forward pass.

Casts, transposes and exponentials of weights are a few thousand numbers each; on a GPU every one of
them is a kernel, more than half of what a layer launches.

A value is made and read on one CUDA stream; programs that run a model on several at once must make
its values first, by a forward pass that they wait for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .operators import plain


class _Steps:
    """Steps of all optimizers: fused ones change weights and not their version counters."""

    taken = 0

    @classmethod
    def count(cls, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        cls.taken += 1


register_optimizer_step_post_hook(_Steps.count)


@dataclass
class _Made:
    """A value, and the state of the weights that it was made of."""

    value: Any
    weights: tuple[Tensor, ...]
    versions: list[int]
    places: list[int]
    steps: int  # of optimizers
    forgotten: bool = False  # by `Kept.clear`

    @classmethod
    def of(cls, weights: tuple[Tensor, ...], value: Any) -> "_Made":
        return cls(value, weights, _versions(weights), _places(weights), _Steps.taken)

    def is_of(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether it was made of these tensors."""
        return len(weights) == len(self.weights) and all(map(is_, weights, self.weights))

    def is_current(self) -> bool:
        """Whether none of its weights has changed or moved."""
        return (
            not self.forgotten
            and self.steps == _Steps.taken
            and self.versions == _versions(self.weights)
            and self.places == _places(self.weights)
        )


def _versions(weights: tuple[Tensor, ...]) -> list[int]:
    return [weight._version for weight in weights]


def _places(weights: tuple[Tensor, ...]) -> list[int]:
    return [weight.data_ptr() for weight in weights]


class Reads:
    """The kept values that a CUDA graph was recorded with: it reads them at every replay, so they
    live as long as this object.
    """

    def __init__(self):
        self._made: list[_Made] = []
        self._others: list[Any] = []

    def add(self, made: _Made) -> None:
        self._made.append(made)

    def hold(self, value: Any) -> None:
        """What was made of kept values: it lives as long, and is as current."""
        self._others.append(value)

    def are_current(self) -> bool:
        """Whether none of the weights behind them has changed."""
        return all(made.is_current() for made in self._made)


_recorded: Reads | None = None


@contextmanager
def recorded_reads() -> Iterator[Reads]:
    """Collects what is read from every `Kept`, for the recording of a CUDA graph."""
    global _recorded
    before, _recorded = _recorded, Reads()
    try:
        yield _recorded
    finally:
        _recorded = before


def hold(value: Any) -> None:
    """`Reads.hold` of what collects reads now, if anything does."""
    if _recorded is not None:
        _recorded.hold(value)


def capturing() -> bool:
    """Whether a CUDA graph records: what is made now has its values when the graph runs."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Kept:
    """Values by name, each with the weights that it was made of.

    A value is made anew when one of these is another tensor, has moved, or was changed in place
    (its version counter, and any optimizer's step); `clear` is for changes that PyTorch does not
    count, such as those through `.data`. Copies of it, and what is pickled, are empty.
    """

    def __init__(self):
        self._values: dict[str, _Made] = {}

    def get(self, name: str, weights: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        """The value, from `make()` where it is missing or out of date; where autograd or a tracer
        has to see how it is made, always that.
        """
        if torch.is_grad_enabled() or not plain():
            return make()
        made = self._values.get(name)
        if made is None or not made.is_of(weights) or not made.is_current():
            value = make()
            if not plain(*weights) or any(weight.is_inference() for weight in weights):
                return value
            if capturing():
                return value
            made = self._values[name] = _Made.of(weights, value)
        if _recorded is not None:
            _recorded.add(made)
        return made.value

    def clear(self) -> None:
        for made in self._values.values():
            made.forgotten = True
        self._values.clear()

    def __deepcopy__(self, memo: dict) -> "Kept":
        return Kept()

    def __reduce__(self) -> tuple:
        return Kept, ()
