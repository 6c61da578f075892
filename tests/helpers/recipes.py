"""What a recipe in scripts/ would run."""

import argparse
import shlex
from pathlib import Path

import options
from helpers.shell import run


def recipe(
    script: str, tmp_path: Path, *flags: str, **variables: str
) -> tuple[list[str], argparse.Namespace]:
    """The launcher's words, and the flags as main.py's own parser reads them.

    script: below scripts/, without its ending; DATA_PATH and MODEL_PATH are `tmp_path`.
    """
    given = {"MODEL_PATH": tmp_path, "DATA_PATH": tmp_path, "PYTHON": "python3"} | variables
    done = run(f"scripts/{script}.sh", *flags, DRY_RUN=1, **given)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    start = next(i for i, word in enumerate(words) if word.endswith("main.py"))
    return words[:start], options.parse(words[start + 1 :])


def flags_of(command):
    """{flag: value} of a printed command's part after main.py; the last wins, as in argparse."""
    words = shlex.split(command)
    words = words[next(i for i, word in enumerate(words) if word.endswith("main.py")) + 1 :]
    flags = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            flags[word.removeprefix("--")] = True if following.startswith("--") else following
    return flags
