"""Types of command-line flags, and a parser whose errors are one line."""

import argparse
import ast
import os
import sys
from collections.abc import KeysView, Sequence
from typing import Any

from .errors import UsageError

LARGEST = 2**63 - 1  # what PyTorch's and numpy's integers hold


class OneLineParser(argparse.ArgumentParser):
    """Raises UsageError, one line without the usage text, instead of exiting.

    A `~` at the start of a path is the home, as in `--output_dir=~/x`, which no shell expands.
    """

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_at_home(word) for word in words], namespace)

    def error(self, message: str):
        raise UsageError(f"{message} (see python {self.prog} --help)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults that there are to help texts that do not tell their own."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def given_flags(words: Sequence[str]) -> KeysView[str]:
    """A command line's flags without their values, and its other words; each once, in order."""
    return dict.fromkeys(word.split("=")[0] for word in words).keys()


def _at_home(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if value != "~" and not value.startswith("~/"):
        return word
    return flag + equals + os.path.expanduser(value)


def positive(text: str) -> int:
    """An integer from 1 to `LARGEST`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return _bounded(text)


def _bounded(text: str) -> int:
    if int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is too large: at most {LARGEST}")
    return int(text)


def image_size(text: str) -> int | list[int]:
    """The side of a square in pixels, such as 224, or HEIGHTxWIDTH, such as 192x384."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a positive integer nor HEIGHTxWIDTH, such as 192x384"
        )
    return int(text) if len(sides) == 1 else [int(side) for side in sides]


def whole(text: str) -> int:
    """An integer from 0 to `LARGEST`."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 0")
    return _bounded(text)


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no finite number of at least 0")
    return value


def ratio(text: str) -> float:
    """A fraction in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is outside (0, 1]")
    return value


def probability(text: str) -> float:
    """A number in [0, 1]."""
    value = not_negative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1]")
    return value


def below_one(text: str) -> float:
    """A number in [0, 1)."""
    if probability(text) == 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1)")
    return float(text)


def key_value(text: str) -> tuple[str, Any]:
    """`name=value` with a Python literal, such as embed_dim=96."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=VALUE with a Python literal"
        ) from None
