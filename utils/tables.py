"""Tables for a reader."""

from collections.abc import Iterable, Sequence


def text_table(rows: Iterable[Sequence[str]], headers: Sequence[str], form: str = "simple") -> str:
    """Cells as worded, names to the left and figures to the right; form: one of tabulate's, which
    only other forms than "simple" need.
    """
    if form == "simple":
        return _simple(list(rows), headers)
    from tabulate import tabulate

    aligned = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True, colalign=aligned)


def _simple(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    columns = range(len(headers))
    widths = [max(2 * (row is cells[0]) + len(row[c]) for row in cells) for c in columns]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    rule = ["-" * width for width in widths]
    return "\n".join("  ".join(line).rstrip() for line in (lines[0], rule, *lines[1:]))
