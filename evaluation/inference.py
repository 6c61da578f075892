"""A checkpoint prepared for a user's own images: what visualize.py and predict.py share.

B images, C classes.
"""

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor

import options
from datasets import add_depth_argument, add_whole_images
from exporting.onnx_model import OnnxModel, is_onnx
from exporting.record import refuse_exported
from loading.bad_images import BadImages
from loading.class_names import read_names
from loading.depth import settle_depth
from loading.images import BadImageError, ImageSet
from loading.loaders import Batch, EvalLoader
from loading.options import DataOptions, default_workers
from models import Result, VisionMamba
from models.build import ModelSpec, is_ours, recorded_arguments, restore, token_thresholds
from models.options import add_model_arguments, check_token_budget, settle_model, settle_stage_keep
from tasks import Experiment, Task, task_of_checkpoint
from utils import arguments
from utils.checkpoint import load_checkpoint
from utils.distributed import init_distributed
from utils.errors import UsageError, UserError
from utils.logging import Progress
from utils.precision import autocast, check_amp

_logger = logging.getLogger(__name__)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group of what is taken from a checkpoint besides its model."""
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--ema", action="store_true", help="use the average of the weights")
    group.add_argument(
        "--input-size",
        type=arguments.image_size,
        metavar="N|HxW",
        help="size of the model's images (default: as trained)",
    )
    group.add_argument(
        "--class-names",
        metavar="FILE",
        help="names of the classes: one per line in their order, with an index or by folder; or "
        "JSON, a list or an object by index or by folder (default: the checkpoint's; for 1000 "
        "classes without names ImageNet's)",
    )


def build_parser(prog: str, description: str) -> arguments.OneLineParser:
    """The flags of every program that takes a checkpoint and images."""
    parser = arguments.OneLineParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=arguments.HelpFormatter,
    )
    add_checkpoint_arguments(parser)
    group = parser.add_argument_group("images")
    group.add_argument("--batch-size", type=arguments.positive, default=32)
    group.add_argument(
        "--num-workers",
        type=arguments.whole,
        default=default_workers(),
        help="processes that read images, where there is more than one batch of them",
    )
    group.add_argument("--eval-crop-ratio", type=arguments.ratio, default=0.875)
    add_whole_images(group)
    add_depth_argument(group)
    group = parser.add_argument_group("run")
    options.add_device_arguments(group)
    add_model_arguments(parser)
    return parser


class WithSize:
    """Turns a transform of an image into one of an example; its target is (height, width)."""

    def __init__(
        self, transform: Callable[[Any], Tensor], size_of: Callable[[Any], tuple[int, int]]
    ):
        self.transform, self.size_of = transform, size_of

    def __call__(self, image: Any, target: Any) -> tuple[Tensor, Tensor]:
        return self.transform(image), torch.tensor(self.size_of(image))


@dataclass
class Predictor:
    """A model in evaluation mode, with what it takes to feed it images and name its answers."""

    model: VisionMamba
    task: Task
    class_names: list[str]
    args: argparse.Namespace
    device: torch.device
    recorded_names: list[str] | None = None  # as the checkpoint has them

    @classmethod
    def of(cls, model: VisionMamba, experiment: Experiment) -> "Predictor":
        """A run's model, for images transformed like the run's data."""
        names = experiment.data.class_names
        return cls(model, experiment.task, names, experiment.args, experiment.device)

    @property
    def img_size(self) -> tuple[int, int]:
        return self.model.patch_embed.img_size

    def files(self, paths: Sequence[str]) -> ImageSet:
        """The files that a program is given, and those below the folders among them.

        Raises UserError for a folder without any.
        """
        images = self.task.files(paths)
        settle_depth([images], self.args.bit_depth, BadImageError)
        return images

    def results(
        self, images: ImageSet, bad_images: BadImages, shown: bool = True, evaluated: bool = False
    ) -> Iterator[tuple[Batch, Result]]:
        """The model's results, batch by batch; files that cannot be used go to `bad_images`.

        A batch's targets [B, 2] are the heights and widths of the files' images. With `evaluated`,
        images are transformed and batched as in an evaluation, else as for pictures of decisions.
        """
        task, batch_size = self.task, self.args.batch_size
        transform = task.image_transform(self.args, self.img_size)
        if evaluated:
            transform = task.prediction_transform(self.args, self.img_size)
            batch_size = task.eval_batch_size(self.args) or batch_size
        loader = EvalLoader(
            images,
            WithSize(transform, task.size_of),
            DataOptions(
                batch_size=batch_size,
                num_workers=self.args.num_workers if len(images) > batch_size else 0,
                pin_mem=False,
            ),
            bad_images,
        )
        batches = Progress(loader.batches(), "images", total=len(loader), shown=shown)
        for batch in batches:
            yield batch, self.forward(batch.images)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Result:
        with autocast(self.device, self.args.amp):
            return self.task.predict(self.model, images.to(self.device))


def load_predictor(
    parser: arguments.OneLineParser, argv: Sequence[str], exported: bool = False
) -> Predictor:
    """Parse flags and load `--model-path`; its recorded arguments replace the flags' defaults.

    exported: an ONNX file of export.py will do.
    """
    args = parser.parse_args(argv)
    if not args.model_path:
        parser.error("--model-path is needed, the checkpoint to use")
    refuse_exported(args.model_path, parser.prog, onnx_too=exported)
    runtime = None
    if is_onnx(args.model_path):
        runtime = OnnxModel(args.model_path)
        check_fixed(argv, args)
    checkpoint = runtime.checkpoint if runtime else load_checkpoint(args.model_path)
    task = task_of_checkpoint(checkpoint)
    if task.recorded and not is_ours(checkpoint.get("args")):
        raise UserError(
            f"{args.model_path} does not record the flags of its {task.name} model, and without "
            "them another one might be built; evaluate it with main.py --eval"
        )
    usual = build_parser("", "")
    task.add_arguments(usual)
    defaults = vars(usual.parse_args([])).items()
    parser.set_defaults(**{name: value for name, value in defaults if name not in args})
    parser.set_defaults(**recorded_arguments(checkpoint, task.recorded))
    args = parser.parse_args(argv)
    settle_stage_keep(argv, args)
    settle_model(args)
    task = task.of_run(args)
    if runtime:
        names = runtime.record["shown_names"]
        if args.class_names:
            names = class_names(args.class_names, checkpoint, len(names), args.model_path)
        return Predictor(runtime, task, names, args, torch.device("cpu"))
    count = task.num_classes(checkpoint, args.model_path)
    device = init_distributed(args.device).device
    check_amp(device, args.amp)
    model = task.model(ModelSpec.from_args(args), count)
    restore(model, checkpoint, args.model_path, ema=args.ema, threshold=args.gate_threshold)
    if args.token_budget == "image":
        restore_token_thresholds(model, checkpoint, args)
    names = class_names(args.class_names, checkpoint, count, args.model_path)
    recorded = checkpoint.get("class_names")
    return Predictor(model.to(device).eval(), task, names, args, device, recorded)


def restore_token_thresholds(
    model: VisionMamba, checkpoint: dict[str, Any], args: argparse.Namespace
) -> None:
    """Let each image keep what exceeds the checkpoint's thresholds. Raises UsageError for a model
    that has none, UserError for a checkpoint that holds none.
    """
    check_token_budget(args)
    odds = token_thresholds(checkpoint, args).get("ema" if args.ema else "model")
    if odds is None:
        raise UserError(
            f"{args.model_path} holds no thresholds of tokens for these flags; main.py --eval "
            "--calibrate --token-budget image writes a checkpoint that does"
        )
    model.set_token_thresholds(odds)


def check_fixed(argv: Sequence[str], args: argparse.Namespace) -> None:
    """Raise UsageError for flags that an exported model cannot follow any more."""
    parser = argparse.ArgumentParser(add_help=False)
    add_model_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    flags = (flags | {"--input-size", "--ema"}) - {"--model-path"}
    for flag in arguments.given_flags(argv):
        if flag in flags:
            raise UsageError(
                f"{flag} cannot change {args.model_path}; export the checkpoint again with it"
            )
    if args.device == "cuda" or args.amp != "off":
        raise UsageError(
            f"{args.model_path} is run by ONNX Runtime on the CPU in its own precision; leave out "
            "--device and --amp"
        )


def class_names(file: str | None, checkpoint: dict[str, Any], count: int, source: str) -> list[str]:
    """Class names from the user's file, the checkpoint or ImageNet, or else numbers."""
    imagenet = ImageNetInfo("imagenet-1k")
    recorded = checkpoint.get("class_names")
    if not isinstance(recorded, (list, tuple)) or len(recorded) != count:
        recorded = imagenet.label_names() if count == imagenet.num_classes() else ()
    recorded = [str(name) for name in recorded]
    if file:
        try:
            names = read_names(Path(file), recorded)
        except UserError as error:
            raise UserError(f"--class-names {error}") from None
        if len(names) != count:
            raise UserError(
                f"--class-names {file}: {len(names)} names, and the model has {count} classes"
            )
        return names
    names = checkpoint.get("class_names")
    if isinstance(names, (list, tuple)) and len(names) == count:
        wordnet_ids = set(imagenet.label_names())  # n01440764, ...: the folders of ImageNet
        return [
            imagenet.label_name_to_description(name) if name in wordnet_ids else str(name)
            for name in names
        ]
    if count == imagenet.num_classes():
        _logger.info("%s holds no class names; 1000 classes are taken to be ImageNet's", source)
        return [imagenet.index_to_description(label) for label in range(count)]
    _logger.warning(
        "%s holds no class names: their numbers are shown; give --class-names FILE", source
    )
    return [f"class {label}" for label in range(count)]


def check_outside(flag: str, output: Path, sources: Sequence[str], source_flag: str = "") -> None:
    """Raise UsageError if pictures would be written into a folder that images are read from."""
    for source in sources:
        if os.path.isdir(source) and output.resolve().is_relative_to(Path(source).resolve()):
            where = f"{source_flag} {source}".strip()
            raise UsageError(
                f"{flag} {output} lies in {where}, whose pictures would be read again next time; "
                "choose another folder"
            )
