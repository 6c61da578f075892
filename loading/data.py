"""A data set ready for one process: its two splits, checked against each other, with their loaders."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import UsageError, UserError, printable

from .bad_images import BadImages
from .images import ImageSet, fixed_part
from .loaders import Batch, EvalLoader, TrainLoader
from .options import DataOptions
from .transforms import Transforms

CALIBRATION_IMAGES = 2048


@dataclass
class Data:
    """A data set ready for one rank.

    `class_names` is empty where the data set has no classes. `train` and `val` are the image sets,
    None where the images are streamed by timm (`train` also in evaluation). `num_val` counts the
    validation images of all ranks, unusable ones included; None if a stream does not tell.
    `bad_images` has the images left out so far on this rank; `bad_images.write(path)` lists them.
    """

    class_names: list[str]
    train: ImageSet | None
    val: ImageSet | None
    num_val: int | None
    train_loader: TrainLoader | None
    val_loader: EvalLoader
    bad_images: BadImages = field(repr=False)
    calibration_loader: EvalLoader | None = (
        None  # a part of `train`, shown as in evaluation; a stream has none
    )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def steps_per_epoch(self) -> int:
        return self.train_loader.steps_per_epoch

    def train_batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch from `start_step` on: full ones, the same for any number
        of workers.

        Order and augmentation depend on the seed, the epoch and the step alone. A stream must read
        on to `start_step` and depends on the number of workers too.

        Raises:
            UserError: an unusable image under `--bad-images stop`; a worker died.
        """
        return self.train_loader.batches(epoch, start_step)

    def val_batches(self) -> Iterator[Batch]:
        """The validation batches of this rank. Over all ranks, each usable image appears once; a
        rank may have none.

        Raises:
            UserError: as in `train_batches`.
        """
        return self.val_loader.batches()

    def list_bad_images(self, output_dir: str | Path, rank: int) -> list[str]:
        """Write down the images that `--bad-images skip` has left out on this rank; -> all lines."""
        return self.bad_images.write(Path(output_dir) / f"bad_images_rank{rank}.txt")

    def describe(self, indices, split: str = "train") -> list[str]:
        """File names (or the like) of a batch's `indices`, each on one line."""
        images = self.train if split == "train" else self.val
        return [
            "streamed image" if images is None else images.describe(int(index)) for index in indices
        ]


def assemble(
    options: DataOptions, transforms: Transforms, train: ImageSet | None, val: ImageSet
) -> Data:
    """Joins two image sets, checked against each other, with their loaders."""
    bad_images = BadImages(options.bad_images)
    train_loader = calibration_loader = None
    if train is not None:
        _check_same_classes(options.data_path or options.data_set, train.classes, val.classes)
        if options.subset is not None:
            train = _take_subset(train, options.subset)
        train_loader = TrainLoader(train, transforms.train, options, bad_images)
        chosen = fixed_part(train, min(CALIBRATION_IMAGES, len(train)))
        calibration_loader = EvalLoader(chosen, transforms.eval, options, bad_images)
    val_loader = EvalLoader(val, transforms.eval, options, bad_images)
    return Data(
        val.classes, train, val, len(val), train_loader, val_loader, bad_images, calibration_loader
    )


def _check_same_classes(source: str, train: list[str], val: list[str]) -> None:
    if train == val:
        return
    parts = []
    for split, other, names in (("train", val, train), ("val", train, val)):
        only = sorted(set(names) - set(other))
        if only:
            more = f" and {len(only) - 5} more" if len(only) > 5 else ""
            parts.append(f"only {split} has {', '.join(only[:5])}{more}")
    counts = f"train ({len(train)}) and val ({len(val)})"
    raise UserError(
        f"{printable(source)}: the classes of {counts} differ: {'; '.join(parts) or 'their order'}"
    )


def _take_subset(train: ImageSet, subset: int | float) -> ImageSet:
    count = subset if isinstance(subset, int) else max(1, round(subset * len(train)))
    if count > len(train):
        raise UsageError(f"--subset {subset}: the training set has {len(train)} images only")
    return fixed_part(train, count)
