"""What a task tells: its measures of a data set, and what is in one image.

H, W pixels.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Measure:
    """A number that a task reports, with its names everywhere.

    Args:
        key: in eval.json, sweep.json and CSV files.
        name: in sentences and plots.
        log_name: in log.txt, with the prefixes `test_`, `test_ema_` and `best_`.
        unit: after the name in tables.
        format: of the value.
        compared: whether tables show its change from the dense to the dynamic model.
    """

    key: str
    name: str
    log_name: str
    unit: str = ""
    format: str = "{:.2f}"
    higher_is_better: bool = True
    compared: bool = True

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def ema_label(self) -> str:
        return f"{self.name} of the EMA" + (f", {self.unit}" if self.unit else "")

    @property
    def ema_key(self) -> str:
        return f"ema_{self.key}"

    @property
    def title(self) -> str:
        """Its name at the head of a sentence or a plot."""
        return self.name[:1].upper() + self.name[1:]

    def text(self, value: float, signed: bool = False) -> str:
        """A value; `signed`: a difference."""
        form = self.format.replace("{:", "{:+") if signed else self.format
        return form.format(value)

    def with_unit(self, value: float) -> str:
        return f"{self.text(value)} {self.unit}".rstrip()

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is at least as good as `best`; None: nothing yet."""
        if best is None or best != best:
            return True
        return value >= best if self.higher_is_better else value <= best


class Named(NamedTuple):
    """What predict.py says of an image.

    labels: the class of each pixel [H, W] uint8, at the image's own size; None for tasks without.
    """

    values: dict[str, Any]  # of its JSON entry
    text: str
    labels: np.ndarray | None = None
