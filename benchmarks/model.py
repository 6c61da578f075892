"""Images per second of whole models: Vim and DyVM against timm's DeiT of equal size.

    python benchmarks/model.py --runs 5 --output benchmarks/results/model-cpu.json
    python benchmarks/model.py --device cuda --precision bf16 --models S --batch 1 16 64 256

DyVM keeps 70 % of its tokens a stage and runs 80 % of its scans; the routers are set so that the
choice differs between images. On a CPU where oneDNN's products are faster than PyTorch's own
(`ops.onednn`), DeiT also runs with them, as our models do. On a GPU every model also runs in a CUDA
graph, and Vim on the mamba_ssm backend where it is installed. The logits of everything that is
timed are compared on the very batch: our models with the float32 definition, compiled forms and
graphs with the eager one; what is wrong gets no speed, and the command fails. Samples are taken in
turn and redone while other processes are busy; with --runs a speed is the median of several such
runs, and the spread of the ratios over the runs is shown. The gain of DyVM over the dense model is
shown beside the gain in operations (`exact` convention, at the gates of this very batch), and the
share of it reached.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models  # noqa: F401  (registers them)
from benchmarks import checking, flags, hotspots, records
from benchmarks.checking import CHECKED, require_correct
from benchmarks.flags import PRECISIONS
from benchmarks.memory import mebibytes, peak_memory
from benchmarks.rivals import products_differ, with_our_products
from models import DynamicVisionMamba
from models.flops import count_flops
from ops import selective_scan
from ops.cuda_graphs import capture
from utils import arguments
from utils.errors import first_line
from utils.files import write_json
from utils.precision import autocast
from utils.program import run_main
from utils.tables import text_table
from utils.timing import interleaved

SIZES = {"T": "tiny", "S": "small", "B": "base"}
TOKEN_KEEP, BLOCK_KEEP = 0.7, 0.8
CALIBRATION = 20  # images on which the routers are set
# Largest error of the logits, of their largest. Measured on a CPU: 2.6e-6 in fp32, 2.7e-2 in bf16,
# 2.8e-3 in fp16, and 0.4 or more for a scan without recurrence or one that walks the wrong way.
TOLERANCES = {"fp32": 2e-5, "bf16": 1e-1, "fp16": 2e-2}
# Images [B, 3, H, W] -> logits [B, classes], or a Result that has them.
Forward = Callable[[Tensor], Any]


def image_size(text: str) -> int:
    """A positive multiple of the patches' 16 pixels."""
    size = arguments.positive(text)
    if size % 16:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 16, the size of a patch")
    return size


def parse_args() -> argparse.Namespace:
    parser = flags.build_parser("model.py", __doc__)
    parser.add_argument("--models", nargs="+", choices=SIZES, help="default: S T, and B on a GPU")
    parser.add_argument(
        "--batch", nargs="+", type=arguments.positive, help="default: 1 16 64 256 on a GPU, else 16"
    )
    parser.add_argument("--img-size", type=image_size, default=224)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="DeiT compiled too (default: on a GPU)",
    )
    parser.add_argument(
        "--runs", type=arguments.positive, default=1, help="each of --seconds; default: 1"
    )
    flags.add_profile(parser)
    flags.add_precision(parser)
    flags.add_seconds(parser, 20.0)
    flags.add_retries(parser, 10)
    args = flags.parse(parser)
    on_gpu = args.device == "cuda"
    args.models = args.models or (["S", "T", "B"] if on_gpu else ["S", "T"])
    args.batch = args.batch or ([1, 16, 64, 256] if on_gpu else [16])
    args.compile = on_gpu if args.compile is None else args.compile
    return args


def random_images(count: int, size: int, device: str) -> Tensor:
    """[count, 3, size, size] that differ in large structures, so that class tokens differ too."""
    coarse = F.interpolate(torch.randn(count, 3, 7, 7), size=(size, size), mode="bilinear")
    return (coarse + 0.3 * torch.randn(count, 3, size, size)).to(device)


@torch.no_grad()
def set_routers(model: DynamicVisionMamba, images: Tensor, keep: float) -> None:
    """Set every router so that each direction runs for a share `keep` of `images`, chosen by the
    images.

    The first layer's class token has seen no patch yet: there all scans run.
    """

    def calibrate(router: nn.Linear, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        ordered, dropped = logits.sort(dim=0).values, round((1 - keep) * len(logits))
        threshold = (ordered[dropped - 1] + ordered[dropped]) / 2
        alike = (ordered[-1] - ordered[0]) <= 1e-4 * ordered.abs().amax(dim=0)
        router.bias.copy_(torch.where(alike, ordered[0] - 1, threshold).neg())
        return logits + router.bias

    routers = [layer.mixer.block_head for layer in model.layers]
    for router in routers:
        nn.init.normal_(router.weight, std=1.0)
        nn.init.zeros_(router.bias)
    handles = [router.register_forward_hook(calibrate) for router in routers]
    model.eval()(images)
    for handle in handles:
        handle.remove()


def build(size: str, args: argparse.Namespace) -> dict[str, nn.Module]:
    """DeiT, Vim and DyVM of one size; DyVM has Vim's weights, which are random."""
    torch.manual_seed(0)
    name, shape = SIZES[size], dict(img_size=args.img_size)
    deit = timm.create_model(f"deit_{name}_patch16_224", **shape)
    vim = timm.create_model(f"vim_{name}", **shape)
    checking.set_telling_weights(vim)
    dyvm = timm.create_model(f"dyvm_vim_{name}", token_keep=TOKEN_KEEP, **shape)
    dyvm.load_state_dict(vim.state_dict(), strict=False)
    found = {f"DeiT-{size}": deit, f"Vim-{size}": vim, f"DyVM-{size}": dyvm}
    for model in found.values():
        model.to(args.device).eval().requires_grad_(False)
    set_routers(dyvm, random_images(CALIBRATION, args.img_size, args.device), BLOCK_KEEP)
    return found


def forward(
    model: Callable[[Tensor], Any], args: argparse.Namespace, chosen: str | None, images: Tensor
) -> Any:
    with checking.backend(chosen), autocast(args.device, args.precision):
        return model(images)


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


class Selection:
    """Contenders for one batch of images: those whose logits are right go on to be timed, the
    others are told.
    """

    def __init__(self, images: Tensor, tolerance: float):
        self.images, self.tolerance = images, tolerance
        self.functions: dict[str, Forward] = {}
        self.errors: dict[str, float] = {}

    def offer(self, name: str, function: Forward, error: Callable[[], float]) -> None:
        self.errors[name] = error()
        if self.errors[name] <= self.tolerance:
            self.functions[name] = function
        else:
            print(
                f"no speed: the logits of {name} at batch {len(self.images)} are wrong by "
                f"{self.errors[name]:.1e}, "
                f"allowed is {self.tolerance}",
                file=sys.stderr,
            )

    def offer_variant(self, name: str, variant: str, make: Callable[[Forward], Forward]) -> None:
        """Offer another form of a contender that is right; it must give the same logits. Left out
        where it fails.
        """
        function = self.functions[name]
        try:
            # A graph can record no compilation, and should record no casts of weights.
            function(self.images)
            made = make(function)
            self.offer(
                f"{name}, {variant}",
                made,
                lambda: checking.relative_error(
                    logits_of(made(self.images)), logits_of(function(self.images))
                ),
            )
        except RuntimeError as error:
            print(f"left out: {name}, {variant} ({first_line(error)})", file=sys.stderr)

    @property
    def wrong(self) -> list[str]:
        return [name for name in self.errors if name not in self.functions]


def select(
    found: dict[str, nn.Module], size: str, images: Tensor, chosen: str, args: argparse.Namespace
) -> Selection:
    """Everything that runs here and computes what it should, on the very batch that is timed.

    Our models are compared with the float32 definition, DeiT with itself in float32, other forms
    with the eager one.
    """
    selection = Selection(images, TOLERANCES[args.precision])

    def offer_ours(name: str, model: nn.Module, backend: str) -> None:
        selection.offer(
            name,
            partial(forward, model, args, backend),
            lambda: checking.logits_error(
                model, images, backend, autocast(args.device, args.precision)
            ),
        )

    deit = found[f"DeiT-{size}"]
    function = partial(forward, deit, args, None)
    selection.offer(
        f"DeiT-{size}",
        function,
        lambda: checking.relative_error(function(images)[:CHECKED], deit(images[:CHECKED])),
    )
    for name in (f"Vim-{size}", f"DyVM-{size}"):
        offer_ours(name, found[name], chosen)
    if chosen != "mamba_ssm" and selective_scan.runs_on("mamba_ssm", args.device):
        offer_ours(f"Vim-{size}, mamba_ssm", found[f"Vim-{size}"], "mamba_ssm")
    if products_differ(args.device) and f"DeiT-{size}" in selection.functions:
        selection.offer_variant(
            f"DeiT-{size}",
            "oneDNN",
            lambda _: partial(forward, with_our_products(deit), args, None),
        )
    if args.compile and f"DeiT-{size}" in selection.functions:
        selection.offer_variant(
            f"DeiT-{size}",
            "compiled",
            lambda _: partial(forward, torch.compile(deit, dynamic=False), args, None),
        )
    if args.device == "cuda":
        for name in list(selection.functions):
            selection.offer_variant(name, "graph", partial(capture, images=images))
    return selection


def measure(
    found: dict[str, nn.Module], size: str, batch: int, chosen: str, args: argparse.Namespace
) -> dict:
    """One table: {"models": {name: speeds}, "errors", and what `dynamic_gain` tells}; only models
    that are right.
    """
    images = random_images(batch, args.img_size, args.device)
    with torch.inference_mode():
        selection = select(found, size, images, chosen, args)
        calls = {name: partial(function, images) for name, function in selection.functions.items()}
        for call in calls.values():
            call()
        memory = {
            name: peak_memory(call, args.device)
            for name, call in calls.items()
            if not name.endswith("graph")
        }
        runs = [
            interleaved(calls, args.device, 5, args.seconds, args.retries) for _ in range(args.runs)
        ]
        times = {name: median_of([run[name] for run in runs]) for name in calls}
        part = {
            "size": size,
            "batch": batch,
            "errors": selection.errors,
            "wrong": selection.wrong,
            "models": {
                name: {"images_per_s": 1e3 * batch / t["ms"], "peak_bytes": memory.get(name), **t}
                for name, t in times.items()
            },
        }
        base = f"DeiT-{size}"
        if base in calls:
            part["x DeiT eager"] = {
                name: [run[base]["ms"] / run[name]["ms"] for run in runs] for name in calls
            }
        if args.profile:
            part["hotspots"] = {
                name: hotspots.hotspots(calls[name], args.device) for name in found if name in calls
            }
        if {f"Vim-{size}", f"DyVM-{size}"} <= calls.keys():
            gates = (
                forward(found[f"DyVM-{size}"], args, chosen, images).gates.float().mean(dim=1).cpu()
            )
            part |= dynamic_gain(found, size, part["models"], gates)
    return part


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The times of one call over several runs as those of one: medians, and counts in all."""
    return {
        key: sum(run[key] for run in runs)
        if key in ("samples", "disturbed")
        else statistics.median(run[key] for run in runs)
        for key in runs[0]
    }


def dynamic_gain(
    found: dict[str, nn.Module], size: str, rows: dict[str, dict], gates: Tensor
) -> dict[str, float]:
    """DyVM against Vim, in a graph where there is one: the speed, the operations at `gates`, the
    share reached.
    """
    dense, dynamic = f"Vim-{size}", f"DyVM-{size}"
    operations = count_flops(found[dense]).exact / count_flops(found[dynamic], gates).exact
    if f"{dense}, graph" in rows and f"{dynamic}, graph" in rows:
        dense, dynamic = f"{dense}, graph", f"{dynamic}, graph"
    ratios = {kind: rows[dense][kind] / rows[dynamic][kind] for kind in ("ms", "cpu_ms")}
    return {
        "gates": gates.mean().item(),
        "flops_ratio": operations,
        "speed_ratio": ratios["ms"],
        "share": ratios["ms"] / operations,
        "cpu_time_ratio": ratios["cpu_ms"],
        "cpu_time_share": ratios["cpu_ms"] / operations,
    }


def table(part: dict) -> str:
    rivals = [row for name, row in part["models"].items() if name.startswith("DeiT")]
    fastest = min((row["ms"] for row in rivals), default=float("nan"))
    base = part["models"].get(f"DeiT-{part['size']}", {"cpu_ms": float("nan")})
    ratios = part.get("x DeiT eager", {})
    rows = [
        [
            name,
            f"{row['images_per_s']:.1f}",
            f"{statistics.median(ratios.get(name, [float('nan')])):.2f}",
            f"{fastest / row['ms']:.2f}",
            f"{base['cpu_ms'] / row['cpu_ms']:.2f}",
            mebibytes(row["peak_bytes"]),
            row["samples"],
            row["disturbed"],
            f"{part['errors'][name]:.1e}",
        ]
        for name, row in part["models"].items()
    ]
    headers = [
        "",
        "images/s",
        "x DeiT eager",
        "x best DeiT",
        "x in processor time",
        "peak MiB",
        "samples",
        "disturbed",
        "error",
    ]
    if any(len(runs) > 1 for runs in ratios.values()):
        headers.insert(3, "in runs")
        for row in rows:
            row.insert(3, f"{min(ratios[row[0]]):.2f} to {max(ratios[row[0]]):.2f}")
    lines = [f"batch {part['batch']}", text_table(rows, headers)]
    if "share" in part:
        lines.append(
            f"dynamic against dense: {part['speed_ratio']:.3f} times as fast (processor time "
            f"{part['cpu_time_ratio']:.3f}), {part['flops_ratio']:.3f} by `exact` operations at "
            f"{100 * part['gates']:.1f} % of the scans; {100 * part['share']:.0f} % of it reached "
            f"({100 * part['cpu_time_share']:.0f} % in processor time)"
        )
    return "\n".join([*lines, *hotspots.lines(part)])


def main() -> None:
    args = parse_args()
    record: dict[str, Any] = {
        **records.head("model.py", args.device),
        "precision": args.precision,
        "img_size": args.img_size,
        "token_keep_ratio": TOKEN_KEEP,
        "block_keep_ratio": BLOCK_KEEP,
        "parts": [],
    }
    for size in args.models:
        found = build(size, args)
        mixer = found[f"Vim-{size}"].layers[0].mixer
        xz = torch.zeros(
            1, 1, mixer.in_proj.out_features, device=args.device, dtype=PRECISIONS[args.precision]
        )
        chosen = record["backend"] = selective_scan.backend_for(xz, mixer.branch(False))
        print(
            f"\n{record['device']}, {record['threads']} threads, {args.precision}, "
            f"{args.img_size} pixels, "
            f"backend {chosen}"
        )
        for batch in args.batch:
            record["parts"].append(measure(found, size, batch, chosen, args))
            print(table(record["parts"][-1]), flush=True)
            if args.output:
                write_json(args.output, record)
    wrong = [
        f"{name} at batch {part['batch']}" for part in record["parts"] for name in part["wrong"]
    ]
    require_correct(wrong, TOLERANCES[args.precision])


if __name__ == "__main__":
    run_main(main)
