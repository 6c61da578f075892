"""Accuracy, operations and speed of one checkpoint at several token budgets: `main.py --eval
--sweep 0.5:1.0:0.1`.

Gates stay as trained; a budget r keeps r^j of the patches after stage j. `sweep.json` is written
after every budget, and a sweep that was interrupted goes on from there.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from tabulate import tabulate

from datasets import Data
from drawing import plots
from engine import evaluate
from evaluation.summary import column, forward_speeds
from models import DynamicVisionMamba, VisionMamba
from models.build import build_dense
from utils.distributed import Distributed
from utils.environment import device_name
from utils.files import sha256_of, write_csv, write_json
from utils.logging import Progress

NAME = "sweep.json"
DENSE = "dense"

_logger = logging.getLogger(__name__)


def run_sweep(
    model: VisionMamba,
    dense: VisionMamba | None,
    trained: float | None,
    data: Data,
    args: argparse.Namespace,
    distributed: Distributed,
) -> dict[str, Any] | None:
    """Evaluate `model` at each token keep ratio of `args.sweep`; -> the content of sweep.json on
    rank 0.

    Args:
        dense: the dense counterpart with its weights; None: unknown, and its operations and speed
            alone are reported.
        trained: the token keep ratio that the checkpoint was trained at, where that is known.
    """
    dynamic = isinstance(model, DynamicVisionMamba)
    ratios = args.sweep if dynamic else []
    if not getattr(model, "pruning_layers", ()):
        ratios = ratios and [1.0]
        _logger.warning(
            "%s drops no tokens: there is no budget to sweep, its one point is reported",
            args.model_path,
        )
    record = _start(model, args, distributed)
    # Rank 0 alone reads the file, and all ranks must skip the same budgets.
    known = [float(distributed.is_main and point_of(record, ratio) is not None) for ratio in ratios]
    known = distributed.all_reduce_sum(known).tolist()
    missing = [ratio for ratio, done in zip(ratios, known, strict=True) if not done]
    for ratio in Progress(missing, "sweep", shown=distributed.is_main):
        model.set_token_keep(ratio)
        metrics = evaluate(model, data, args, distributed, f"token keep ratio {ratio:g}")
        point = {
            "token_keep_ratio": ratio,
            "trained": ratio == trained,
            "keep": metrics.keep,
            **column(model, metrics, None),
        }
        record["points"] = sorted([*record["points"], point], key=lambda p: p["token_keep_ratio"])
        _save(record, args, distributed)
    if not dynamic:
        dense = model
    dense_known = dense is not None
    dense = dense if dense_known else build_dense(args, data.num_classes).to(distributed.device)
    if distributed.all_reduce_sum([float(distributed.is_main and not record["dense"])]).item():
        metrics = (
            evaluate(dense, data, args, distributed, "evaluation (dense)") if dense_known else None
        )
        record["dense"] = column(dense, metrics, None)
        _save(record, args, distributed)
    if not distributed.is_main:
        return None
    _measure(record, model, dense, ratios, data, args, distributed)
    record["points"] = [point for point in record["points"] if point["token_keep_ratio"] in ratios]
    _write(record, Path(args.output_dir))
    print(table(record))
    return record


def point_of(record: dict[str, Any], ratio: float) -> dict[str, Any] | None:
    """The point of a sweep at a token keep ratio; None where it has none."""
    return next((point for point in record["points"] if point["token_keep_ratio"] == ratio), None)


def _start(
    model: VisionMamba, args: argparse.Namespace, distributed: Distributed
) -> dict[str, Any]:
    """The record of an interrupted sweep of the same checkpoint under the same conditions, or an
    empty one.
    """
    conditions = {
        "checkpoint_sha256": sha256_of(args.model_path),
        "model": args.model,
        "data_set": args.data_set,
        "data_path": args.data_path,
        "input_size": args.input_size,
        "eval_crop_ratio": args.eval_crop_ratio,
        "dense_sha256": sha256_of(args.dense_path) if args.dense_path else None,
        "device": device_name(distributed.device),
        "precision": "float32" if args.amp == "off" else args.amp,
        "batch_size": args.batch_size,
        "gate_threshold": getattr(model, "gate_threshold", None),
    }
    path = Path(args.output_dir) / NAME
    if distributed.is_main and path.exists():
        try:
            record = json.loads(path.read_bytes())
            if record["conditions"] == conditions:
                _logger.info("%s: going on, %d budgets are done", path, len(record["points"]))
                return record
            _logger.info("%s is of another checkpoint or other conditions: starting anew", path)
        except (OSError, ValueError, KeyError, TypeError):
            _logger.warning("%s cannot be read: starting anew", path)
    return {"conditions": conditions, "points": [], "dense": None}


def _measure(
    record: dict[str, Any],
    model: VisionMamba,
    dense: VisionMamba,
    ratios: list[float],
    data: Data,
    args: argparse.Namespace,
    distributed: Distributed,
) -> None:
    """Images/s at every budget and of the dense model, all measured in turn so that noise does not
    order them.
    """
    points = {ratio: point_of(record, ratio) for ratio in ratios} | {DENSE: record["dense"]}
    if all(point["images_per_s"] for point in points.values()):
        return
    keep = getattr(model, "token_keep", None)
    models = {ratio: _at_budget(model, ratio) for ratio in ratios} | {DENSE: dense}
    seconds = args.throughput_seconds / 2 * len(models)
    speeds = forward_speeds(models, data, args, distributed, seconds)
    if keep is not None:
        model.set_token_keep(keep)
    for name, point in points.items():
        point["images_per_s"] = speeds[name]
    _save(record, args, distributed)


def _at_budget(model: DynamicVisionMamba, ratio: float):
    """The model as a function of images at a token keep ratio; the weights are those of `model`
    itself.
    """

    def forward(images):
        model.set_token_keep(ratio)
        return model(images)

    return forward


def _save(record: dict[str, Any], args: argparse.Namespace, distributed: Distributed) -> None:
    if distributed.is_main:
        write_json(Path(args.output_dir) / NAME, record)


def _write(record: dict[str, Any], output: Path) -> None:
    """The points as CSV and their plots."""
    write_csv(
        output / "sweep.csv",
        (
            "token_keep_ratio",
            "trained",
            "top1",
            "top5",
            "loss",
            "paper_flops",
            "exact_flops",
            "images_per_s",
        ),
        map(_csv_row, rows_of(record)),
    )
    curves, dense = {0: record["points"]}, {0: record["dense"]}
    for axis, name in (("exact", "sweep_flops.png"), ("images_per_s", "sweep_speed.png")):
        figure = plots.budget_curve(curves, axis, dense)
        if figure is not None:
            plots.save(figure, output / name)


def rows_of(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """All points with their names: the token keep ratios, then the dense model."""
    return [(f"{point['token_keep_ratio']:g}", point) for point in record["points"]] + [
        (DENSE, record["dense"])
    ]


def _csv_row(row: tuple[str, dict[str, Any]]) -> list[Any]:
    name, point = row
    return [
        name,
        int(point.get("trained", False)),
        *(point.get(key, "") for key in ("top1", "top5", "loss")),
        point["flops"]["paper"],
        point["flops"]["exact"],
        point["images_per_s"] or "",
    ]


def table(record: dict[str, Any]) -> str:
    """The sweep as a table for the screen; the trained budget has a star."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    rows = [
        [
            name + " *" * point.get("trained", False),
            cell(point.get("top1"), "{:.2f}"),
            cell(point["flops"]["paper"] / 1e6, "{:,.2f}"),
            cell(point["flops"]["exact"] / 1e6, "{:,.2f}"),
            cell(point["images_per_s"], "{:,.1f}"),
        ]
        for name, point in rows_of(record)
    ]
    return tabulate(
        rows,
        headers=["token keep ratio", "top-1, %", "MFLOPs, paper", "MFLOPs, exact", "images/s"],
        disable_numparse=True,
        colalign=("left", "right", "right", "right", "right"),
    )
