"""Named data sets, the flags that choose and augment them, and `build_data`, which turns both into
batches.

`--data-set` takes a name out of `DATA_SETS` or one that timm reads (`wds/...`, `hfds/...`,
`hfids/...`, `tfds/...`; see readers.py). The classes always follow from the data.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100

from loading.arrays import cifar, digits, fashion_mnist
from loading.folders import image_folders, inaturalist
from loading.images import ImageSet
from loading.loaders import Data, assemble
from utils.arguments import not_negative, positive, probability, ratio, whole
from utils.errors import UsageError, UserError, printable

TIMM_PREFIXES = ("wds/", "hfds/", "hfids/", "tfds/")


def _subset(text: str) -> int | float:
    """'0.1' or '1.0' is a fraction of the training set, '100' a number of images."""
    return positive(text) if text.isdecimal() else ratio(text)


def _default_workers() -> int:
    return min(4, len(os.sched_getaffinity(0)))


def _known_names() -> str:
    return ", ".join([*DATA_SETS, *(prefix + "..." for prefix in TIMM_PREFIXES)])


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the groups "data" and "augmentation", with DeiT's names and defaults where DeiT has
    them.
    """
    group = parser.add_argument_group("data")
    on_off = argparse.BooleanOptionalAction
    group.add_argument("--data-set", default="DIGITS", metavar="NAME", help=_known_names())
    group.add_argument(
        "--data-path", metavar="DIR", help="folder of the data set; DIGITS needs none"
    )
    group.add_argument(
        "--train-split", default="train", help="split or shards to train on (timm's readers only)"
    )
    group.add_argument(
        "--val-split",
        default="validation",
        help="split or shards to validate on (timm's readers only)",
    )
    group.add_argument(
        "--subset",
        type=_subset,
        metavar="FRACTION|N",
        help="train on this stratified, fixed part only",
    )
    group.add_argument("--batch-size", type=positive, default=64, help="per process")
    group.add_argument(
        "--num-workers", "--num_workers", type=whole, default=_default_workers(), help="per process"
    )
    group.add_argument(
        "--pin-mem", action=on_off, default=True, help="pin CPU memory for faster copies to the GPU"
    )
    group.add_argument(
        "--input-size", type=positive, help="image size in pixels (default: the model's)"
    )
    group.add_argument("--eval-crop-ratio", type=ratio, default=0.875)
    group.add_argument(
        "--repeated-aug",
        action=on_off,
        default=True,
        help="show each image three times, as DeiT does",
    )
    group.add_argument(
        "--bad-images",
        choices=("stop", "skip"),
        default="stop",
        help="an image that cannot be decoded ends the run",
    )

    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--color-jitter", type=not_negative, default=0.3, help="has no effect beside --aa"
    )
    group.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's policy, or none"
    )
    group.add_argument(
        "--train-interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic"
    )
    group.add_argument(
        "--hflip", type=probability, default=0.5, help="probability of a horizontal flip"
    )
    group.add_argument(
        "--reprob", type=probability, default=0.25, help="random erasing: probability"
    )
    group.add_argument(
        "--remode", choices=("const", "rand", "pixel"), default="pixel", help="random erasing: fill"
    )
    group.add_argument("--recount", type=positive, default=1, help="random erasing: areas")
    group.add_argument(
        "--crop-padding", type=whole, default=4, help="up to size 32: shift by as many pixels"
    )


def build_data(
    args, img_size: int, *, rank: int = 0, world_size: int = 1, train: bool = True
) -> Data:
    """Builds the data set named by `args.data_set` for images of [3, img_size, img_size].

    `args` has the flags of `add_data_arguments` and `seed`. Without `train` the training images are
    neither looked for nor read, and `train_batches` is not available.

    Raises:
        UsageError: an unknown name, a missing path, a flag that does not fit the data set.
        UserError: data that is missing, empty or contradicts itself.
    """
    if args.data_set.lower().startswith(TIMM_PREFIXES):
        from loading.readers import build_timm_data

        return build_timm_data(args, img_size, rank, world_size, train)
    if args.data_set not in DATA_SETS:
        raise UsageError(f"--data-set {args.data_set!r} is unknown; known are {_known_names()}")
    path = _data_path(args.data_set, args.data_path)
    load = DATA_SETS[args.data_set]
    return assemble(
        args, img_size, load(path, "train") if train else None, load(path, "val"), rank, world_size
    )


def task_of(data_set: str) -> str:
    """The task that a data set is for."""
    return getattr(DATA_SETS.get(data_set), "task", "classification")


def _data_path(name: str, path: str | None) -> Path | None:
    if path is None:
        if name in NEEDS_PATH:
            raise UsageError(f"--data-set {name} needs --data-path: {NEEDS_PATH[name]}")
        return None
    if not Path(path).is_dir():
        raise UserError(f"--data-path {printable(path)}: no such folder")
    return Path(path)


DATA_SETS: dict[str, Callable[[Path | None, str], ImageSet]] = {
    "DIGITS": digits,
    "FMNIST": fashion_mnist,
    "CIFAR10": partial(cifar, CIFAR10),
    "CIFAR100": partial(cifar, CIFAR100),
    "IMNET": image_folders,
    "IMNET_100": image_folders,
    "INAT": partial(inaturalist, 2018),
    "INAT19": partial(inaturalist, 2019),
    "FOLDER": image_folders,
}
_FOLDERS = "a folder with train/ and val/, and in each a folder of images per class"
NEEDS_PATH = {
    "CIFAR10": f"the folder that holds {CIFAR10.base_folder}/",
    "CIFAR100": f"the folder that holds {CIFAR100.base_folder}/",
    "IMNET": _FOLDERS,
    "IMNET_100": _FOLDERS,
    "INAT": "the folder with train2018.json and val2018.json",
    "INAT19": "the folder with train2019.json and val2019.json",
    "FOLDER": _FOLDERS,
}
