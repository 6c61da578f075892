"""The table of data sets of all tasks, the flags that choose and augment them, and `build_data`.

`--data-set` takes a name from `DATA_SETS` or one that timm reads (`wds/...`, `hfds/...`,
`hfids/...`, `tfds/...`; see loading/readers.py). The classes always follow from the data.

A new data set, for any task, is a function that returns an `ImageSet` for "train" and for "val",
and a row:

    register_data_set(DataSet("STARS", "regression", read_stars, "the folder with stars.csv"))
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torchvision.datasets import CIFAR10, CIFAR100

from loading.arrays import cifar, digits, fashion_mnist
from loading.clutter import CANVAS, CANVASES, clutter
from loading.data import Data, assemble
from loading.depth import bit_depth
from loading.folders import image_folders, inaturalist
from loading.images import ImageSet
from loading.options import DataOptions, default_workers
from loading.segmentation import ade20k, cityscapes, mask_folders, voc
from loading.transforms import Transforms, classification_transforms
from loading.video_lists import long_video_list, video_list
from loading.video_sets import video_folders
from loading.video_shards import video_shards
from utils.arguments import image_size, not_negative, positive, probability, ratio, whole
from utils.errors import UsageError, UserError, printable
from utils.images import CROP_RATIO, SMALL_IMAGE, ImageSize

TIMM_PREFIXES = ("wds/", "hfds/", "hfids/", "tfds/")
CLASSIFICATION = "classification"
SEGMENTATION = "segmentation"
VIDEO = "video"


@dataclass(frozen=True)
class DataSet:
    """A row of the table.

    Args:
        task: name of the task that its targets are for.
        load: (value of --data-path, "train" or "val") -> that split; raises UserError if the data
            are missing or inconsistent.
        path_holds: what --data-path must contain, as the end of a sentence; None if it is optional.
        takes: flags that `load` takes by name too, where they are given.
        whole_images: the default of --whole-images.
    """

    name: str
    task: str
    load: Callable[[Path | None, str], ImageSet]
    path_holds: str | None = None
    takes: tuple[str, ...] = ()
    whole_images: bool | None = None


_FOLDERS = "a folder with train/ and val/, and in each a folder of images per class"
_CIFAR = "the folder that holds {}/"
_LISTS = "a folder with train.csv and val.csv: path and label, relative to it or to --prefix"
_LISTINGS = "the folder with train{0}.json and val{0}.json"
DATA_SETS: dict[str, DataSet] = {
    row.name: row
    for row in (
        DataSet("DIGITS", CLASSIFICATION, digits),
        DataSet("FMNIST", CLASSIFICATION, fashion_mnist),
        DataSet("CLUTTER", CLASSIFICATION, clutter, takes=("canvas",), whole_images=True),
        DataSet(
            "CIFAR10", CLASSIFICATION, partial(cifar, CIFAR10), _CIFAR.format(CIFAR10.base_folder)
        ),
        DataSet(
            "CIFAR100",
            CLASSIFICATION,
            partial(cifar, CIFAR100),
            _CIFAR.format(CIFAR100.base_folder),
        ),
        DataSet("IMNET", CLASSIFICATION, image_folders, _FOLDERS),
        DataSet("IMNET_100", CLASSIFICATION, image_folders, _FOLDERS),
        DataSet("INAT", CLASSIFICATION, partial(inaturalist, 2018), _LISTINGS.format(2018)),
        DataSet("INAT19", CLASSIFICATION, partial(inaturalist, 2019), _LISTINGS.format(2019)),
        DataSet("FOLDER", CLASSIFICATION, image_folders, _FOLDERS),
        DataSet(
            "ADE20K",
            SEGMENTATION,
            ade20k,
            "a folder with images/ and annotations/, and in each training/ and validation/",
        ),
        DataSet(
            "CITYSCAPES", SEGMENTATION, cityscapes, "the folder that holds leftImg8bit/ and gtFine/"
        ),
        DataSet("VOC", SEGMENTATION, voc, "the folder that holds VOCdevkit/"),
        DataSet(
            "SEG_FOLDER",
            SEGMENTATION,
            mask_folders,
            "a folder with images/ and masks/, and in each train/ and val/",
        ),
        DataSet(
            "VIDEO_FOLDER",
            VIDEO,
            video_folders,
            "a folder with train/ and val/, and in each a folder of videos per class",
        ),
        DataSet(
            "VIDEO_SHARDS",
            VIDEO,
            video_shards,
            "a folder with classes.txt and, in train/ and val/, WebDataset shards of videos",
        ),
        DataSet("K400", VIDEO, video_list, _LISTS, ("prefix",)),
        DataSet("SSV2", VIDEO, video_list, _LISTS, ("prefix",)),
        DataSet(
            "LVU",
            VIDEO,
            long_video_list,
            "a folder with train.csv and val.csv: path, label and length in seconds",
            ("prefix", "part_seconds", "part_stride"),
        ),
    )
}


def register_data_set(data_set: DataSet) -> None:
    """Add a row to the table. Raises ValueError for a name that is taken or reserved for timm."""
    if data_set.name in DATA_SETS or data_set.name.lower().startswith(TIMM_PREFIXES):
        raise ValueError(f"there is a data set called {data_set.name!r} already")
    DATA_SETS[data_set.name] = data_set


def task_of(name: str) -> str:
    """Name of the task that a data set is for; `name` as in --data-set, timm's have classes.

    Raises UsageError for an unknown name.
    """
    return CLASSIFICATION if name.lower().startswith(TIMM_PREFIXES) else _row_of(name).task


def names_for(task: str) -> list[str]:
    """The data sets of a task, timm's aside."""
    return [name for name, row in DATA_SETS.items() if row.task == task]


def _row_of(name: str) -> DataSet:
    if name not in DATA_SETS:
        raise UsageError(f"--data-set {name!r} is unknown; known are {_known_names()}")
    return DATA_SETS[name]


def _subset(text: str) -> int | float:
    """'0.1' or '1.0' is a fraction of the training set, '100' a number of images."""
    return positive(text) if text.isdecimal() else ratio(text)


def _canvas(text: str) -> int:
    smallest, largest = CANVASES
    value = positive(text)
    if not smallest <= value <= largest:
        raise argparse.ArgumentTypeError(f"{value} is not from {smallest} to {largest} pixels")
    return value


def settle_data(args: argparse.Namespace) -> None:
    """Fill in what follows from the data set unless a flag says it."""
    if args.whole_images is None and args.data_set in DATA_SETS:
        args.whole_images = DATA_SETS[args.data_set].whole_images


def _known_names() -> str:
    return ", ".join([*DATA_SETS, *(prefix + "..." for prefix in TIMM_PREFIXES)])


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "data", with DeiT's names and defaults where it has any."""
    group = parser.add_argument_group("data")
    on_off = argparse.BooleanOptionalAction
    group.add_argument(
        "--data-set", default=DataOptions.data_set, metavar="NAME", help=_known_names()
    )
    group.add_argument(
        "--data-path", metavar="DIR", help="folder of the data set; DIGITS needs none"
    )
    group.add_argument(
        "--prefix",
        metavar="DIR",
        help="folder that the paths in lists of videos are relative to (default: --data-path)",
    )
    group.add_argument(
        "--part-seconds",
        type=positive,
        metavar="S",
        help="LVU: length of the parts that long videos are cut into (default: 60)",
    )
    group.add_argument(
        "--part-stride",
        type=positive,
        metavar="S",
        help="LVU: seconds from the start of one part to that of the next (default: 16)",
    )
    group.add_argument(
        "--canvas",
        type=_canvas,
        metavar="N",
        help=f"CLUTTER: side of the images in pixels (default: {CANVAS})",
    )
    group.add_argument(
        "--train-split",
        default=DataOptions.train_split,
        help="split or shards to train on (timm's readers only)",
    )
    group.add_argument(
        "--val-split",
        default=DataOptions.val_split,
        help="split or shards to validate on (timm's readers only)",
    )
    group.add_argument(
        "--subset",
        type=_subset,
        metavar="FRACTION|N",
        help="train on this stratified, fixed part only",
    )
    group.add_argument(
        "--batch-size", type=positive, default=DataOptions.batch_size, help="per process"
    )
    group.add_argument(
        "--epoch-steps",
        type=positive,
        metavar="N",
        help="an epoch has N batches, whatever the number of images (default: all images)",
    )
    group.add_argument(
        "--num-workers", "--num_workers", type=whole, default=default_workers(), help="per process"
    )
    group.add_argument(
        "--pin-mem",
        action=on_off,
        default=DataOptions.pin_mem,
        help="pin CPU memory for faster copies to the GPU",
    )
    group.add_argument(
        "--input-size",
        type=image_size,
        metavar="N|HxW",
        help="image size in pixels (default: the model's)",
    )
    group.add_argument(
        "--eval-crop-ratio",
        type=ratio,
        default=CROP_RATIO,
        help="evaluation: side of the crop, as a share of the resized image's shorter side",
    )
    add_whole_images(group)
    group.add_argument(
        "--repeated-aug",
        action=on_off,
        default=DataOptions.repeated_aug,
        help="show each image three times, as DeiT does",
    )
    group.add_argument(
        "--bad-images",
        choices=("stop", "skip"),
        default=DataOptions.bad_images,
        help="an image that cannot be decoded ends the run",
    )
    add_depth_argument(group)


def add_depth_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--bit-depth",
        type=bit_depth,
        default=DataOptions.bit_depth,
        metavar="auto|N|unit",
        help="of image files with more than 8 bits a channel: 2^N - 1 and all above is white "
        "(unit: 1, for fractions); auto: what the values in a sample of the files need, recorded "
        "with the weights",
    )


def add_whole_images(group: argparse._ArgumentGroup) -> None:
    """Add `--whole-images`, which programs that read single files take too."""
    group.add_argument(
        "--whole-images",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show images whole, stretched to the model's size, instead of cropping them (default: "
        f"where that is at most {SMALL_IMAGE} pixels, and of CLUTTER)",
    )


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "augmentation", which `classification_transforms` reads."""
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--color-jitter", type=not_negative, default=0.3, help="has no effect beside --aa"
    )
    group.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's policy, or none"
    )
    group.add_argument(
        "--train-interpolation",
        choices=("random", "bilinear", "bicubic"),
        default="bicubic",
        help="of resized training images",
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
        "--crop-padding", type=whole, default=4, help="--whole-images: shift by as many pixels"
    )


def build_data(
    args: argparse.Namespace,
    img_size: ImageSize,
    *,
    rank: int = 0,
    world_size: int = 1,
    train: bool = True,
    transforms: Transforms | None = None,
    eval_batch_size: int | None = None,
) -> Data:
    """Build the data set `args.data_set` for images [3, H, W] of size `img_size`.

    `args` has the flags of `add_data_arguments` and `seed`.

    Args:
        train: without it the training images are not read, and `train_batches` is not available.
        transforms: for tasks whose examples are not classified images.
        eval_batch_size: for tasks that must evaluate smaller batches than `--batch-size`.

    Raises:
        UsageError: an unknown name, a missing path, a flag that does not fit the data set.
        UserError: data that is missing, empty or contradictory.
    """
    options = DataOptions.from_args(args, rank, world_size, eval_batch_size)
    if transforms is None:
        transforms = classification_transforms(args, img_size, train)
    if options.data_set.lower().startswith(TIMM_PREFIXES):
        from loading.readers import build_timm_data

        _taken((), options)
        return build_timm_data(options, transforms, train)
    row = _row_of(options.data_set)
    path, given = _data_path(row, options.data_path), _taken(row.takes, options)
    train_images = row.load(path, "train", **given) if train else None
    return assemble(options, transforms, train_images, row.load(path, "val", **given))


def _taken(takes: Sequence[str], options: DataOptions) -> dict[str, Any]:
    """The given flags that belong to single data sets, for `row.load`."""
    flags = sorted({name for other in DATA_SETS.values() for name in other.takes})
    given = {name: getattr(options, name) for name in flags if getattr(options, name) is not None}
    for name in given.keys() - set(takes):
        names = ", ".join(row.name for row in DATA_SETS.values() if name in row.takes)
        raise UsageError(
            f"--{name.replace('_', '-')} is for --data-set {names}, not {options.data_set}"
        )
    if "prefix" in given:
        given["prefix"] = Path(given["prefix"])
        if not given["prefix"].is_dir():
            raise UserError(f"--prefix {printable(options.prefix)}: no such folder")
    return given


def _data_path(row: DataSet, path: str | None) -> Path | None:
    if path is None:
        if row.path_holds is not None:
            raise UsageError(f"--data-set {row.name} needs --data-path: {row.path_holds}")
        return None
    if not Path(path).is_dir():
        raise UserError(f"--data-path {printable(path)}: no such folder")
    return Path(path)
