"""A run's output folder; files may be missing, and a log may end in the middle of a line."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drawing.palette import SERIES
from utils.errors import UserError


@dataclass
class RunFolder:
    """What a run left in its folder; None or empty for missing parts."""

    name: str
    folder: Path
    position: int
    args: dict[str, Any]
    environment: dict[str, str]
    log: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    sweep: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)

    @property
    def colour(self) -> str:
        return f"var(--series{self.position % len(SERIES)})"


def read_run(folder: Path, name: str, position: int) -> RunFolder:
    """Read a run's folder. Raises UserError if it is not one."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    run = RunFolder(name, folder, position, {}, {}, [], None, None)
    run.args, run.environment = (
        _read_object(run, "args.json") or {},
        _read_object(run, "environment.json") or {},
    )
    run.evaluation, run.sweep = _read_object(run, "eval.json"), _read_object(run, "sweep.json")
    _read_log(run)
    if not (run.args or run.log or run.evaluation or run.sweep):
        raise UserError(
            f"{folder}: not the folder of a run; it holds none of args.json, log.txt, eval.json, "
            "sweep.json that could be read"
        )
    return run


def _read_object(run: RunFolder, name: str) -> dict[str, Any] | None:
    """A JSON object of the run; None, with a note, if it is missing or unreadable."""
    path = run.folder / name
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        run.notes.append(f"{name} cannot be read ({error})")
        return None
    if not isinstance(content, dict):
        run.notes.append(f"{name} holds no JSON object")
        return None
    return content


def _read_log(run: RunFolder) -> None:
    """Read log.txt: epochs in order, each from its last line; unreadable lines are noted."""
    path = run.folder / "log.txt"
    if not path.exists():
        run.notes.append("no log.txt: nothing is known of its training")
        return
    epochs, unreadable = {}, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            epochs[int(record["epoch"])] = record
        except (ValueError, KeyError, TypeError):
            unreadable += bool(line.strip())
    if unreadable:
        run.notes.append(
            f"log.txt: {unreadable} {'line was' if unreadable == 1 else 'lines were'} cut off or "
            "damaged and left out"
        )
    if not epochs:
        run.notes.append("log.txt holds no epoch")
    run.log = [epochs[epoch] for epoch in sorted(epochs)]


def run_names(folders: list[Path]) -> list[str]:
    """As much of the end of each path as it takes to distinguish the folders."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run folder is given twice")
