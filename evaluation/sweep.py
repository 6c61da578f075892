"""Accuracy, operations and speed of one checkpoint at several token budgets (`--sweep`).

    python main.py --eval --sweep 0.5:1.0:0.1 --model-path CKPT --output_dir DIR

Gates stay as trained; a budget r keeps r^j of the patches after stage j. `sweep.json` is written
after every budget, and an interrupted sweep resumes from it.
"""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from engine import validate
from evaluation.columns import EXACT, PAPER, measure_row, speed_row
from evaluation.summary import column, forward_speeds
from loading.fingerprint import fingerprints
from models import VisionMamba
from tasks import Experiment, Task
from utils.environment import device_name
from utils.files import sha256_of, write_csv, write_json
from utils.logging import Progress
from utils.tables import text_table

NAME = "sweep.json"
DENSE = "dense"
# Flags that do not alter a point, or whose meaning for it has an entry of its own.
WITHOUT_EFFECT = {
    "output_dir",
    "device",
    "num_workers",
    "pin_mem",
    "cuda_graph",
    "resume",
    "resume_override",
    "overwrite",
    "save_minutes",
    "throughput_seconds",
    "sweep",
    "model_path",
    "dense_path",
    "calibrate",
    "token_budget",
    "gate_threshold",
    "block_keep_ratio",
    "token_keep_ratio",
    "stage_keep",
    "keep_schedule",
    "final_noise",
    "patience",
}

_logger = logging.getLogger(__name__)


def run_sweep(
    model: VisionMamba, dense: VisionMamba | None, trained: float | None, experiment: Experiment
) -> dict[str, Any] | None:
    """Evaluate `model` at each token keep ratio of `--sweep`; -> content of sweep.json on rank 0.

    Args:
        dense: the dense counterpart with its weights; None: unknown, and only its operations and
            speed are reported.
        trained: the token keep ratio that the checkpoint was trained with, if known.
    """
    task, distributed, dynamic = experiment.task, experiment.distributed, experiment.spec.dynamic
    ratios = experiment.args.sweep if dynamic else []
    if not model.pruning_layers:
        ratios = ratios and [1.0]
        _logger.warning(
            "%s drops no tokens: there is no budget to sweep, its one point is reported",
            experiment.args.model_path,
        )
    record = _start(model, experiment)
    # Only rank 0 reads the file, and all ranks must skip the same budgets.
    done = [float(distributed.is_main and point_of(record, ratio) is not None) for ratio in ratios]
    done = distributed.all_reduce_sum(done).tolist()
    missing = [ratio for ratio, is_done in zip(ratios, done, strict=True) if not is_done]
    for ratio in Progress(missing, "sweep", shown=distributed.is_main):
        model.set_token_keep(ratio)
        values = validate(model, experiment, f"token keep ratio {ratio:g}")
        point = {
            "token_keep_ratio": ratio,
            "trained": ratio == trained,
            "keep": values["keep"],
            **column(model, task, values, None),
        }
        record["points"] = sorted([*record["points"], point], key=lambda p: p["token_keep_ratio"])
        _save(record, experiment)
    if not dynamic:
        dense = model
    dense_trained = dense is not None
    if dense is None:
        dense = experiment.model(experiment.spec.dense())
    if distributed.all_reduce_sum([float(distributed.is_main and not record["dense"])]).item():
        values = validate(dense, experiment, "evaluation (dense)") if dense_trained else None
        passes = record["points"][0].get("passes", 1) if record["points"] else 1
        record["dense"] = column(dense, task, values, None, passes)
        _save(record, experiment)
    if not distributed.is_main:
        return None
    _measure_speeds(record, model, dense, ratios, experiment)
    record["points"] = [point for point in record["points"] if point["token_keep_ratio"] in ratios]
    _write(record, task, experiment.output)
    print(table(record, task))
    return record


def point_of(record: dict[str, Any], ratio: float) -> dict[str, Any] | None:
    """The point of a sweep at a token keep ratio, or None."""
    return next((point for point in record["points"] if point["token_keep_ratio"] == ratio), None)


def _start(model: VisionMamba, experiment: Experiment) -> dict[str, Any]:
    """The record of an interrupted sweep under the same conditions, or else an empty one."""
    conditions = _conditions(model, experiment)
    path = experiment.output / NAME
    if experiment.is_main and path.exists():
        try:
            record = json.loads(path.read_bytes())
            changed = _changed(record["conditions"], conditions)
            if not changed:
                _logger.info("%s: going on, %d budgets are done", path, len(record["points"]))
                return record
            _logger.warning("%s is of something else (%s): starting anew", path, changed)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            _logger.warning("%s cannot be read: starting anew", path)
    return {"conditions": conditions, "points": [], "dense": None}


def _conditions(model: VisionMamba, experiment: Experiment) -> dict[str, Any]:
    """All that a point depends on, as JSON has it: weights, images, flags, machine."""
    args = experiment.args
    flags = {name: value for name, value in vars(args).items() if name not in WITHOUT_EFFECT}
    images = fingerprints(experiment.data, args.data_path) if experiment.is_main else {}
    conditions = {
        "checkpoint_sha256": sha256_of(args.model_path),
        "dense_sha256": sha256_of(args.dense_path) if args.dense_path else None,
        "model": experiment.spec.name,
        "images_sha256": images.get("val"),
        "device": device_name(experiment.device),
        "precision": experiment.precision,
        "gate_threshold": model.gate_threshold if model.route_blocks else None,
        "flags": flags,
    }
    return json.loads(json.dumps(conditions, default=str))


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Names of the conditions that differ; empty if none does."""
    texts = {"images_sha256": "other images", "checkpoint_sha256": "another checkpoint"}
    names = [texts.get(name, name) for name in _differing(before, now) if name != "flags"]
    flags = _differing(before.get("flags", {}), now["flags"])
    return ", ".join([*names, *(f"--{name.replace('_', '-')}" for name in flags)])


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _measure_speeds(
    record: dict[str, Any],
    model: VisionMamba,
    dense: VisionMamba,
    ratios: list[float],
    experiment: Experiment,
) -> None:
    """Images/s at every budget and of the dense model, in turn, so that noise affects all alike."""
    points = {ratio: point_of(record, ratio) for ratio in ratios} | {DENSE: record["dense"]}
    if all(point["images_per_s"] for point in points.values()):
        return
    keep = model.token_keep
    models = dict.fromkeys(ratios, model) | {DENSE: dense}
    settings = {ratio: partial(model.set_token_keep, ratio) for ratio in ratios}
    seconds = experiment.args.throughput_seconds / 2 * len(models)
    speeds, record["batch_size"] = forward_speeds(models, experiment, seconds, settings)
    if ratios:
        model.set_token_keep(keep)
    for name, point in points.items():
        point["images_per_s"] = speeds[name]
    _save(record, experiment)


def _save(record: dict[str, Any], experiment: Experiment) -> None:
    if experiment.is_main:
        write_json(experiment.output / NAME, record)


def _write(record: dict[str, Any], task: Task, output: Path) -> None:
    """Write the points as CSV and their plots."""
    # Here, since importing matplotlib takes a second.
    from drawing.plots import save
    from drawing.trade_offs import budget_curve

    keys = [measure.key for measure in task.measures]
    header = ["token_keep_ratio", "trained", *keys, "paper_flops", "exact_flops", "images_per_s"]
    write_csv(
        output / "sweep.csv",
        header,
        (_csv_row(name, point, keys) for name, point in named_points(record)),
    )
    curves, dense = {0: record["points"]}, {0: record["dense"]}
    for axis, name in (("exact", "sweep_flops.png"), ("images_per_s", "sweep_speed.png")):
        figure = budget_curve(curves, axis, dense, task.best, task.example)
        if figure is not None:
            save(figure, output / name)


def named_points(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """All points with their names: the token keep ratios, then the dense model."""
    return [(f"{point['token_keep_ratio']:g}", point) for point in record["points"]] + [
        (DENSE, record["dense"])
    ]


def _csv_row(name: str, point: dict[str, Any], keys: list[str]) -> list[Any]:
    return [
        name,
        int(point.get("trained", False)),
        *(point.get(key, "") for key in keys),
        point["flops"]["paper"],
        point["flops"]["exact"],
        point["images_per_s"] or "",
    ]


def table(record: dict[str, Any], task: Task) -> str:
    """The sweep as a table for the screen; the trained budget has a star."""
    speed = speed_row(record.get("batch_size"), task.example)
    columns = [measure_row(task.best), PAPER, EXACT, speed]
    rows = [
        [name + " *" * point.get("trained", False), *(row.cell(point) for row in columns)]
        for name, point in named_points(record)
    ]
    return text_table(rows, ["token keep ratio", *(row.label for row in columns)])
