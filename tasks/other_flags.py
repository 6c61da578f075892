"""Flags of one task that were given with a data set of another."""

import argparse
from collections.abc import Callable, Sequence

from datasets import names_for
from utils.arguments import given_flags

from .base import Task
from .registry import TASKS


def _other_tasks(task: Task) -> list[tuple[Task, list[str]]]:
    """With the names of their data sets."""
    found = [(other, names_for(other.name)) for other in TASKS.values() if other is not task]
    return [(other, names) for other, names in found if names]


def where_other_flags_are(task: Task) -> str:
    """What the help of a task says about the others."""
    places = [f"{o.name}: --data-set {names[0]} --help" for o, names in _other_tasks(task)]
    return f"Flags of other tasks: {'; '.join(places)}" if places else ""


def whose(
    unknown: Sequence[str], task: Task, build_parser: Callable[[Task], argparse.ArgumentParser]
) -> str:
    """What to say of an unknown flag of `task` that another one has."""
    for other, names in _other_tasks(task):
        known = build_parser(other)._option_string_actions
        for flag in given_flags(unknown):
            if flag in known:
                return f"; {flag} is a flag of {other.name}, so of --data-set {', '.join(names)}"
    return ""
