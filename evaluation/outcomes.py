"""Runs from one dense teacher: what each brought, and their speeds side by side."""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.summary import forward_speeds
from loading.fingerprint import fingerprints
from models.build import ModelSpec, restore
from models.weights import load_weights
from tasks import Experiment
from utils.checkpoint import BEST, load_checkpoint
from utils.environment import device_name
from utils.errors import UserError
from utils.files import atomic_file, sha256_of, write_csv, write_json

DENSE = "dense"


@dataclass(frozen=True)
class PlannedRun:
    """One run of main.py; `flags` are the words after it, `args` those of the training.

    conditions: of an evaluation of the teacher's own weights, without training: what must be equal
    for an earlier one to stand. None for a training.
    """

    variant: str
    seed: int
    folder: Path
    flags: list[str]
    args: argparse.Namespace
    conditions: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.variant}/seed{self.seed}"

    @property
    def checkpoint(self) -> Path:
        """The file of the weights that are evaluated."""
        trained = self.conditions is None
        return self.folder / BEST if trained else Path(self.args.model_path)


@dataclass(frozen=True)
class Outcome:
    """The content of a complete run's eval.json: its own model's column, and the dense one's."""

    run: PlannedRun
    values: dict[str, Any]
    dense: dict[str, Any]

    @classmethod
    def read(cls, run: PlannedRun) -> "Outcome":
        path = run.folder / "eval.json"
        own = DENSE if run.args.method == DENSE else "dynamic"
        try:
            report = json.loads(path.read_bytes())
            return cls(run, dict(report[own]), report[DENSE])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error!r}); remove it, and the same command writes it anew"
            ) from None

    @property
    def variant(self) -> str:
        return self.run.variant

    @property
    def flops(self) -> float:
        return self.values["flops"]["exact"]

    @property
    def patches_kept(self) -> float:
        """Fraction of the patches that the last stage leaves."""
        return self.values["keep"][-1] if self.values["keep"] else 1.0

    @property
    def scans_kept(self) -> float:
        """Mean of the gates over layers and directions."""
        return statistics.fmean(gate for layer in self.values["gates"] for gate in layer)


def measure_speeds(
    outcomes: Sequence[Outcome],
    dense_path: str,
    experiment: Experiment,
    seconds: float,
    record: Path,
) -> dict[str, Any]:
    """Images/s of the dense model and of one run per variant, timed in turn on the same batch.

    An earlier measurement in the JSON file `record` is reused if checkpoints and conditions are the
    same.
    """
    first = {outcome.variant: outcome.run for outcome in reversed(outcomes)}
    conditions = {
        "checkpoints_sha256": {DENSE: sha256_of(dense_path)}
        | {name: _identity(run) for name, run in first.items()},
        "images_sha256": fingerprints(experiment.data, experiment.args.data_path)["val"],
        "batch_size": experiment.args.batch_size,
        "device": device_name(experiment.device),
        "precision": experiment.precision,
        "seconds": seconds,
    }
    recorded = _recorded_speeds(record)
    if recorded.get("conditions") == conditions:
        return recorded
    dense = experiment.model(experiment.spec.dense())
    load_weights(dense, load_checkpoint(dense_path), dense_path)
    models = {DENSE: dense}
    for name, run in first.items():
        checkpoint, threshold = load_checkpoint(run.checkpoint), run.args.gate_threshold
        spec = ModelSpec.from_args(run.args)
        if run.conditions is None:  # its stages may have learned what they keep
            spec = ModelSpec.from_checkpoint(checkpoint, str(run.checkpoint))
        model = experiment.model(spec)
        models[name] = restore(model, checkpoint, str(run.checkpoint), threshold=threshold)
    images_per_s, _ = forward_speeds(models, experiment, seconds / 2 * len(models))
    return {"conditions": conditions, "images_per_s": images_per_s}


def _identity(run: PlannedRun) -> str:
    """What a run's speed is of: its weights; of weights that several share, the way too."""
    weights = sha256_of(run.checkpoint)
    return weights if run.conditions is None else f"{weights} {json.dumps(run.conditions['model'])}"


def _recorded_speeds(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes())["speeds"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def how_timed(conditions: Mapping[str, Any], which: str, example: str) -> str:
    """The sentence of a document on how its images/s were measured; example: see `Task`."""
    if not conditions["seconds"]:
        return f"{example}s/s: not measured"
    return (
        f"{example}s/s: all models in turn on one batch of {conditions['batch_size']}, "
        f"{conditions['device']}, {conditions['precision']}; {which}"
    )


def of_missing(failed: Mapping[str, str]) -> list[str]:
    """The lines of a document on runs that failed; none where none did."""
    if not failed:
        return []
    return ["Missing runs:", "", *(f"* {run}: {reason}" for run, reason in failed.items()), ""]


def write_results(
    output: Path, name: str, record: Mapping[str, Any], text: str, columns: Mapping[str, str]
) -> None:
    """Write a record with its `rows` as NAME.json, its document as NAME.md, the rows as NAME.csv.

    columns: {header in the CSV file: key of a row}.
    """
    write_json(output / f"{name}.json", record)
    with atomic_file(output / f"{name}.md") as file:
        file.write(text.encode(errors="backslashreplace"))
    cells = (
        ["" if row[key] is None else row[key] for key in columns.values()] for row in record["rows"]
    )
    write_csv(output / f"{name}.csv", list(columns), cells)
