"""A run's output folder; files may be missing, and a log may end in the middle of a line."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drawing.palette import SERIES
from utils.checkpoint import BEST, NEWEST, PREVIOUS
from utils.errors import UserError
from utils.files import sha256_of
from utils.run_folder import CALIBRATED


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
    decided: bool = True  # whether the pictures of decisions are the run's own

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
    _leave_out_others(run)
    if not (run.args or run.log or run.evaluation or run.sweep):
        raise UserError(
            f"{folder}: not the folder of a run; it holds none of args.json, log.txt, eval.json, "
            "sweep.json that could be read"
        )
    return run


def _leave_out_others(run: RunFolder) -> None:
    """Drop an evaluation and a sweep of a checkpoint that is none of the run's, with a note."""
    names = (NEWEST, PREVIOUS, BEST, CALIBRATED)
    own = {_sha256(run.folder / name) for name in names if (run.folder / name).exists()}
    if not run.log or not own:
        return
    evaluated = (run.evaluation or {}).get("checkpoint_sha256")
    conditions = (run.sweep or {}).get("conditions")
    swept = conditions.get("checkpoint_sha256") if isinstance(conditions, dict) else None
    if evaluated and evaluated not in own:
        run.evaluation, run.decided = None, False
        run.notes.append(
            "eval.json and its pictures are of a checkpoint that is not in this folder: left out; "
            "main.py --eval on best_checkpoint.pth writes them anew"
        )
    if swept and swept not in own:
        run.sweep = None
        run.notes.append("sweep.json is of a checkpoint that is not in this folder: left out")


def _sha256(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except UserError:
        return None


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


def is_number(value: Any) -> bool:
    """Whether an entry of a run's files is a number; `null` stands for one that was not finite."""
    return isinstance(value, (int, float)) and math.isfinite(value)
