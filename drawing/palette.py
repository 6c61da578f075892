"""The colours of all pictures, plots and of the report, in one place."""

PAPER = "#ffffff"
INK = "#1c2128"
MUTED = "#656d76"
GRID = "#d8dee4"
FAINT = "#f0f3f6"
BLUE = "#2f6fb3"  # forward scans, kept tokens
ORANGE = "#d9822b"  # backward scans
ACCENT = "#cf3f5c"  # class tokens, what deserves a look
SERIES = (BLUE, ORANGE, "#2b9a66", "#8e5bb5", ACCENT, "#17899b", "#8a6d3b", "#5b6472")


def rgb(colour: str) -> tuple[int, int, int]:
    """ "#rrggbb" as three numbers."""
    return tuple(bytes.fromhex(colour[1:]))
