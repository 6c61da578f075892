"""Write a checkpoint's model as a file that other programs run.

    python export.py --model-path output/dyvm/best_checkpoint.pth --output dyvm.onnx
    python export.py --model-path output/dyvm/best_checkpoint.pth --output small.onnx --int8
    python export.py --model-path output/dyvm/best_checkpoint.pth --format torch --output dyvm.pt2
    python export.py --model-path output/dyvm/best_checkpoint.pth --format aoti --output dyvm.pt2
    python predict.py --model-path dyvm.onnx photo.jpg

The file takes normalised images [batch, 3, height, width] of the model's size, any number of them,
and returns logits. Tokens that are dropped are gone in it, and a scan that no image of a batch
wants is not run. It holds standard operators alone, but for --format aoti: a program that was
compiled for this kind of CPU, for C++ (examples/aoti), with a library of the scan beside it. Before
a file is kept, its answers are compared with the checkpoint's; of --int8 the difference is
reported. Classes, normalisation, size and budget are in its metadata.
"""

from utils.startup import prepare, require

prepare()

import argparse
import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from evaluation.inference import add_checkpoint_arguments, load_predictor
from exporting.checking import Agreement, compare, require_agreement
from exporting.program import decompose, trace
from exporting.record import readable, record_of
from loading.transforms import MEAN, STD
from models import VisionMamba
from models.options import add_model_arguments
from utils import arguments
from utils.errors import UsageError
from utils.files import atomic_file, prepare_output_dir, remove_temporaries, sha256_of
from utils.program import run_main

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".pt2"}
# Time of the other steps, in multiples of the tracing.
LEFT = {"onnx": 1.6, "torch": 0.7, "aoti": 16}
_logger = logging.getLogger("export")


def build_parser() -> arguments.OneLineParser:
    parser = arguments.OneLineParser(
        prog="export.py",
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
        formatter_class=arguments.HelpFormatter,
    )
    group = parser.add_argument_group("file")
    group.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="what to write, or to replace; its ending is .onnx, or .pt2 for --format torch and "
        "aoti",
    )
    group.add_argument(
        "--format",
        choices=tuple(SUFFIXES),
        default="onnx",
        help="onnx: for ONNX Runtime and others; torch: for torch.export.load where this project "
        "is not installed; run as it is, that is far slower, it is meant for a compiler; aoti: "
        "compiled by AOTInductor for this kind of CPU, for C++ and Python",
    )
    group.add_argument(
        "--opset", type=arguments.positive, metavar="N", help="of ONNX, 18 to 21 (default: 18)"
    )
    group.add_argument(
        "--int8",
        action="store_true",
        help="ONNX: weights of the products in 8 bits, and what they are multiplied by rounded at "
        "run time; smaller, and less exact",
    )
    add_checkpoint_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(device="cpu", amp="off")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that do not go together, UserError for a folder that cannot be
    written to, before any work.
    """
    if args.token_budget == "image":
        raise UsageError(
            "--token-budget image: an exported model keeps the same number of tokens of every "
            "image; leave it out"
        )
    output = Path(args.output)
    if output.suffix != SUFFIXES[args.format]:
        raise UsageError(
            f"--output {output}: a file of --format {args.format} ends with {SUFFIXES[args.format]}"
        )
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}")
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder; name a file")
    if args.format == "aoti":
        from exporting.package import library_of

        library = library_of(output)
        if library.is_dir() or (library.exists() and not output.exists()):
            kind = "a folder" if library.is_dir() else "there without such a package"
            raise UsageError(
                f"--output {output}: the library of its operators would be {library}, which is "
                f"{kind}; choose another name"
            )
    prepare_output_dir(output.parent)
    if args.format == "onnx":
        require("onnx", "onnxscript", "onnxruntime")
        from exporting.onnx_file import OPSETS

        if args.opset and args.opset not in OPSETS:
            raise UsageError(f"--opset {args.opset}: give {OPSETS[0]} to {OPSETS[-1]}")
    elif args.int8 or args.opset:
        raise UsageError(f"--{'int8' if args.int8 else 'opset'} is for --format onnx")


def check_model(model: VisionMamba, args: argparse.Namespace) -> None:
    """Raise UsageError for a model that cannot become such a file."""
    if args.token_strategy == "random" and model.pruning_layers:
        raise UsageError(
            "--token-strategy random: random tokens depend on every bit of an image, which other "
            "runtimes round otherwise; export another model"
        )
    if args.format == "onnx":
        from exporting.onnx_file import MOST_BYTES

        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        if size > MOST_BYTES:
            raise UsageError(
                f"{args.model_path}: its weights take {size / 1e9:.1f} GB, an ONNX file holds "
                f"{MOST_BYTES / 1e9:.0f}; use --format torch"
            )


def write_onnx(program, args: argparse.Namespace, texts: dict[str, str], model) -> Agreement:
    """Convert, compare with the model, and write; -> how far they agree."""
    from exporting.onnx_file import OPSETS, to_onnx, with_int8_weights
    from exporting.onnx_model import OnnxModel, sealed

    _logger.info("3/4 converting to ONNX")
    converted = to_onnx(program, args.opset or OPSETS[0], texts)
    if args.int8:
        converted = with_int8_weights(converted)
    _logger.info("4/4 comparing with the checkpoint")
    with atomic_file(args.output) as file:
        file.write(sealed(converted.SerializeToString()))
        file.flush()
        written = OnnxModel(file.name)
        found = compare(model, lambda images: written(images).logits, always=args.int8)
        if not args.int8:
            require_agreement(found)
    return found


def write_torch(program, args: argparse.Namespace, texts: dict[str, str], model) -> Agreement:
    """Save, compare with the model; -> how far they agree."""
    _logger.info("3/3 comparing with the checkpoint")
    with atomic_file(args.output) as file:
        torch.export.save(program, file, extra_files=texts)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.export.load(file)
        found = compare(model, loaded.module())
        require_agreement(found)
    return found


def write_aoti(program, args: argparse.Namespace, texts: dict[str, str], model) -> Agreement:
    """Compile, compare with the model, and write with the library; -> how far they agree."""
    from exporting import package

    with TemporaryDirectory() as folder:
        compiled = Path(folder) / "model.pt2"
        _logger.info("3/4 compiling")
        package.to_package(program, texts, compiled)
        _logger.info("4/4 comparing with the checkpoint")
        found = compare(model, package.open_package(compiled))
        require_agreement(found)
        library = package.library_of(args.output)
        remove_temporaries(library)
        # Both or none: each gets its name once both are written.
        with atomic_file(library) as operators, atomic_file(args.output) as packed:
            for source, file in (package.operators(), operators), (compiled, packed):
                with open(source, "rb") as content:
                    shutil.copyfileobj(content, file)
    _logger.info("its operators are in %s", library)
    return found


WRITERS = {"onnx": write_onnx, "torch": write_torch, "aoti": write_aoti}


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    check(parser.parse_args(argv))
    predictor = load_predictor(parser, argv)
    args, model, task = predictor.args, predictor.model, predictor.task
    check_model(model, args)
    names = predictor.recorded_names, predictor.class_names
    record = record_of(model, vars(args), task, *names, sha256_of(args.model_path))
    texts = readable(record, MEAN, STD)
    remove_temporaries(Path(args.output))
    steps, scan = 3 if args.format == "torch" else 4, "portable"
    if args.format == "aoti":
        from exporting import package

        package.operators()
        scan = "native"
    _logger.info("1/%d tracing %d layers", steps, model.depth)
    begin = time.monotonic()
    program = trace(model, scan)
    spent = time.monotonic() - begin
    _logger.info("2/%d decomposing, about %.0f s left", steps, spent * LEFT[args.format])
    found = WRITERS[args.format](decompose(program, args.format == "onnx"), args, texts, model)
    size = os.path.getsize(args.output) / 1e6
    inputs = f"clips of {model.num_frames} frames of" if model.num_frames else "images of"
    print(
        f"{args.output}: {size:.1f} MB, {task.name}, {model.num_classes} classes, {inputs} "
        f"{'x'.join(map(str, model.patch_embed.img_size))} pixels; against the checkpoint: {found}"
    )


if __name__ == "__main__":
    run_main(main)
