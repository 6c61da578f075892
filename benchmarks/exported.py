"""Exported models against eager PyTorch, and against DeiT exported the same way.

    python benchmarks/exported.py --batch 1 16 --output benchmarks/results/exported-cpu.json
    python benchmarks/exported.py --format aoti --output benchmarks/results/aoti-cpu.json

DeiT, Vim and DyVM of one size with random weights, DyVM with routers that differ between images, in
ONNX Runtime or compiled by AOTInductor. Each is exported once; its logits are compared with the
eager model's, on images whose answers do not depend on rounding; what is wrong is not timed, and
the command fails. ONNX files with 8-bit weights are timed too; their error is reported and is no
reason to fail. Samples are taken in turn.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import flags, records
from benchmarks.checking import require_correct
from benchmarks.model import SIZES, build, dynamic_gain, image_size, logits_of, random_images
from exporting import checking, program
from models import VisionMamba
from utils import arguments
from utils.files import write_json
from utils.program import run_main
from utils.tables import text_table
from utils.timing import interleaved

OPSET = 18
RUNTIME, INT8, COMPILED = ", ONNX Runtime", ", ONNX Runtime, int8", ", AOTInductor"
KINDS = {"onnx": (RUNTIME, INT8), "aoti": (COMPILED,)}  # the first may not differ from the model
PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "aoti": ()}


def parse_args() -> argparse.Namespace:
    parser = flags.build_parser("exported.py", __doc__)
    parser.add_argument("--format", choices=KINDS, default="onnx")
    parser.add_argument("--model", choices=SIZES, default="T")
    parser.add_argument("--batch", nargs="+", type=arguments.positive, default=[1, 16])
    parser.add_argument("--img-size", type=image_size, default=224)
    flags.add_seconds(parser, 20.0)
    flags.add_retries(parser, 10)
    args = flags.parse(parser)
    args.device = "cpu"
    return args


@dataclass
class Exported:
    """A file in its runtime."""

    run: Callable[[Tensor], Tensor] = field(repr=False)
    megabytes: float
    load_s: float
    error: float = float("nan")  # of the logits, of their largest


def traced(model: nn.Module, size: int, scan: str) -> torch.export.ExportedProgram:
    if isinstance(model, VisionMamba):
        return program.decompose(program.trace(model, scan), onnx=scan == "portable")
    batch = torch.export.Dim("batch", min=1, max=program.LARGEST_BATCH)
    images = torch.randn(program.TRACED, 3, size, size)
    return torch.export.export(model, (images,), dynamic_shapes=({0: batch},))


def loaded(path: Path, load: Callable[[Path], Callable[[Tensor], Tensor]]) -> Exported:
    begin = time.perf_counter()
    run = load(path)
    return Exported(run, path.stat().st_size / 1e6, time.perf_counter() - begin)


def in_onnx_runtime(model: nn.Module, size: int, path: Path) -> dict[str, Exported]:
    import onnx

    from exporting.onnx_file import to_onnx, with_int8_weights
    from exporting.onnx_model import open_session, run

    def load(path: Path) -> Callable[[Tensor], Tensor]:
        return partial(run, open_session(path))

    files = {RUNTIME: to_onnx(traced(model, size, "portable"), OPSET, {})}
    files[INT8] = with_int8_weights(files[RUNTIME])
    found = {}
    for kind, file in files.items():
        onnx.save(file, path)
        found[kind] = loaded(path, load)
    return found


def by_aotinductor(model: nn.Module, size: int, path: Path) -> dict[str, Exported]:
    from exporting import package

    path = path.with_suffix(".pt2")
    package.to_package(traced(model, size, "native"), {}, path)
    return {COMPILED: loaded(path, package.open_package)}


EXPORTS = {"onnx": in_onnx_runtime, "aoti": by_aotinductor}


def decide(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give predictors weights that tell tokens apart: a new model's are ties but for rounding."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights:
        if "score_predictors" in name and weight.dim() == 2:
            # Larger ones saturate the scores of wide models, which are ties again.
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)


@torch.no_grad()
def exported(found: dict[str, nn.Module], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """{name: {"export_s", "programs": {kind: Exported}}} of the models."""
    files = {}
    images = random_images(checking.CANDIDATES, args.img_size, "cpu")
    for name, model in found.items():
        print(f"exporting {name}", file=sys.stderr)
        decide(model.named_parameters())
        begin = time.perf_counter()
        programs = EXPORTS[args.format](model, args.img_size, folder / f"{name}.onnx")
        files[name] = {"export_s": time.perf_counter() - begin, "programs": programs}
        for each in programs.values():
            if isinstance(model, VisionMamba):
                each.error = checking.compare(model, each.run, images).error
            else:
                each.error = checking.relative(each.run(images), model(images)).max().item()
    return files


def is_right(file: dict[str, Any], fmt: str) -> bool:
    return file["programs"][KINDS[fmt][0]].error <= checking.LARGEST_ERROR


def measure(
    found: dict[str, nn.Module], files: dict[str, Any], batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Speeds at one batch size, of all that is right."""
    images = random_images(batch, args.img_size, "cpu")
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in found.items():
        if is_right(files[name], args.format):
            calls[name] = lambda model=model: logits_of(model(images))
            for kind, each in files[name]["programs"].items():
                calls[name + kind] = partial(each.run, images)
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
        own = {name: times[name + KINDS[args.format][0]] for name in (dense, dynamic)}
        part["gain"] = dynamic_gain(found, args.model, own, gates)
    return part


def table(part: dict[str, Any], files: dict[str, Any], args: argparse.Namespace) -> str:
    kind = KINDS[args.format][0]
    base = part["models"].get(f"DeiT-{args.model}{kind}", {"ms": float("nan")})["ms"]
    rows = []
    for name, row in part["models"].items():
        model = name.partition(",")[0]
        own = files[model]["programs"].get(name.removeprefix(model))
        rows.append(
            [
                *(name, f"{row['images_per_s']:.1f}", f"{base / row['ms']:.2f}"),
                *(("", "") if own is None else (f"{own.megabytes:.1f}", f"{own.error:.1e}")),
                *(row["samples"], row["disturbed"]),
            ]
        )
    headers = ["", "images/s", f"x DeiT{kind}", "MB", "error", "samples", "disturbed"]
    lines = [f"batch {part['batch']}", text_table(rows, headers)]
    if "gain" in part:
        gain = part["gain"]
        lines.append(
            f"dynamic against dense{kind}: {gain['speed_ratio']:.3f} times as fast, "
            f"{gain['flops_ratio']:.3f} by `exact` operations at {100 * gain['gates']:.1f} % of "
            f"the scans; {100 * gain['share']:.0f} % of it reached"
        )
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    record = records.head("exported.py", "cpu", *PACKAGES[args.format])
    print(f"{record['device']}, {record['threads']} threads, {args.img_size} pixels")
    found = build(args.model, argparse.Namespace(**vars(args), precision="fp32"))
    with TemporaryDirectory() as folder:
        files = exported(found, args, Path(folder))
        parts = []
        for batch in args.batch:
            parts.append(measure(found, files, batch, args))
            print(table(parts[-1], files, args))
    record |= {"img_size": args.img_size, "format": args.format, "parts": parts}
    if args.format == "onnx":
        record["opset"] = OPSET
    record["files"] = {
        name: {
            "export_s": own["export_s"],
            "programs": {
                kind.removeprefix(", "): {
                    "megabytes": e.megabytes,
                    "load_s": e.load_s,
                    "error": e.error,
                }
                for kind, e in own["programs"].items()
            },
        }
        for name, own in files.items()
    }
    if args.output:
        write_json(args.output, record)
    wrong = [name for name, own in files.items() if not is_right(own, args.format)]
    require_correct(wrong, checking.LARGEST_ERROR)


if __name__ == "__main__":
    run_main(main)
