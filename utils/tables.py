"""Tables for a reader."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def text_table(rows: Iterable[Sequence[str]], headers: Sequence[str], form: str = "simple") -> str:
    """Cells as worded, names to the left and figures to the right; form: one of tabulate's."""
    aligned = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True, colalign=aligned)
