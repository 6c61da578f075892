"""What `--eval` reports: accuracy, operations in both conventions, real throughput; `eval.json` and
a table.
"""

import argparse
import logging
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor

from datasets import Data
from drawing.pictures import decision_picture
from engine import Metrics, evaluate, evaluation_forward
from evaluation.summary import throughput
from loading.loaders import Batch
from models import DynamicVisionMamba, Result, VisionMamba
from models.build import build_dense, sigmoid
from models.flops import count_flops
from ops.selective_scan import backend_for
from utils.cuda_graphs import graphed
from utils.distributed import Distributed
from utils.environment import device_name
from utils.files import write_json

from .decisions import DecisionCounter
from .inference import Classifier
from .samples import draw_samples

_logger = logging.getLogger(__name__)


def evaluate_all(
    model: VisionMamba,
    ema: VisionMamba | None,
    dense: VisionMamba | None,
    dense_trained: bool,
    data: Data,
    args: argparse.Namespace,
    distributed: Distributed,
    observe: Callable[[Batch, Result], None] | None = None,
) -> dict[str, Any] | None:
    """Evaluate a model, the average of its weights and its dense counterpart; -> the content of
    eval.json on rank 0.

    Args:
        model: dense or dynamic.
        dense: the dense counterpart of a dynamic model; `dense_trained` False: its weights are not
            known, and only its operations, parameters and throughput are reported.
        observe: sees each batch and what the model made of it.
    """
    metrics = evaluate(model, data, args, distributed, "evaluation", observe=observe)
    ema_top1 = (
        evaluate(ema, data, args, distributed, "evaluation (EMA)").top1 if ema is not None else None
    )
    dense_metrics = (
        evaluate(dense, data, args, distributed, "evaluation (dense)") if dense_trained else None
    )
    if not distributed.is_main:
        return None
    dynamic = isinstance(model, DynamicVisionMamba)
    speeds = forward_speeds(
        {"dynamic": model, "dense": dense} if dynamic else {"dense": model},
        data,
        args,
        distributed,
        args.throughput_seconds,
    )
    if dynamic:
        report = {
            "dense": column(dense, dense_metrics, speeds["dense"]),
            "dynamic": column(model, metrics, speeds["dynamic"]),
        }
        report["dynamic"] |= {"ema_top1": ema_top1, "keep": metrics.keep, "gates": metrics.gates}
        if model.route_blocks:
            report["dynamic"]["gate_threshold"] = sigmoid(model.gate_threshold)
        flops, dense_flops = report["dynamic"]["flops"], report["dense"]["flops"]
        report["reduction"] = {kind: 1 - flops[kind] / dense_flops[kind] for kind in flops}
        report["speedup"] = speeds["dynamic"] / speeds["dense"] if speeds["dense"] else None
    else:
        report = {
            "dense": column(model, metrics, speeds["dense"]) | {"ema_top1": ema_top1},
            "dynamic": None,
            "reduction": None,
            "speedup": None,
        }
    return report | {
        "model": args.model,
        "data_set": args.data_set,
        "images": metrics.images,
        "backend": _backend(model),
        "device": device_name(distributed.device),
        "precision": "float32" if args.amp == "off" else args.amp,
    }


def column(
    model: VisionMamba, metrics: Metrics | None, images_per_s: float | None
) -> dict[str, Any]:
    """What is reported of one model; without `metrics` what is known without its weights."""
    flops = count_flops(model, metrics.gates if metrics else None)
    known = {"top1": metrics.top1, "top5": metrics.top5, "loss": metrics.loss} if metrics else {}
    return known | {
        "flops": flops._asdict(),
        "images_per_s": images_per_s,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def forward_speeds(
    models: Mapping[Hashable, Callable[[Tensor], Result]],
    data: Data,
    args: argparse.Namespace,
    distributed: Distributed,
    seconds: float,
) -> dict[Hashable, float | None]:
    """Images/s of each model on the same validation images, by this process alone; None when
    `seconds` is 0.
    """
    if not seconds:
        return dict.fromkeys(models)
    images = next(iter(data.val_batches())).images.to(distributed.device)

    def forward(model: Callable[[Tensor], Result]) -> Callable[[Tensor], Result]:
        if isinstance(model, torch.nn.Module):
            model.eval()
        return graphed(
            evaluation_forward(model, distributed.device, args.amp),
            distributed.device,
            args.cuda_graph,
        )

    return throughput.measure(
        {name: forward(model) for name, model in models.items()}, images, seconds
    )


def _backend(model: VisionMamba) -> str:
    mixer, device = model.layers[0].mixer, model.cls_token.device
    with torch.no_grad():
        return backend_for(
            torch.zeros(1, 1, mixer.in_proj.out_features, device=device), mixer.branch(False)
        )


def table(report: dict[str, Any]) -> str:
    """The report as a table for the screen."""
    dense, dynamic = report["dense"], report["dynamic"]

    def row(name: str, read, form: str, compare=None):
        values = [read(dense), read(dynamic) if dynamic else None]
        change = compare(*values) if compare and None not in values else ""
        return [name, *("-" if value is None else form.format(value) for value in values), change]

    def relative(before: float, after: float) -> str:
        return f"{100 * (after / before - 1):+.1f} %"

    def points(before: float, after: float) -> str:
        return f"{after - before:+.2f}"

    rows = [
        row("top-1, %", lambda c: c.get("top1"), "{:.2f}", points),
        row("top-1 of the EMA, %", lambda c: c.get("ema_top1"), "{:.2f}"),
        row("top-5, %", lambda c: c.get("top5"), "{:.2f}", points),
        row("loss", lambda c: c.get("loss"), "{:.4f}"),
        row("MFLOPs, paper", lambda c: c["flops"]["paper"] / 1e6, "{:,.2f}", relative),
        row("MFLOPs, exact", lambda c: c["flops"]["exact"] / 1e6, "{:,.2f}", relative),
        row("images/s", lambda c: c["images_per_s"], "{:,.1f}", lambda a, b: f"x {b / a:.2f}"),
        row("parameters", lambda c: c["parameters"], "{:,}"),
    ]
    lines = [
        f"{report['model']} on {report['data_set']}, {report['images']} images; backend "
        f"{report['backend']}, "
        f"{report['device']}, {report['precision']}",
        tabulate(
            rows,
            headers=["", "dense", "dynamic", "change"],
            disable_numparse=True,
            colalign=("left", "right", "right", "right"),
        ),
    ]
    if dynamic:
        if dynamic["keep"]:
            lines.append(
                "patches kept after each stage: "
                + ", ".join(f"{100 * k:.1f} %" for k in dynamic["keep"])
            )
        forward, backward = (
            sum(column) / len(column) for column in zip(*dynamic["gates"], strict=True)
        )
        threshold = (
            f" (gate threshold {dynamic['gate_threshold']:.3f})"
            if "gate_threshold" in dynamic
            else ""
        )
        lines.append(
            f"scans kept: forward {100 * forward:.1f} %, backward {100 * backward:.1f} %{threshold}"
        )
    return "\n".join(lines)


@torch.no_grad()
def draw_decisions(model: VisionMamba, data: Data, device: torch.device, count: int = 8):
    """Picture [H, W, 3] of validation images with dropped patches dimmed; None when the model drops
    none.
    """
    if not getattr(model, "pruning_layers", ()):
        return None
    images = next(iter(data.val_batches())).images[:count]
    kept = model.eval()(images.to(device)).kept
    return decision_picture(images, kept, model.patch_embed, scale=max(1, 96 // images.shape[-1]))


def report_evaluation(
    model: VisionMamba,
    ema: VisionMamba | None,
    dense: VisionMamba | None,
    data: Data,
    args: argparse.Namespace,
    distributed: Distributed,
) -> None:
    """Evaluate, print the table, write eval.json and the picture of the kept patches."""
    dense_trained = dense is not None
    if isinstance(model, DynamicVisionMamba) and dense is None:
        dense = build_dense(args, data.num_classes).to(distributed.device)
    decisions = DecisionCounter(model, data.class_names)
    report = evaluate_all(model, ema, dense, dense_trained, data, args, distributed, decisions.add)
    totals = decisions.totals(distributed)
    data.list_bad_images(args.output_dir, distributed.rank)
    if not distributed.is_main:
        return
    output = Path(args.output_dir)
    if decisions.anything:
        totals.write(output / "decisions")
        draw_samples(
            Classifier(model, data.class_names, args, distributed.device),
            data,
            output / "decisions",
        )
    write_json(output / "eval.json", report)
    print(table(report))
    picture = draw_decisions(model, data, distributed.device)
    if picture is not None:
        Image.fromarray(picture).save(output / "kept_patches.png")
    _logger.info("written to %s", output / "eval.json")
