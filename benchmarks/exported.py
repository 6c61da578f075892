"""Exported models in ONNX Runtime against eager PyTorch, and against DeiT in ONNX Runtime.

    python benchmarks/exported.py --batch 1 16 --output benchmarks/results/exported-cpu.json

DeiT, Vim and DyVM of one size with random weights, DyVM with routers that differ between images.
Each is exported once; its logits are compared with the eager model's, on images whose answers do
not depend on rounding; what is wrong is not timed, and the command fails. The files with 8-bit
weights are timed too; their error is reported and is no reason to fail. Samples are taken in turn.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import flags, records
from benchmarks.checking import require_correct
from benchmarks.model import SIZES, build, dynamic_gain, image_size, logits_of, random_images
from exporting import checking, program
from exporting.onnx_file import to_onnx, with_int8_weights
from exporting.onnx_model import open_session, run
from models import VisionMamba
from utils import arguments
from utils.files import write_json
from utils.program import run_main
from utils.tables import text_table
from utils.timing import interleaved

OPSET = 18
RUNTIME, INT8 = ", ONNX Runtime", ", ONNX Runtime, int8"


def parse_args() -> argparse.Namespace:
    parser = flags.build_parser("exported.py", __doc__)
    parser.add_argument("--model", choices=SIZES, default="T")
    parser.add_argument("--batch", nargs="+", type=arguments.positive, default=[1, 16])
    parser.add_argument("--img-size", type=image_size, default=224)
    flags.add_seconds(parser, 20.0)
    flags.add_retries(parser, 10)
    args = flags.parse(parser)
    args.device = "cpu"
    return args


def converted(model: nn.Module, size: int) -> onnx.ModelProto:
    if isinstance(model, VisionMamba):
        return to_onnx(program.decompose(program.trace(model), onnx=True), OPSET, {})
    batch = torch.export.Dim("batch", min=1, max=program.LARGEST_BATCH)
    images = torch.randn(program.TRACED, 3, size, size)
    return to_onnx(torch.export.export(model, (images,), dynamic_shapes=({0: batch},)), OPSET, {})


class Runtime:
    """A file in ONNX Runtime: images -> logits."""

    def __init__(self, model: onnx.ModelProto, path: Path):
        onnx.save(model, path)
        begin = time.perf_counter()
        self.session = open_session(path)
        self.load_s, self.megabytes = time.perf_counter() - begin, path.stat().st_size / 1e6

    def __call__(self, images: Tensor) -> Tensor:
        return run(self.session, images)


def decide(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give predictors weights that tell tokens apart: a new model's are ties but for rounding."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights:
        if "score_predictors" in name and weight.dim() == 2:
            # Larger ones saturate the scores of wide models, which are ties again.
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)


@torch.no_grad()
def exported(found: dict[str, nn.Module], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """{name: {"runtime", "int8", "export_s", "error", "int8_error"}} of the models."""
    files = {}
    for name, model in found.items():
        print(f"exporting {name}", file=sys.stderr)
        decide(model.named_parameters())
        begin = time.perf_counter()
        file = converted(model, args.img_size)
        spent = time.perf_counter() - begin
        runtime = Runtime(file, folder / f"{name}.onnx")
        small = Runtime(with_int8_weights(file), folder / f"{name}.int8.onnx")
        images = random_images(checking.CANDIDATES, args.img_size, "cpu")

        def error(answer: Callable[[Tensor], Tensor], model=model, images=images) -> float:
            if isinstance(model, VisionMamba):
                return checking.compare(model, answer, images).error
            return checking.relative(answer(images), model(images)).max().item()

        files[name] = {"runtime": runtime, "int8": small, "export_s": spent}
        files[name] |= {"error": error(runtime), "int8_error": error(small)}
    return files


def measure(
    found: dict[str, nn.Module], files: dict[str, Any], batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Speeds at one batch size, of all that is right."""
    images = random_images(batch, args.img_size, "cpu")
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in found.items():
        if files[name]["error"] <= checking.LARGEST_ERROR:
            calls[name] = lambda model=model: logits_of(model(images))
            calls[name + RUNTIME] = partial(files[name]["runtime"], images)
            calls[name + INT8] = partial(files[name]["int8"], images)
    with torch.inference_mode():
        for call in calls.values():
            call()
        times = interleaved(calls, "cpu", 5, args.seconds, args.retries)
    part = {
        "batch": batch,
        "models": {name: {"images_per_s": 1e3 * batch / t["ms"], **t} for name, t in times.items()},
    }
    dense, dynamic = f"Vim-{args.model}", f"DyVM-{args.model}"
    if {dense, dynamic} <= calls.keys():
        with torch.inference_mode():
            gates = found[dynamic](images).gates.float().mean(dim=1)
        own = {name: times[name + RUNTIME] for name in (dense, dynamic)}
        part["gain"] = dynamic_gain(found, args.model, own, gates)
    return part


def table(part: dict[str, Any], files: dict[str, Any], size: str) -> str:
    base = part["models"].get(f"DeiT-{size}{RUNTIME}", {"ms": float("nan")})["ms"]
    rows = []
    for name, row in part["models"].items():
        own = files[name.partition(",")[0]]
        error, megabytes = "", ""
        for kind, key in ((RUNTIME, "runtime"), (INT8, "int8")):
            if name.endswith(kind):
                error = f"{own['int8_error' if key == 'int8' else 'error']:.1e}"
                megabytes = f"{own[key].megabytes:.1f}"
        rows.append(
            [
                *(name, f"{row['images_per_s']:.1f}", f"{base / row['ms']:.2f}", megabytes, error),
                *(row["samples"], row["disturbed"]),
            ]
        )
    headers = ["", "images/s", "x DeiT in ORT", "MB", "error", "samples", "disturbed"]
    lines = [f"batch {part['batch']}", text_table(rows, headers)]
    if "gain" in part:
        gain = part["gain"]
        lines.append(
            f"dynamic against dense in ONNX Runtime: {gain['speed_ratio']:.3f} times as fast, "
            f"{gain['flops_ratio']:.3f} by `exact` operations at {100 * gain['gates']:.1f} % of "
            f"the scans; {100 * gain['share']:.0f} % of it reached"
        )
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    record = records.head("exported.py", "cpu", "onnx", "onnxruntime", "onnxscript")
    print(f"{record['device']}, {record['threads']} threads, {args.img_size} pixels")
    found = build(args.model, argparse.Namespace(**vars(args), precision="fp32"))
    with TemporaryDirectory() as folder:
        files = exported(found, args, Path(folder))
        parts = []
        for batch in args.batch:
            parts.append(measure(found, files, batch, args))
            print(table(parts[-1], files, args.model))
    record |= {"img_size": args.img_size, "opset": OPSET, "parts": parts}
    record["files"] = {
        name: {
            "megabytes": own["runtime"].megabytes,
            "int8_megabytes": own["int8"].megabytes,
            "load_s": own["runtime"].load_s,
            **{key: own[key] for key in ("export_s", "error", "int8_error")},
        }
        for name, own in files.items()
    }
    if args.output:
        write_json(args.output, record)
    wrong = [name for name, own in files.items() if not own["error"] <= checking.LARGEST_ERROR]
    require_correct(wrong, checking.LARGEST_ERROR)


if __name__ == "__main__":
    run_main(main)
