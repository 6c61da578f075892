"""Data sets for semantic segmentation: ADE20K, Cityscapes, Pascal VOC, and folders.

Each function reads one split, "train" or "val", as `MaskedImages`, and raises UserError if files
are missing. Images and label maps are decoded only when they are loaded.
"""

import os
import re
from pathlib import Path

import numpy as np
from torchvision.datasets import Cityscapes, VOCSegmentation
from torchvision.models.segmentation import FCN_ResNet50_Weights

from utils.errors import UserError, printable

from .class_names import names_of_lines, read_text
from .folders import folder_in
from .images import BadImageError, ImageSet, read_file
from .masks import IGNORED, MaskedImages, decode_labels, label_table
from .walking import LeftOut, composed, list_images

CLASSES_FILE = "classes.txt"  # one name per line
_ADE20K_FILE = "objectInfo150.txt"
_ADE20K_CLASSES = Path(__file__).with_name("ade20k_classes.txt")
_ADE20K_SPLITS = {"train": "training", "val": "validation"}
# A line of objectInfo150.txt, such as "2  0.1072  6046  612  building, edifice".
_ADE20K_LINE = re.compile(r"(\d+)(?:\s+[\d.]+)+\s+([^\W\d][^,;]*)")


def ade20k(path: Path, split: str) -> ImageSet:
    """The scene parsing benchmark (ADEChallengeData2016), or a folder in its layout.

    images/{training,validation}/X.jpg with annotations/{training,validation}/X.png, in which 0 is
    "other", ignored here, and v is class v - 1. Names are from `classes.txt` if there is one, else
    from the benchmark's `objectInfo150.txt`, else the benchmark's 150.
    """
    name = _ADE20K_SPLITS[split]
    pairs = _pairs(path, f"images/{name}", f"annotations/{name}")
    if (path / CLASSES_FILE).exists():
        source = path / CLASSES_FILE
        classes = read_class_names(source)
    elif (path / _ADE20K_FILE).exists():
        source = path / _ADE20K_FILE
        classes = _object_names(source)
    else:
        source = _ADE20K_CLASSES
        classes = read_class_names(source)
    return MaskedImages(str(path), pairs, label_table(str(source), len(classes), first=1), classes)


def mask_folders(path: Path, split: str) -> ImageSet:
    """images/{train,val}/X.jpg (or another format) with masks/{train,val}/X.png.

    Value v of a mask is line v + 1 of `classes.txt`, 255 is ignored. Without that file all masks of
    both splits are read once to find the largest value, and the classes are called "class 0" and so
    on.
    """
    pairs = _pairs(path, f"images/{split}", f"masks/{split}")
    source = path / CLASSES_FILE
    if source.exists():
        classes = read_class_names(source)
    else:
        source = path / "masks"
        classes = [f"class {label}" for label in range(_largest_value(source) + 1)]
        if len(classes) < 2:
            raise UserError(
                f"{printable(str(source))}: the masks hold one class only; 255 means ignored: "
                f"write 1, 2, ... for the others, or name the classes in {CLASSES_FILE}"
            )
    return MaskedImages(str(path), pairs, label_table(str(source), len(classes)), classes)


def cityscapes(path: Path, split: str) -> ImageSet:
    """The fine annotations of torchvision's Cityscapes: the 19 classes of its benchmark."""
    for folder in ("leftImg8bit", "gtFine"):  # torchvision would unpack archives that lie there
        folder_in(path, f"{folder}/{split}")
    try:
        reader = Cityscapes(path, split, mode="fine", target_type="semantic")
    except OSError as error:
        raise UserError(f"{printable(str(path))}: not Cityscapes ({error})") from None
    pairs = sorted(
        (image, masks[0])
        for image, masks in zip(reader.images, reader.targets, strict=True)
        if image.endswith("_leftImg8bit.png")
    )
    evaluated = sorted(
        (row for row in Cityscapes.classes if 0 <= row.train_id < IGNORED),
        key=lambda row: row.train_id,
    )
    table = label_table("Cityscapes", 0)
    for row in Cityscapes.classes:
        if row.id >= 0:
            table[row.id] = row.train_id if row in evaluated else IGNORED
    return MaskedImages(str(path), _existing(path, pairs), table, [row.name for row in evaluated])


def voc(path: Path, split: str) -> ImageSet:
    """Pascal VOC 2012, as torchvision's VOCSegmentation: 20 classes and the background."""
    folder_in(path, "VOCdevkit/VOC2012")
    try:
        reader = VOCSegmentation(path, year="2012", image_set=split)
    except OSError as error:
        raise UserError(f"{printable(str(path))}: not Pascal VOC ({error})") from None
    pairs = list(zip(reader.images, reader.masks, strict=True))
    classes = list(FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"])
    table = label_table("VOC", len(classes))
    return MaskedImages(str(path), _existing(path, pairs), table, classes)


def read_class_names(file: Path) -> list[str]:
    """The names in a text file, one per line.

    Raises:
        UserError: unreadable, empty, or with an empty or repeated name.
    """
    names = [line.strip() for line in read_text(file).rstrip().split("\n")]
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"{printable(str(file))}: no name in line {number}; give one per line")
        if name in seen:
            raise UserError(
                f"{printable(str(file))}: lines {seen[name]} and {number} are both "
                f"{printable(name)!r}"
            )
        seen[name] = number
    return names_of_lines(names)


def _object_names(file: Path) -> list[str]:
    """The first of the names that the benchmark's listing gives to each class."""
    rows = [row for line in read_text(file).splitlines() if (row := _ADE20K_LINE.match(line))]
    if not rows or [int(row[1]) for row in rows] != list(range(1, len(rows) + 1)):
        raise UserError(
            f"{printable(str(file))}: not the benchmark's list of classes 1, 2, ...; restore it, "
            f"or write {CLASSES_FILE} beside it"
        )
    return [row[2].strip() for row in rows]


def _pairs(path: Path, images: str, masks: str) -> list[tuple[str, str]]:
    """Images and label maps with the same name but for its ending, relative to `path`."""
    by_stem: dict[str, list[str]] = {}
    left = LeftOut()
    for file in list_images(folder_in(path, images), left):
        by_stem.setdefault(_stem(file, path / images), []).append(os.path.relpath(file, path))
    mask_files = {
        _stem(file, path / masks): os.path.relpath(file, path)
        for file in list_images(folder_in(path, masks))
        if file.lower().endswith(".png")
    }
    where = printable(str(path))
    if not by_stem:
        raise UserError(f"{where}: no images in {images}/{left.instead()}")
    left.tell(str(path / images))
    alike = [file for files in by_stem.values() if len(files) > 1 for file in files]
    if alike:
        raise UserError(f"{where}: images that differ in their ending only: {_first(alike)}")
    missing = [by_stem[stem][0] for stem in by_stem if stem not in mask_files]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of {len(by_stem)} images have no .png of the same name in "
            f"{masks}/: {_first(missing)}"
        )
    alone = [file for stem, file in mask_files.items() if stem not in by_stem]
    if alone:
        raise UserError(
            f"{where}: {len(alone)} of {len(mask_files)} label maps have no image of the same name "
            f"in {images}/: {_first(alone)}"
        )
    return [(files[0], mask_files[stem]) for stem, files in by_stem.items()]


def _stem(file: str, folder: Path) -> str:
    return composed(os.path.splitext(os.path.relpath(file, folder))[0])


def _existing(path: Path, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs relative to `path`, if there are any and all their files are there."""
    if not pairs:
        raise UserError(f"{printable(str(path))}: no images in it")
    relative = [tuple(os.path.relpath(file, path) for file in pair) for pair in pairs]
    for place, kind in enumerate(("images", "label maps")):
        missing = [pair[place] for pair in relative if not (path / pair[place]).exists()]
        if missing:
            raise UserError(
                f"{printable(str(path))}: {len(missing)} of {len(pairs)} {kind} are missing: "
                f"{_first(missing)}"
            )
    return relative


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(printable, names[:5])) + more


def _largest_value(masks: Path) -> int:
    """The largest class index in all label maps below `masks`; unreadable ones are left out here.

    Raises:
        UserError: a value above 255, which no class can have; no labelled pixel at all.
    """
    largest = -1
    for file in list_images(masks):
        if not file.lower().endswith(".png"):
            continue
        try:
            values = read_file(file, decode_labels)
        except BadImageError:
            continue
        found = max(np.unique(values[values != IGNORED]).tolist(), default=-1)
        if found > IGNORED:
            raise UserError(
                f"{printable(file)}: value {found}; classes are 0 ... {IGNORED - 1}, and {IGNORED} "
                "is for ignored"
            )
        largest = max(largest, found)
    if largest < 0:
        raise UserError(
            f"{printable(str(masks))}: no label map with a class in it; name the classes in "
            f"{CLASSES_FILE}"
        )
    return largest
