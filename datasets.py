"""Named data sets, the flags that choose and augment them, and `build_data`, which turns both into
batches.

`--data-set` takes a name out of `DATA_SETS` or one that timm reads (`wds/...`, `hfds/...`,
`hfids/...`, `tfds/...`; see readers.py). The classes always follow from the data.
"""

import argparse
import gzip
import json
import math
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS

from loading.images import ArrayImages, FileImages, ImageSet, printable, stratified_choice
from loading.loaders import Data, assemble
from utils.errors import UsageError, UserError, first_line

# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FMNIST = Path("/usr/share/datasets/fashion-mnist")
TIMM_PREFIXES = ("wds/", "hfds/", "hfids/", "tfds/")


def _number_from(
    kind: type, lowest: float, highest: float = float("inf")
) -> Callable[[str], float]:
    """An argparse type: a number of `kind` in [lowest, highest]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not lowest <= value <= highest:
            bounds = (
                f"at least {lowest}"
                if highest == float("inf")
                else f"between {lowest} and {highest}"
            )
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole' if kind is int else 'a'} number {bounds}"
            )
        return value

    return parse


def _subset(text: str) -> int | float:
    """'0.1' or '1.0' is a fraction of the training set, '100' a number of images."""
    return _number_from(int, 1)(text) if text.isdecimal() else _number_from(float, 1e-9, 1)(text)


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
    group.add_argument("--batch-size", type=_number_from(int, 1), default=64, help="per process")
    group.add_argument(
        "--num-workers",
        "--num_workers",
        type=_number_from(int, 0),
        default=_default_workers(),
        help="per process",
    )
    group.add_argument(
        "--pin-mem", action=on_off, default=True, help="pin CPU memory for faster copies to the GPU"
    )
    group.add_argument(
        "--input-size",
        type=_number_from(int, 1),
        help="image size in pixels (default: the model's)",
    )
    group.add_argument("--eval-crop-ratio", type=_number_from(float, 0.01, 1), default=0.875)
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
        "--color-jitter", type=_number_from(float, 0), default=0.3, help="has no effect beside --aa"
    )
    group.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's policy, or none"
    )
    group.add_argument(
        "--train-interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic"
    )
    group.add_argument(
        "--hflip",
        type=_number_from(float, 0, 1),
        default=0.5,
        help="probability of a horizontal flip",
    )
    group.add_argument(
        "--reprob", type=_number_from(float, 0, 1), default=0.25, help="random erasing: probability"
    )
    group.add_argument(
        "--remode", choices=("const", "rand", "pixel"), default="pixel", help="random erasing: fill"
    )
    group.add_argument(
        "--recount", type=_number_from(int, 1), default=1, help="random erasing: areas"
    )
    group.add_argument(
        "--crop-padding",
        type=_number_from(int, 0),
        default=4,
        help="up to size 32: shift by as many pixels",
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


def _data_path(name: str, path: str | None) -> Path | None:
    if path is None:
        if name in NEEDS_PATH:
            raise UsageError(f"--data-set {name} needs --data-path: {NEEDS_PATH[name]}")
        return None
    if not Path(path).is_dir():
        raise UserError(f"--data-path {printable(path)}: no such folder")
    return Path(path)


def _digits(_path: Path | None, split: str) -> ImageSet:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels; a fixed stratified fifth of them is
    for validation.
    """
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    pixels = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    chosen = stratified_choice(targets, math.ceil(len(targets) / 5))
    if split == "train":
        chosen = np.setdiff1d(np.arange(len(targets)), chosen)
    names = [str(digit) for digit in np.unique(targets)]
    return ArrayImages(pixels[chosen], targets[chosen], names, f"DIGITS {split}")


def _fashion_mnist(path: Path | None, split: str) -> ImageSet:
    prefix = "train" if split == "train" else "t10k"
    pixels = _read_idx(path, f"{prefix}-images-idx3-ubyte")
    targets = _read_idx(path, f"{prefix}-labels-idx1-ubyte")
    if len(pixels) != len(targets) or not len(pixels) or targets.max() >= len(FashionMNIST.classes):
        raise UserError(
            f"FMNIST: images ({len(pixels)}) and labels ({len(targets)}) of {split} do not fit "
            "together"
        )
    return ArrayImages(pixels, targets, FashionMNIST.classes, f"FMNIST {split}")


def _read_idx(path: Path | None, name: str) -> np.ndarray:
    """Reads an idx file of bytes, packed or not, from Debian's folder or torchvision's layout below
    `path`.
    """
    folders = (
        [DEBIAN_FMNIST] if path is None else [path, path / "raw", path / "FashionMNIST" / "raw"]
    )
    files = [folder / (name + ending) for folder in folders for ending in (".gz", "")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(
            f"FMNIST: no {name}[.gz] in {printable(str(folders[0]))}; install Debian's "
            "dataset-fashion-mnist "
            "or give --data-path with torchvision's FashionMNIST/raw"
        )
    try:
        content = (gzip.decompress if file.suffix == ".gz" else bytes)(file.read_bytes())
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"{printable(str(file))}: not a whole idx file ({error})") from None


def _cifar(data_set: type, path: Path, split: str) -> ImageSet:
    try:
        data = data_set(path, train=split == "train")
    except (RuntimeError, OSError, EOFError, KeyError) as error:
        raise UserError(
            f"{data_set.__name__}: not found or damaged in {printable(str(path))} "
            f"({first_line(error)}); "
            f"unpack the python version there, so that it holds {data_set.base_folder}/"
        ) from None
    return ArrayImages(data.data, data.targets, data.classes, f"{data_set.__name__} {split}")


def _image_folders(path: Path, split: str) -> ImageSet:
    """A folder per split and in it a folder per class; classes and images in the order of
    torchvision's ImageFolder.
    """
    root = path / split
    if not root.is_dir():
        there = sorted(printable(entry.name) + "/" * entry.is_dir() for entry in path.iterdir())[:5]
        raise UserError(
            f"{printable(str(path))}: no folder {split}/ in it (there is "
            f"{', '.join(there) or 'nothing'})"
        )
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise UserError(f"{printable(str(root))}: no class folders in it")
    paths, targets, empty = [], [], []
    for label, name in enumerate(classes):
        found = list_images(root / name)
        if not found:
            empty.append(printable(name))
        paths += [os.path.relpath(file, root) for file in found]
        targets += [label] * len(found)
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise UserError(f"{printable(str(root))}: no images in class {', '.join(empty[:5])}{more}")
    return FileImages(str(root), paths, targets, classes)


def list_images(top: Path) -> list[str]:
    """Image files below `top`. Links are followed, each folder once: a link to a folder above it
    ends nothing.
    """
    seen, found = set(), []
    for root, folders, names in os.walk(top, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        found += [(root, name) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    return [os.path.join(root, name) for root, name in sorted(found)]


def _inaturalist(year: int, path: Path, split: str) -> ImageSet:
    """DeiT's layout (train2018.json, val2018.json, ...), or folders per split and class where there
    is no such file.

    As in DeiT, classes are numbered in the order in which the training annotations first name them.
    """
    listing, train_listing = path / f"{split}{year}.json", path / f"train{year}.json"
    if not listing.is_file():
        return _image_folders(path, split)
    content, train_content = _read_json(listing), _read_json(train_listing)
    try:
        categories = dict.fromkeys(entry["category_id"] for entry in train_content["annotations"])
        order = {category: label for label, category in enumerate(categories)}
        names = {entry["id"]: entry["name"] for entry in content.get("categories", [])}
        files = {image["id"]: image["file_name"] for image in content["images"]}
        labelled = [
            (files[entry["image_id"]], order[entry["category_id"]])
            for entry in content["annotations"]
        ]
        paths = [_inaturalist_file(path, file) for file, _ in labelled]
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"not iNaturalist's listing of this set, or at odds with {train_listing.name}"
        raise UserError(f"{printable(str(listing))}: {reason} ({error!r})") from None
    if not labelled:
        raise UserError(f"{printable(str(listing))}: it lists no images")
    return FileImages(
        str(path),
        paths,
        [label for _, label in labelled],
        [str(names.get(key, key)) for key in order],
    )


def _inaturalist_file(path: Path, name: str) -> str:
    """DeiT keeps the images without the folder of the super-category: train_val2018/Aves/2820/x.jpg
    loses Aves.
    """
    parts = name.split("/")
    return name if len(parts) < 4 or (path / name).exists() else "/".join([parts[0], *parts[2:]])


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(str(file))}: cannot be read as JSON ({error})") from None


DATA_SETS: dict[str, Callable[[Path | None, str], ImageSet]] = {
    "DIGITS": _digits,
    "FMNIST": _fashion_mnist,
    "CIFAR10": partial(_cifar, CIFAR10),
    "CIFAR100": partial(_cifar, CIFAR100),
    "IMNET": _image_folders,
    "IMNET_100": _image_folders,
    "INAT": partial(_inaturalist, 2018),
    "INAT19": partial(_inaturalist, 2019),
    "FOLDER": _image_folders,
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
