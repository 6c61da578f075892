"""What is made of weights at evaluation, once and not at every forward pass.

Casts, transposes and exponentials of weights are a few thousand numbers each; on a GPU every one of
them is a kernel, more than half of what a layer launches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .operators import plain


def capturing() -> bool:
    """Whether a CUDA graph records: what is made now has its values when the graph runs."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Kept:
    """Values by name, each with the weights that it was made of.

    A value is made anew when one of these is another tensor, has moved, or was changed in place
    (its version counter); `clear` is for changes that PyTorch does not count, through `.data`.
    Copies of it, and what is pickled, are empty.
    """

    def __init__(self):
        self._values: dict[str, tuple[list[tuple[Tensor, int, int]], Any]] = {}

    def get(self, name: str, weights: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        """The value, from `make()` where it is missing or out of date; where autograd or a tracer
        has to see how it is made, always that.
        """
        if torch.is_grad_enabled() or not plain(*weights) or any(w.is_inference() for w in weights):
            return make()
        stamps, value = self._values.get(name, ((), None))
        if len(stamps) == len(weights) and all(
            weight is known and weight._version == version and weight.data_ptr() == place
            for weight, (known, version, place) in zip(weights, stamps, strict=True)
        ):
            return value
        value = make()
        if not capturing():
            stamps = [(weight, weight._version, weight.data_ptr()) for weight in weights]
            self._values[name] = stamps, value
        return value

    def clear(self) -> None:
        self._values.clear()

    def __deepcopy__(self, memo: dict) -> "Kept":
        return Kept()

    def __reduce__(self) -> tuple:
        return Kept, ()
