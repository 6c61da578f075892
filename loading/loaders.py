"""Batches of a split, in training and in evaluation, and what becomes of images that cannot be
used.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from utils.errors import UsageError, UserError, first_line, printable
from utils.files import atomic_file
from utils.seeding import random_state

from .images import BadImageError, ImageSet, SubsetImages, stratified_choice
from .samplers import EvalBatchSampler, TrainBatchSampler
from .transforms import eval_transform, train_transform

# How many images in a row may be unusable before `--bad-images skip` believes that the whole data
# set is.
MAX_REPLACEMENTS = 100
CALIBRATION_IMAGES = 2048
# How torch's RuntimeError begins when a worker is gone. A signal handler raises it, so that it can
# also appear in the middle of a training step.
WORKER_DIED = "DataLoader worker (pid"


class Batch(NamedTuple):
    """images [B, 3, H, W] float32, normalised; targets [B] int64; indices [B] int64, for
    `Data.describe`.
    """

    images: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor


class Sample(NamedTuple):
    """What a worker makes of one image; `image` is None if there was none.

    Errors are told, not raised: an exception would come out of a worker process as a trace.
    `problems` has a (name, reason) for each unusable image, which `BadImages` judges; `failure`
    ends the run in any case.
    """

    image: torch.Tensor | None
    target: int = -1
    index: int = -1
    problems: list[tuple[str, str]] = []
    failure: str | None = None


class Samples(Dataset):
    """Transformed images of a set, by (index, seed). With `replace`, an unusable image gives way to
    the next one.
    """

    def __init__(self, images: ImageSet, transform: Callable, replace: bool):
        self.images, self.transform, self.replace = images, transform, replace

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        first, seed = item
        problems = []
        for offset in range(min(MAX_REPLACEMENTS, len(self.images)) if self.replace else 1):
            index = (first + offset) % len(self.images)
            try:
                image = self.images.load(index)
            except BadImageError as error:
                problems.append((self.images.describe(index), str(error)))
                continue
            with random_state(seed):
                return Sample(
                    self.transform(image), int(self.images.targets[index]), index, problems
                )
        failure = f"{len(problems)} images in a row cannot be decoded, the last one is {': '.join(problems[-1])}"
        return Sample(None, problems=problems, failure=failure if self.replace else None)


class WorkerBatch(NamedTuple):
    """A `Batch` of the usable images on its way from a worker, with what became of the others."""

    images: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    problems: list[tuple[str, str]]
    failure: str | None


def collate(samples: list[Sample]) -> WorkerBatch:
    usable = [sample for sample in samples if sample.image is not None]
    return WorkerBatch(
        default_collate([sample.image for sample in usable]) if usable else torch.empty(0),
        torch.tensor([sample.target for sample in usable], dtype=torch.int64),
        torch.tensor([sample.index for sample in usable], dtype=torch.int64),
        [problem for sample in samples for problem in sample.problems],
        next((sample.failure for sample in samples if sample.failure), None),
    )


class BadImages:
    """What becomes of images that cannot be decoded: `policy` "stop" raises, "skip" collects them
    in `found`.
    """

    def __init__(self, policy: str):
        self.policy = policy
        self.found: dict[str, str] = {}  # name -> reason

    def report(self, problems: list[tuple[str, str]]) -> None:
        """Raises `UserError` for the first problem under "stop"; takes note of all under "skip"."""
        if problems and self.policy == "stop":
            name, reason = problems[0]
            raise UserError(
                f"{name}: {reason}. Repair or remove it, or leave such images out with "
                "--bad-images skip"
            )
        self.found.update(problems)

    def write(self, path: str | Path) -> list[str]:
        """Lists the images found, a line each, added to those that `path` lists already; -> its
        lines.

        Nothing found, no file.
        """
        path = Path(path)
        try:
            known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        except OSError as error:
            raise UserError(
                f"{path}: cannot read the list of bad images: {error.strerror}"
            ) from None
        lines = list(
            dict.fromkeys(known + [f"{name}: {reason}" for name, reason in self.found.items()])
        )
        if lines != known:
            with atomic_file(path) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
        return lines


def _leave_signals_to_the_parent(_worker: int) -> None:
    """A scheduler that preempts a job signals all its processes, and workers must serve the step
    that is finished.

    SIGTERM still ends a worker when its own parent sends it. A thread looks at the sender, for a
    handler is not told; all other threads have the signal blocked since `_start` forked them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()


def _start(loader: DataLoader) -> Iterator:
    """iter(loader), whose workers start with SIGTERM blocked: torch has made threads there before
    any code of ours.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def loader_options(args) -> dict:
    """The arguments of DataLoader that all loaders share.

    Its own generator: a loader draws a number at each start, which must not shift the random
    numbers of the model.
    """
    return {
        "collate_fn": collate,
        "pin_memory": args.pin_mem and torch.cuda.is_available(),
        "worker_init_fn": _leave_signals_to_the_parent,
        "generator": torch.Generator(),
    }


def read_batches(loader: DataLoader, bad_images: BadImages) -> Iterator[Batch]:
    """The batches that hold any image. Whatever goes wrong in a worker, and a worker that dies, is
    one `UserError`.
    """
    try:
        try:
            for images, targets, indices, problems, failure in _start(loader):
                bad_images.report(problems)
                if failure:
                    raise UserError(failure)
                if len(targets):
                    yield Batch(images, targets, indices)
        except (OSError, EOFError) as error:
            if str(error).startswith("Caught "):  # raised by a worker that lives, with its trace
                raise
            # A batch of a worker that died cannot be fetched, and torch's handler of SIGCHLD is
            # about to say why.
            time.sleep(1)
            raise UserError(
                f"reading the data failed: a worker process is gone ({error!r})"
            ) from None
    except RuntimeError as error:
        if not str(error).startswith(WORKER_DIED):
            raise
        raise UserError(
            f"reading the data failed: {first_line(error)} Out of memory? Try fewer --num-workers"
        ) from None


class TrainLoader:
    """The training batches of this rank, from any epoch and step on.

    Raises:
        UserError: the set is smaller than one batch on each rank.
    """

    def __init__(
        self, images: ImageSet, transform, args, bad_images: BadImages, rank: int, world_size: int
    ):
        self.bad_images = bad_images
        self.sampler = TrainBatchSampler(
            len(images),
            args.batch_size,
            args.seed,
            rank,
            world_size,
            repeated_aug=args.repeated_aug,
        )
        self.steps_per_epoch = self.sampler.steps_per_epoch
        if not self.steps_per_epoch:
            ranks = "" if world_size == 1 else f" on each of {world_size} processes"
            raise UserError(
                f"the training set has {len(images)} images, less than one batch of "
                f"{args.batch_size}{ranks}: "
                "give a smaller --batch-size"
            )
        self.loader = DataLoader(
            Samples(images, transform, replace=args.bad_images == "skip"),
            batch_sampler=self.sampler,
            num_workers=args.num_workers,
            persistent_workers=args.num_workers > 0,
            **loader_options(args),
        )

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"start_step {start_step} is outside the epoch of {self.steps_per_epoch} steps"
            )
        self.sampler.epoch, self.sampler.start_step = epoch, start_step
        return read_batches(self.loader, self.bad_images)


class EvalLoader:
    """The validation batches of this rank: over all ranks every usable image once, on one rank
    perhaps none.
    """

    def __init__(
        self, images: ImageSet, transform, args, bad_images: BadImages, rank: int, world_size: int
    ):
        self.bad_images = bad_images
        self.loader = DataLoader(
            Samples(images, transform, replace=False),
            batch_sampler=EvalBatchSampler(len(images), args.batch_size, rank, world_size),
            num_workers=args.num_workers,
            persistent_workers=args.num_workers > 0,
            **loader_options(args),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self) -> Iterator[Batch]:
        return read_batches(self.loader, self.bad_images)


@dataclass
class Data:
    """A data set ready for one rank.

    `train` and `val` are the image sets, None where the images are streamed by timm (`train` also
    in evaluation). `num_val` counts the validation images of all ranks, unusable ones included;
    None if a stream does not tell. `bad_images` has the images left out so far on this rank;
    `bad_images.write(path)` lists them.
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
    args, img_size: int, train: ImageSet | None, val: ImageSet, rank: int, world_size: int
) -> Data:
    """Joins two image sets, checked against each other, with their loaders."""
    bad_images = BadImages(args.bad_images)
    train_loader = calibration_loader = None
    if train is not None:
        _check_same_classes(args.data_path or args.data_set, train.classes, val.classes)
        if args.subset is not None:
            train = _take_subset(train, args.subset)
        train_loader = TrainLoader(
            train, train_transform(args, img_size), args, bad_images, rank, world_size
        )
        chosen = SubsetImages(
            train, stratified_choice(train.targets, min(CALIBRATION_IMAGES, len(train)))
        )
        calibration_loader = EvalLoader(
            chosen, eval_transform(args, img_size), args, bad_images, rank, world_size
        )
    val_loader = EvalLoader(val, eval_transform(args, img_size), args, bad_images, rank, world_size)
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
    return SubsetImages(train, stratified_choice(train.targets, count))
