"""Segmenters at 512 pixels: what a dynamic backbone saves, and what a decoder leaves of it.

    python benchmarks/segmentation.py --output benchmarks/results/segmentation-cpu.json

Dense and dynamic Vim (token and block keep ratios of the recipes): the backbone alone with its four
maps, and whole segmenters with each decoder. All see the same images in turn; samples are redone
while other processes are busy. The logits of everything that is timed are compared with the float32
definition first; what is wrong gets no speed, and the command fails.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import checking, flags, records
from benchmarks.model import SIZES, TOLERANCES, image_size, random_images, set_routers
from models import VisionMamba
from models.build import ModelSpec, build_model
from models.flops import count_flops, decoder_operations
from models.segmentation import DECODERS, as_segmenter, make_head
from utils import arguments
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
        "img_size": args.img_size,
        "batch": args.batch,
        "token_keep_ratio": TOKEN_KEEP,
        "block_keep_ratio": BLOCK_KEEP,
        "parts": [],
    }
    print(
        f"{record['device']}, {record['threads']} threads, {args.precision}, {args.img_size} pixels"
    )
    for size in args.models:
        record["parts"].append(measure(size, args))
        print(table(record["parts"][-1]), flush=True)
        if args.output:
            write_json(args.output, record)


if __name__ == "__main__":
    run_main(main)
