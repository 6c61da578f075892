"""Segmenters at 512 pixels: what a dynamic backbone saves, and what a decoder leaves of it.

    python benchmarks/segmentation.py --output benchmarks/results/segmentation-cpu.json
    python benchmarks/segmentation.py --runs output/seg-demo-upernet output/seg-demo-light

Dense and dynamic Vim (token and block keep ratios of the recipes): the backbone alone with its four
maps, and whole segmenters with each decoder. All see the same images in turn; samples are redone
while other processes are busy. The logits of everything that is timed are compared with the float32
definition first; what is wrong gets no speed, and the command fails.

With `--runs`, trained segmenters instead: dense/ and dyvm/ in the folders of the demo, each whole
prediction of one image, side by side.
"""

import argparse
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import checking, flags, records
from benchmarks.model import SIZES, TOLERANCES, image_size, random_images, set_routers
from models import VisionMamba
from models.build import ModelSpec, build_model, restore
from models.flops import count_flops, decoder_operations
from models.segmentation import DECODERS, as_segmenter, make_head
from tasks import task_of_checkpoint
from utils import arguments
from utils.checkpoint import BEST, load_checkpoint
from utils.files import write_json
from utils.precision import autocast
from utils.program import run_main
from utils.tables import text_table
from utils.timing import interleaved

TOKEN_KEEP = {"T": 0.9, "S": 0.8, "B": 0.7}
BLOCK_KEEP = 0.8
CALIBRATION = 10  # images on which the routers are set
CLASSES = 150


def parse_args():
    parser = flags.build_parser("segmentation.py", __doc__)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["T"])
    parser.add_argument("--runs", nargs="+", type=Path, metavar="DIR", help="trained segmenters")
    parser.add_argument("--batch", type=arguments.positive, default=1)
    parser.add_argument("--img-size", type=image_size, default=512)
    flags.add_seconds(parser, 60.0)
    flags.add_retries(parser, 10)
    flags.add_precision(parser)
    return flags.parse(parser)


def build(size: str, decoder: str, args) -> dict[str, VisionMamba]:
    """Dense and dynamic segmenter with the same random weights."""
    torch.manual_seed(0)
    found = {}
    for kind, method in (("dense", "dense"), ("dynamic", "dyvm")):
        name = f"vim_{SIZES[size]}" if kind == "dense" else f"dyvm_vim_{SIZES[size]}"
        spec = ModelSpec(
            name,
            method=method,
            kwargs={"class_token": False},
            pruning_layers=(6, 12, 18),
            token_keep_ratio=TOKEN_KEEP[size],
            img_size=args.img_size,
        )
        model = build_model(spec, 0)
        found[kind] = as_segmenter(model, make_head(decoder, model, CLASSES), CLASSES)
    checking.set_telling_weights(found["dense"])
    found["dynamic"].load_state_dict(found["dense"].state_dict(), strict=False)
    for model in found.values():
        model.to(args.device).eval().requires_grad_(False)
    set_routers(
        found["dynamic"], random_images(CALIBRATION, args.img_size, args.device), BLOCK_KEEP
    )
    return found


def maps_of(model: VisionMamba, images: Tensor) -> Any:
    return model.forward_features(images, model.head.layers, model.head.features)


def measure(size: str, args) -> dict[str, Any]:
    """Speeds of all contenders of one size that are right, and what they say."""
    torch.manual_seed(0)
    images = random_images(args.batch, args.img_size, args.device)
    precision = partial(autocast, args.device, args.precision)
    calls, errors, operations = {}, {}, {}
    with torch.inference_mode():
        for decoder in DECODERS:
            for kind, model in build(size, decoder, args).items():
                name = f"{decoder}, {kind}"
                errors[name] = checking.logits_error(model, images, None, precision())
                gates = model(images).gates.float().mean(dim=1).cpu()
                whole, head = count_flops(model, gates).exact, decoder_operations(model)
                operations[name] = {"exact": whole, "decoder": head}
                calls[name] = partial(run, model, images, args)
                if decoder == next(iter(DECODERS)):
                    operations[f"backbone, {kind}"] = {"exact": whole - head, "decoder": 0}
                    calls[f"backbone, {kind}"] = partial(run, partial(maps_of, model), images, args)
        wrong = [name for name, error in errors.items() if not error <= TOLERANCES[args.precision]]
        checking.require_correct(wrong, TOLERANCES[args.precision])
        for call in calls.values():
            call()
        times = interleaved(calls, args.device, 5, args.seconds, args.retries)
    return {"size": size, "errors": errors, "operations": operations, "times": times}


def measure_runs(folders: list[Path], args) -> dict[str, Any]:
    """Speeds of the whole prediction of trained segmenters, as `--eval` makes it."""
    torch.manual_seed(0)
    calls, errors, operations = {}, {}, {}
    with torch.inference_mode():
        for path in (folder / kind / BEST for folder in folders for kind in ("dense", "dyvm")):
            checkpoint, name = (
                load_checkpoint(path),
                f"{path.parent.parent.name}, {path.parent.name}",
            )
            flags_of_run = argparse.Namespace(**checkpoint["args"])
            task = task_of_checkpoint(checkpoint).of_run(flags_of_run)
            spec = ModelSpec.from_checkpoint(checkpoint, str(path))
            model = task.model(spec, task.num_classes(checkpoint, str(path)))
            restore(model, checkpoint, str(path)).to(args.device).requires_grad_(False)
            images = random_images(args.batch, model.patch_embed.img_size[0], args.device)
            errors[name] = checking.logits_error(model, images, None, nullcontext())
            gates = model(images).gates.float().mean(dim=1).cpu()
            operations[name] = count_flops(model, gates).exact
            calls[name] = partial(task.predict, model, images)
        wrong = [name for name, error in errors.items() if not error <= TOLERANCES["fp32"]]
        checking.require_correct(wrong, TOLERANCES["fp32"])
        for call in calls.values():
            call()
        times = interleaved(calls, args.device, 5, args.seconds, args.retries)
    return {"errors": errors, "operations": operations, "times": times}


def table_of_runs(part: dict[str, Any]) -> str:
    """A row for each segmenter, its speed beside that of the first one of its kind."""
    rows = []
    for name, row in part["times"].items():
        kind = name.rsplit(", ", 1)[1]
        first = next(other for other in part["times"] if other.endswith(kind))
        rows.append(
            [
                name,
                f"{part['operations'][name] / 1e6:.1f}",
                f"{row['ms']:.1f}",
                f"{part['times'][first]['ms'] / row['ms']:.2f}",
                f"{1 - part['operations'][name] / part['operations'][first]:.0%}",
                f"{row['samples']}",
            ]
        )
    headers = ["", "MFLOPs exact", "ms", "x as fast", "fewer operations", "samples"]
    return text_table(rows, headers)


def run(model: nn.Module, images: Tensor, args) -> Any:
    with autocast(args.device, args.precision):
        return model(images)


def table(part: dict[str, Any]) -> str:
    """One row for each pair of dense and dynamic."""
    rows = []
    for what in ("backbone", *DECODERS):
        dense, dynamic = (part["times"][f"{what}, {kind}"] for kind in ("dense", "dynamic"))
        before, after = (part["operations"][f"{what}, {kind}"] for kind in ("dense", "dynamic"))
        speed, saved = dense["ms"] / dynamic["ms"], before["exact"] / after["exact"]
        backbone = part["times"]["backbone, dense"]["ms"]
        rows.append(
            [
                what,
                f"{before['exact'] / 1e9:.2f}",
                f"{after['exact'] / 1e9:.2f}",
                f"{100 * before['decoder'] / before['exact']:.0f} %",
                f"{dense['ms']:.0f}",
                f"{dynamic['ms']:.0f}",
                f"{100 * (1 - backbone / dense['ms']):.0f} %" if what != "backbone" else "0 %",
                f"{speed:.3f}",
                f"{saved:.3f}",
                f"{100 * speed / saved:.0f} %",
                f"{dense['samples']}",
            ]
        )
    headers = [
        f"Vim-{part['size']}",
        "GFLOPs dense",
        "dynamic",
        "of it decoder",
        "ms dense",
        "dynamic",
        "of it decoder",
        "x as fast",
        "x by exact",
        "reached",
        "samples",
    ]
    return text_table(rows, headers)


def main() -> None:
    args = parse_args()
    record = {
        **records.head("segmentation.py", args.device),
        "precision": args.precision,
        "batch": args.batch,
    }
    print(f"{record['device']}, {record['threads']} threads, {args.precision}")
    if args.runs:
        record["runs"] = measure_runs(args.runs, args)
        print(table_of_runs(record["runs"]))
        if args.output:
            write_json(args.output, record)
        return
    record |= {
        "img_size": args.img_size,
        "token_keep_ratio": TOKEN_KEEP,
        "block_keep_ratio": BLOCK_KEEP,
        "parts": [],
    }
    for size in args.models:
        record["parts"].append(measure(size, args))
        print(table(record["parts"][-1]), flush=True)
        if args.output:
            write_json(args.output, record)


if __name__ == "__main__":
    run_main(main)
