"""Flags shared by benchmarks. A wrong one raises UsageError at once: one line, exit code 2."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from models import model_names
from utils import arguments
from utils.errors import UsageError
from utils.precision import AMP_DTYPES, bf16_refusal

PRECISIONS = {"fp32": torch.float32, **AMP_DTYPES}


def device(text: str) -> str:
    """`cpu`, or `cuda` if there is a GPU."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda: PyTorch sees no CUDA device here; give cpu")
    return text


def record_file(text: str) -> Path:
    """A file in an existing folder."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    return path


def dense_model_name(text: str) -> str:
    """The name of a registered dense model."""
    if text not in model_names():
        raise argparse.ArgumentTypeError(
            f"{text!r} is unknown; known are {', '.join(model_names())}"
        )
    if text.startswith("dyvm_"):
        raise argparse.ArgumentTypeError(f"{text} is dynamic; give {text.removeprefix('dyvm_')}")
    return text


def build_parser(script: str, description: str) -> arguments.OneLineParser:
    """A parser with the flags that all benchmarks have: --device, --threads, --output."""
    parser = arguments.OneLineParser(
        prog=f"benchmarks/{script}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="{cpu,cuda}",
        help="default: a GPU if there is one",
    )
    parser.add_argument(
        "--threads",
        type=arguments.positive,
        help="of PyTorch; on a busy machine 1, and read the processor time",
    )
    parser.add_argument(
        "--output", type=record_file, metavar="FILE", help="write the record as JSON"
    )
    return parser


def add_precision(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=default,
        help=f"default: {default or 'bf16 on a GPU (fp16 where it has none), else fp32'}",
    )


def add_rounds(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--rounds",
        type=arguments.positive,
        default=default,
        help=f"samples of each contender, default: {default}",
    )


def add_seconds(parser: argparse.ArgumentParser, default: float) -> None:
    parser.add_argument(
        "--seconds",
        type=arguments.not_negative,
        default=default,
        help=f"of sampling for each table, default: {default:g}",
    )


def add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        action="store_true",
        help="on a GPU: list the kernels that take most of the time",
    )


def add_retries(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--retries",
        type=arguments.whole,
        default=default,
        help=f"disturbed samples to redo, for each contender, default: {default}",
    )


def parse(
    parser: argparse.ArgumentParser, words: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line or `words`, settle the precision and set up PyTorch."""
    args = parser.parse_args(words)
    if "profile" in args and args.profile and args.device != "cuda":
        raise UsageError(
            "--profile needs --device cuda: PyTorch's profiler does not see the C++ kernels of a "
            "CPU"
        )
    if "precision" in args and args.precision is None:
        half = "bf16" if bf16_refusal(torch.device(args.device)) is None else "fp16"
        args.precision = half if args.device == "cuda" else "fp32"
    torch.backends.cudnn.allow_tf32 = False  # fp32 in convolutions too, as in matrix products
    if args.threads:
        torch.set_num_threads(args.threads)
    return args
