"""The flags of segmentation."""

import argparse
import os

from models import FeatureMaps
from models.segmentation import DECODERS
from utils.arguments import image_size, not_negative, positive, probability, ratio, whole
from utils.distributed import read_launch
from utils.errors import UsageError


def add_segmentation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the groups of the model, the augmentation and the evaluation."""
    group = parser.add_argument_group("segmentation model")
    group.add_argument(
        "--decoder",
        default="upernet",
        metavar="|".join((*DECODERS, "smp:NAME")),
        help="; ".join(f"{name}: {row.what}" for name, row in DECODERS.items())
        + "; smp:NAME: of segmentation_models_pytorch",
    )
    group.add_argument(
        "--decoder-channels", type=positive, help="width of the decoder (default: its own)"
    )
    group.add_argument(
        "--output-layers",
        nargs="+",
        type=whole,
        metavar="LAYER",
        help="the decoder reads maps after these (default: the last one of each quarter)",
    )
    group.add_argument(
        "--features",
        choices=FeatureMaps.KINDS,
        default="hidden",
        help="what the maps show: the mixer's output, or the residual stream",
    )
    group.add_argument("--aux-weight", type=not_negative, default=0.4)
    group.add_argument(
        "--release-gradients",
        action="store_true",
        help="train with the gradients of DyVM's release, tens of times too large (for parity)",
    )
    group = parser.add_argument_group("segmentation augmentation")
    group.add_argument(
        "--scale-range",
        nargs=2,
        type=not_negative,
        default=[0.5, 2.0],
        metavar=("LOW", "HIGH"),
        help="of the image's short side, in sides of the crop",
    )
    group.add_argument(
        "--cat-max-ratio",
        type=ratio,
        default=0.75,
        help="a crop with more of one class is drawn again; 1: no limit",
    )
    group.add_argument("--hflip", type=probability, default=0.5)
    group.add_argument("--photometric", action=argparse.BooleanOptionalAction, default=True)
    group = parser.add_argument_group("segmentation evaluation")
    group.add_argument(
        "--eval-mode",
        choices=("slide", "whole"),
        default="slide",
        help="slide: mean over windows; whole: the image is squeezed into the model's size",
    )
    group.add_argument(
        "--eval-stride",
        type=image_size,
        metavar="N|HxW",
        help="of the windows, in pixels (default: two thirds of their size)",
    )
    group.add_argument(
        "--eval-short-side",
        type=whole,
        metavar="N",
        help="images are resized to this short side (default: the model's; 0: as they are)",
    )
    group.add_argument("--flip-test", action="store_true", help="mean with the mirror image")


def check_segmentation_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that cannot work together."""
    low, high = args.scale_range
    if not 0 < low <= high:
        raise UsageError(f"--scale-range {low:g} {high:g}: must be 0 < LOW <= HIGH")
    launch = read_launch(os.environ)
    alone = launch is None or launch.world_size == 1
    if args.decoder == "upernet" and args.batch_size == 1 and alone and not args.eval:
        raise UsageError(
            "--batch-size 1: UPerNet's batch norm needs 2 images or more; --accum-steps does "
            "not help, --decoder light does"
        )
    if args.scorer_input != "hidden":
        raise UsageError(f"--scorer-input {args.scorer_input}: segmenters score hidden states")
    way = args.token_strategy, args.selector_gradient, args.reduction
    if args.release_gradients and way != ("learned", "paper", "prune"):
        raise UsageError(
            "--release-gradients are those of the paper's selector: leave out "
            "--token-strategy, --selector-gradient and --reduction"
        )
