"""Tables for a reader."""

import pytest

from utils.tables import text_table


@pytest.mark.parametrize(
    "rows, headers",
    [
        ([["a", "1.0", "x"], ["bbbbbb", "22.22", ""]], ["", "ms", "a longer head"]),
        ([["", "3"]], ["", "n"]),
        ([["a", "12345678"]], ["a longer head", "ms"]),
    ],
)
def test_the_simple_form_is_tabulates(rows, headers):
    tabulate = pytest.importorskip("tabulate").tabulate
    aligned = ("left", *["right"] * (len(headers) - 1))
    expected = tabulate(rows, headers, disable_numparse=True, colalign=aligned)
    assert text_table(rows, headers) == expected
