"""Image sets from folders: one folder per class, and iNaturalist's listings."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError, printable

from .images import FileImages, ImageSet
from .walking import LeftOut, class_folders, is_dead_link, list_images

_logger = logging.getLogger(__name__)


def image_folders(path: Path, split: str) -> ImageSet:
    """One folder per split and class, in the order of torchvision's ImageFolder."""
    return FileImages(*labelled_folders(path, split, list_images, "images"))


def labelled_folders(
    path: Path, split: str, list_files: Callable[[str, LeftOut], list[str]], kind: str
) -> tuple[str, list[str], list[int], list[str]]:
    """What lies in one folder per class: its root, paths below it, their labels, the classes.

    kind: of `list_files`, in the plural. What is left out is logged once.

    Raises UserError for missing folders, and for a class without files.
    """
    root, left = str(folder_in(path, split)), LeftOut()
    classes = class_folders(root, left)
    paths, labels, empty = [], [], []
    for label, name in enumerate(classes):
        files = list_files(os.path.join(root, name), left)
        if not files:
            empty.append(printable(name))
        paths += [os.path.relpath(file, root) for file in files]
        labels += [label] * len(files)
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise UserError(
            f"{printable(root)}: no {kind} in class {', '.join(empty[:5])}{more}{left.instead()}"
        )
    left.tell(root)
    _doubt_level(root, paths, labels)
    return root, paths, labels, classes


def _doubt_level(root: str, paths: list[str], labels: list[int]) -> None:
    """Warn where all class folders hold but folders, of the same names: PART/CLASS/x.jpg."""
    inside: dict[int, set[str]] = {}
    for path, label in zip(paths, labels, strict=True):
        _, folder, *rest = path.split(os.sep)
        if not rest:
            return
        inside.setdefault(label, set()).add(folder)
    names = inside[0]
    if len(inside) > 1 and len(names) > 1 and all(each == names for each in inside.values()):
        _logger.warning(
            "%s: each of the %d class folders holds folders called %s; if these are the classes, "
            "give them the place of those above",
            root,
            len(inside),
            ", ".join(map(printable, sorted(names)[:3])),
        )


def folder_in(path: Path, name: str) -> Path:
    """The folder `name` in `path`; raises UserError with what there is instead."""
    if is_dead_link(str(path / name)):
        raise UserError(
            f"{printable(str(path / name))} is a link to "
            f"{printable(os.readlink(path / name))}, which is not there"
        )
    if not (path / name).is_dir():
        there = sorted(printable(entry.name) + "/" * entry.is_dir() for entry in path.iterdir())[:5]
        raise UserError(
            f"{printable(str(path))}: no folder {name}/ in it (there is "
            f"{', '.join(there) or 'nothing'})"
        )
    return path / name


def find_images(paths: Sequence[str]) -> FileImages:
    """The named files, and all images below the named folders.

    Raises UserError for a folder without images.
    """
    files: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            left = LeftOut()
            inside = list_images(path, left)
            if not inside:
                raise UserError(
                    f"{printable(path)}: no images in this folder (JPEG, PNG, WebP, BMP, PPM, "
                    f"TIFF, GIF){left.instead()}"
                )
            left.tell(path)
            files += inside
        else:
            files.append(path)
    return FileImages("", files, np.zeros(len(files)), [])


def inaturalist(year: int, path: Path, split: str) -> ImageSet:
    """DeiT's layout (train2018.json, ...), or one folder per split and class without such a file.

    As in DeiT, classes are numbered by their first appearance in the training annotations.
    """
    listing, train_listing = path / f"{split}{year}.json", path / f"train{year}.json"
    if not listing.is_file():
        return image_folders(path, split)
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
    """DeiT's path of an image, without its super-category: train_val2018/Aves/2820/x.jpg."""
    parts = name.split("/")
    return name if len(parts) < 4 or (path / name).exists() else "/".join([parts[0], *parts[2:]])


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(str(file))}: cannot be read as JSON ({error})") from None
