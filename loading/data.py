"""A data set ready for one process: two splits, checked against each other, and their loaders."""

import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from utils.errors import UsageError, UserError, printable

from .bad_images import BadImages
from .depth import AUTO, Depth, settle_depth
from .images import BadImageError, ImageSet, fixed_part
from .loaders import Batch, EvalLoader, TrainLoader
from .options import DataOptions
from .transforms import Transforms
from .walking import composed

CALIBRATION_IMAGES = 2048

_logger = logging.getLogger(__name__)


@dataclass
class Data:
    """A data set ready for one rank.

    `class_names` is empty if the data set has no classes. `train` and `val` are the image sets,
    None if timm streams the images (`train` also in evaluation). `num_val` counts the validation
    images of all ranks, including unusable ones; None for a stream of unknown length. `bad_images`
    holds the images skipped so far on this rank; `bad_images.write(path)` lists them.
    `quick_loader` reads the validation images for the evaluations between epochs, and
    `calibration_loader` a fixed part of `train`, None for a stream; both with the quick transform
    if there is one. `bit_depth` is that of files with more than 8 bits a channel.
    """

    class_names: list[str]
    train: ImageSet | None
    val: ImageSet | None
    num_val: int | None
    train_loader: TrainLoader | None
    val_loader: EvalLoader
    bad_images: BadImages = field(repr=False)
    quick_loader: EvalLoader
    calibration_loader: EvalLoader | None = None
    bit_depth: Depth = AUTO

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def steps_per_epoch(self) -> int:
        return self.train_loader.steps_per_epoch

    def train_batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The full training batches of an epoch from `start_step` on.

        Order and augmentation depend only on the seed, the epoch and the step, for any number of
        workers. A stream depends on the number of workers too, and has to be read up to
        `start_step`.

        Raises:
            UserError: an unusable image under `--bad-images stop`; a worker died.
        """
        return self.train_loader.batches(epoch, start_step)

    def val_batches(self, quick: bool = False) -> Iterator[Batch]:
        """The validation batches of this rank, perhaps none; each usable image is on one rank only.

        Raises:
            UserError: as in `train_batches`.
        """
        return (self.quick_loader if quick else self.val_loader).batches()

    def list_bad_images(self, output_dir: str | Path, rank: int) -> list[str]:
        """Write the list of this rank's images skipped under `--bad-images skip`; -> its lines."""
        return self.bad_images.write(Path(output_dir) / f"bad_images_rank{rank}.txt")

    def describe(self, indices, split: str = "train") -> list[str]:
        """File names, or descriptions, of a batch's `indices`, each on one line."""
        images = self.train if split == "train" else self.val
        return [
            "streamed image" if images is None else images.describe(int(index)) for index in indices
        ]


def assemble(
    options: DataOptions, transforms: Transforms, train: ImageSet | None, val: ImageSet
) -> Data:
    """Check two image sets against each other and add their loaders."""
    bad_images = BadImages(options.bad_images)
    quick, quick_options = transforms.eval, options
    if transforms.quick is not None:  # as many at once as in training
        quick, quick_options = transforms.quick, replace(options, eval_batch_size=None)
    train_loader = calibration_loader = None
    if train is not None:
        _check_same_classes(options.data_path or options.data_set, train.classes, val.classes)
    sets = [val] if train is None else [train, val]
    bit_depth = settle_depth(sets, options.bit_depth, BadImageError)
    if train is not None:
        if options.subset is not None:
            train = _take_subset(train, options.subset)
        _tell_empty_classes(train, options.subset)
        train_loader = TrainLoader(train, transforms.train, options, bad_images)
        chosen = fixed_part(train, min(CALIBRATION_IMAGES, len(train)))
        calibration_loader = EvalLoader(chosen, quick, quick_options, bad_images)
    val_loader = quick_loader = EvalLoader(val, transforms.eval, options, bad_images)
    if transforms.quick is not None:
        quick_loader = EvalLoader(val, quick, quick_options, bad_images)
    return Data(
        val.classes,
        train,
        val,
        len(val),
        train_loader,
        val_loader,
        bad_images,
        quick_loader,
        calibration_loader,
        bit_depth,
    )


def _check_same_classes(source: str, train: list[str], val: list[str]) -> None:
    same = [composed(name) for name in train], [composed(name) for name in val]
    if same[0] == same[1]:
        return
    parts = []
    show = ascii if sorted(same[0]) == sorted(same[1]) or _look_alike(*same) else str
    for split, other, names in (("train", val, train), ("val", train, val)):
        only = [show(name) for name in sorted(set(names) - set(other))]
        if only:
            more = f" and {len(only) - 5} more" if len(only) > 5 else ""
            parts.append(f"only {split} has {', '.join(only[:5])}{more}")
    counts = f"train ({len(train)}) and val ({len(val)})"
    raise UserError(
        f"{printable(source)}: the classes of {counts} differ: {'; '.join(parts) or 'their order'}"
        + "; two Unicode forms of a name look the same" * (show is ascii)
    )


def refuse_one_class(source: str, data: Data) -> None:
    """Raise UserError for a data set with nothing to tell apart, such as images/CLASS/x.jpg."""
    if data.num_classes != 1:
        return
    parts = [os.fsdecode(path).split(os.sep) for path in getattr(data.val, "paths", ())]
    inside = sorted({part[1] for part in parts if len(part) > 2})
    hint = ""
    if len(inside) > 1:
        listed = ", ".join(map(printable, inside[:3]))
        hint = f"; are the classes the folders in it ({listed}, ...)? then move them up by one"
    raise UserError(
        f"{printable(source)}: one class only, {data.class_names[0]!r}, so that there is nothing "
        f"to tell apart{hint}"
    )


def _look_alike(train: Sequence[str], val: Sequence[str]) -> bool:
    """Whether names that differ look the same: full width, a space at the end, ..."""
    plain = [
        {unicodedata.normalize("NFKC", name).strip() for name in set(names) - set(other)}
        for names, other in ((train, val), (val, train))
    ]
    return not plain[0].isdisjoint(plain[1])


def _tell_empty_classes(train: ImageSet, subset: int | float | None) -> None:
    """Warn of classes without a training example, such as class 0 where labels begin at 1."""
    if train.labels is None or not train.classes:
        return
    counts = np.bincount(train.labels, minlength=len(train.classes))
    empty = np.flatnonzero(counts == 0).tolist()
    if empty:
        why = f"--subset {subset} leaves {len(train)} images: " if subset is not None else ""
        _logger.warning("%s%s", why, told_empty(empty, train.classes))


def told_empty(empty: Sequence[int], classes: Sequence[str]) -> str:
    """Which classes have no training image."""
    names = ", ".join(f"{label} ({classes[label]})" for label in empty[:3])
    more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
    hint = "; do the labels begin at 1? they count from 0" if list(empty) == [0] else ""
    return f"no training image of {len(empty)} of {len(classes)} classes: label {names}{more}{hint}"


def _take_subset(train: ImageSet, subset: int | float) -> ImageSet:
    count = subset if isinstance(subset, int) else max(1, round(subset * len(train)))
    if count > len(train):
        raise UsageError(f"--subset {subset}: the training set has {len(train)} images only")
    return fixed_part(train, count)
