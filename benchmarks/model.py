"""Images per second of whole models: Vim and DyVM against timm's DeiT of equal size.

    python benchmarks/model.py --output benchmarks/results/model-cpu.json
    python benchmarks/model.py --device cuda --precision bf16 --models S --batch 1 16 64 256

DyVM keeps 70 % of its tokens a stage and runs 80 % of its scans; the routers are set so that the choice differs between
images. Every model's logits are compared with the float32 definition in the same run; one that is wrong gets no speed,
and the command fails. On a GPU every model also runs in a CUDA graph, and Vim on the mamba_ssm backend where it is
installed. Samples are taken in turn and redone while other processes are busy. The gain of DyVM over the dense model is
shown beside the gain in operations (`exact` convention, at the gates of this very batch), and the share of it reached.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

import timm
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models  # noqa: F401  (registers them)
from benchmarks import checking, timing
from benchmarks.ops import PRECISIONS
from evaluation import device_name
from models import DynamicVisionMamba
from models.flops import count_flops
from ops import selective_scan
from utils.environment import describe_environment

SIZES = {"T": "tiny", "S": "small", "B": "base"}
TOKEN_KEEP, BLOCK_KEEP = 0.7, 0.8
CALIBRATION = 20  # images on which the routers are set
CHECKED = 2  # images compared with the definition
# Largest error of the logits, of their largest: 24 blocks of float32 sums; otherwise roundings of 2^-8 and 2^-11.
TOLERANCES = {"fp32": 1e-3, "bf16": 1e-1, "fp16": 2e-2}
Call = Callable[[], object]


def parse_common(parser: argparse.ArgumentParser, seconds: float) -> argparse.Namespace:
    """Parse with the flags that all benchmarks of models have; `seconds` is the default time of sampling."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--threads", type=int, help="of PyTorch; on a busy machine 1, and read the processor time")
    parser.add_argument("--seconds", type=float, default=seconds, help="of sampling for each table")
    parser.add_argument("--retries", type=int, default=10, help="disturbed samples to redo, for each contender")
    parser.add_argument("--output", type=Path, help="write the record as JSON, after every table")
    args = parser.parse_args()
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["S", "T"], choices=SIZES, help="sizes")
    parser.add_argument("--batch", nargs="+", type=int, help="default: 1 16 64 256 on a GPU, else 16")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="DeiT compiled too (default: on a GPU)")
    args = parse_common(parser, seconds=20.0)
    on_gpu = args.device == "cuda"
    args.batch = args.batch or ([1, 16, 64, 256] if on_gpu else [16])
    args.compile = on_gpu if args.compile is None else args.compile
    return args


def random_images(count: int, size: int, device: str) -> Tensor:
    """[count, 3, size, size] that differ in large structures, so that class tokens differ too."""
    coarse = F.interpolate(torch.randn(count, 3, 7, 7), size=(size, size), mode="bilinear")
    return (coarse + 0.3 * torch.randn(count, 3, size, size)).to(device)


@torch.no_grad()
def set_routers(model: DynamicVisionMamba, images: Tensor, keep: float) -> None:
    """Set every router so that each direction runs for a share `keep` of `images`, chosen by the images.

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
    """DeiT, Vim and DyVM of one size; DyVM has Vim's weights."""
    torch.manual_seed(0)
    name, shape = SIZES[size], dict(img_size=args.img_size)
    deit = timm.create_model(f"deit_{name}_patch16_224", **shape)
    vim = timm.create_model(f"vim_{name}", **shape)
    dyvm = timm.create_model(f"dyvm_vim_{name}", token_keep=TOKEN_KEEP, **shape)
    dyvm.load_state_dict(vim.state_dict(), strict=False)
    found = {f"DeiT-{size}": deit, f"Vim-{size}": vim, f"DyVM-{size}": dyvm}
    for model in found.values():
        model.to(args.device).eval().requires_grad_(False)
    set_routers(dyvm, random_images(CALIBRATION, args.img_size, args.device), BLOCK_KEEP)
    return found


def precision(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, dtype=PRECISIONS[args.precision], enabled=args.precision != "fp32")


def forward(model: Callable[[Tensor], Any], args: argparse.Namespace, chosen: Optional[str], images: Tensor) -> Any:
    with checking.backend(chosen), precision(args):
        return model(images)


def contenders(found: dict[str, nn.Module], size: str, images: Tensor, chosen: str,
               args: argparse.Namespace) -> dict[str, Call]:
    """Name -> forward pass of `images`, of those that run here."""
    functions = {name: partial(forward, model, args, chosen) for name, model in found.items()}
    if args.compile:
        compiled = torch.compile(found[f"DeiT-{size}"], dynamic=False)
        functions[f"DeiT-{size}, compiled"] = partial(forward, compiled, args, None)
    if args.device == "cuda":
        if chosen != "mamba_ssm" and selective_scan.runs_on("mamba_ssm", args.device):
            functions[f"Vim-{size}, mamba_ssm"] = partial(forward, found[f"Vim-{size}"], args, "mamba_ssm")
        for name in list(functions):
            functions[name](images)  # what tunes or compiles itself does so outside the graph
            try:
                functions[f"{name}, graph"] = _captured(functions[name], images)
            except RuntimeError as error:
                print(f"left out: {name} in a CUDA graph ({str(error).splitlines()[0]})", file=sys.stderr)
    return {name: partial(function, images) for name, function in functions.items()}


def _captured(function: Callable[[Tensor], Any], images: Tensor) -> Callable[[Tensor], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(images)
    return lambda images: graph.replay()


def peak_memory(call: Call) -> int:
    """Bytes that a call needs beyond what is there before it, on the GPU."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def measure(found: dict[str, nn.Module], size: str, batch: int, chosen: str, args: argparse.Namespace) -> dict:
    """One table: {"models": {name: speeds}, "gates", "flops_ratio", "speed_ratio", "share"}."""
    images = random_images(batch, args.img_size, args.device)
    with torch.inference_mode():
        calls = contenders(found, size, images, chosen, args)
        for call in calls.values():
            call()
        memory = {name: peak_memory(call) for name, call in calls.items()
                  if args.device == "cuda" and not name.endswith("graph")}
        rounds = max(5, int(args.seconds / sum(timing.sample(call, args.device)[0] for call in calls.values())))
        times = timing.interleaved(calls, args.device, rounds, args.retries, long=float("inf"))
        gates = forward(found[f"DyVM-{size}"], args, chosen, images).gates.float().mean(dim=1).cpu()
    rows = {name: {"images_per_s": 1e3 * batch / t["ms"], "peak_mib": memory[name] / 2**20 if name in memory else None,
                   **t} for name, t in times.items()}
    dense, dynamic = f"Vim-{size}", f"DyVM-{size}"
    if f"{dense}, graph" in rows and f"{dynamic}, graph" in rows:
        dense, dynamic = f"{dense}, graph", f"{dynamic}, graph"
    operations = count_flops(found[f"Vim-{size}"]).exact / count_flops(found[f"DyVM-{size}"], gates).exact
    ratios = {kind: rows[dense][kind] / rows[dynamic][kind] for kind in ("ms", "cpu_ms")}
    return {"size": size, "batch": batch, "models": rows, "gates": gates.mean().item(), "flops_ratio": operations,
            "speed_ratio": ratios["ms"], "share": ratios["ms"] / operations,
            "cpu_time_ratio": ratios["cpu_ms"], "cpu_time_share": ratios["cpu_ms"] / operations}


def check(found: dict[str, nn.Module], chosen: str, args: argparse.Namespace) -> dict[str, float]:
    """Errors of our models on the chosen backend in the chosen precision, against the float32 definition."""
    images = random_images(CHECKED, args.img_size, args.device)
    return {name: checking.logits_error(model, images, chosen, precision(args)) for name, model in found.items()
            if not name.startswith("DeiT")}


def table(part: dict) -> str:
    rivals = {name: row for name, row in part["models"].items() if name.startswith("DeiT")}
    fastest = min(rivals.values(), key=lambda row: row["ms"])
    base = rivals[f"DeiT-{part['size']}"]
    rows = [[name, f"{row['images_per_s']:.1f}", f"{base['ms'] / row['ms']:.2f}", f"{fastest['ms'] / row['ms']:.2f}",
             f"{base['cpu_ms'] / row['cpu_ms']:.2f}", "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
             row["samples"], row["disturbed"]] for name, row in part["models"].items()]
    headers = ["", "images/s", "x DeiT eager", "x best DeiT", "x in processor time", "peak MiB", "samples", "disturbed"]
    return "\n".join([
        f"batch {part['batch']}",
        tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 7)),
        f"dynamic against dense: {part['speed_ratio']:.3f} times as fast (processor time "
        f"{part['cpu_time_ratio']:.3f}), {part['flops_ratio']:.3f} by `exact` operations at "
        f"{100 * part['gates']:.1f} % of the scans; "
        f"{100 * part['share']:.0f} % of it reached ({100 * part['cpu_time_share']:.0f} % in processor time)"])


def main() -> None:
    args = parse_args()
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/model.py", *sys.argv[1:]]), "device":
        device_name(torch.device(args.device)), "precision": args.precision, "img_size": args.img_size,
        "token_keep_ratio": TOKEN_KEEP, "block_keep_ratio": BLOCK_KEEP, "environment": describe_environment(),
        "errors": {}, "parts": []}
    wrong = []
    for size in args.models:
        found = build(size, args)
        mixer = found[f"Vim-{size}"].layers[0].mixer
        xz = torch.zeros(1, 1, mixer.in_proj.out_features, device=args.device, dtype=PRECISIONS[args.precision])
        chosen = record["backend"] = selective_scan.backend_for(xz, mixer.branch(False))
        errors = check(found, chosen, args)
        record["errors"] |= errors
        print(f"\n{record['device']}, {args.precision}, {args.img_size} pixels, backend {chosen}; largest error "
              "against the float32 definition: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
        bad = [name for name, error in errors.items() if not error <= TOLERANCES[args.precision]]
        wrong += bad
        for batch in args.batch if not bad else ():
            record["parts"].append(measure(found, size, batch, chosen, args))
            print(table(record["parts"][-1]), flush=True)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(record, indent=1) + "\n")
    if wrong:
        raise SystemExit(f"error: no speed without correctness: {', '.join(wrong)} beyond {TOLERANCES[args.precision]}")


if __name__ == "__main__":
    main()
