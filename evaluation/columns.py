"""Rows shared by the tables of evaluations; a column is what `summary.column` returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tasks import Measure, Task

Column = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A quantity of a column, None if it lacks it.

    change: formats the step from one value to another.
    """

    label: str
    read: Callable[[Column], float | None]
    format: str
    change: Callable[[float, float], str] | None = None

    def cell(self, column: Column | None, missing: str = "-") -> str:
        value = None if column is None else self.read(column)
        return missing if value is None else self.format.format(value)

    def changed(self, before: Column | None, after: Column | None) -> str:
        """The change of the value between two columns; empty if there is nothing to compare."""
        if self.change is None or before is None or after is None:
            return ""
        values = self.read(before), self.read(after)
        return "" if None in values else self.change(*values)


def percent_change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"


def measure_row(measure: Measure) -> Row:
    """A measure of the task; its change is a difference."""

    def points(before: float, after: float) -> str:
        return measure.text(after - before, signed=True)

    return Row(
        measure.label,
        lambda column: column.get(measure.key),
        measure.format,
        points if measure.compared else None,
    )


PAPER = Row(
    "MFLOPs, paper", lambda column: column["flops"]["paper"] / 1e6, "{:,.2f}", percent_change
)
EXACT = Row(
    "MFLOPs, exact", lambda column: column["flops"]["exact"] / 1e6, "{:,.2f}", percent_change
)
SPEED = Row(
    "images/s",
    lambda column: column.get("images_per_s"),
    "{:,.1f}",
    lambda before, after: f"x {after / before:.2f}",
)


def speed_row(batch_size: int | None, example: str) -> Row:
    """`SPEED` with the number of examples that were timed at once, if known; example: what one of
    them is called, see `Task`.
    """
    batch = f", batch of {batch_size}" if batch_size else ""
    return replace(SPEED, label=f"{example}s/s{batch}")


PARAMETERS = Row("parameters", lambda column: column.get("parameters"), "{:,}")


DECODER = Row(
    "of these, the decoder",
    lambda column: column["decoder_flops"] / 1e6 if "decoder_flops" in column else None,
    "{:,.2f}",
)


def measure_rows(task: Task) -> list[Row]:
    """The best measure, the same for the averaged weights, the other measures."""
    best, *others = task.measures
    ema = Row(best.ema_label, lambda column: column.get(best.ema_key), best.format)
    return [measure_row(best), ema, *map(measure_row, others)]


def rows_of(task: Task, batch_size: int | None = None) -> Sequence[Row]:
    """All rows, in the order of a table; batch_size: see `speed_row`."""
    flops = [PAPER, EXACT, DECODER] if task.has_decoder else [PAPER, EXACT]
    return [*measure_rows(task), *flops, speed_row(batch_size, task.example), PARAMETERS]
