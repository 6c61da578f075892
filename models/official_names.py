"""mmsegmentation's parameter names, and ours."""

import re
from collections.abc import Mapping
from typing import Any

_OFFICIAL = (
    (r"backbone\.(fpn\d\..*)", r"head.pyramid.\1"),
    (r"backbone\.(.*)", r"\1"),
    (r"((?:decode|auxiliary)_head\..*)", r"head.\1"),
)


def is_segmenter(state: Mapping[str, Any]) -> bool:
    """Whether parameters are a segmenter's, ours or with mmsegmentation's names."""
    return any(re.match(r"(head\.)?decode_head\.", name) for name in state)


def from_official(state: Mapping[str, Any]) -> dict[str, Any]:
    """mmsegmentation's parameter names -> ours; other names stay."""
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    for pattern, ours in _OFFICIAL:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return name
