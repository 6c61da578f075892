"""Batches of a split, in training and in evaluation."""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from utils.errors import UserError, first_line
from utils.seeding import random_state

from .bad_images import BadImages
from .images import BadImageError, ImageSet
from .options import DataOptions
from .samplers import EvalBatchSampler, TrainBatchSampler
from .transforms import Transform

# So many unusable images in a row mean that the data set is broken, even with `--bad-images skip`.
MAX_REPLACEMENTS = 100
# The start of torch's RuntimeError about a dead worker. It is raised by a signal handler, so it can
# also appear in the middle of a training step.
_WORKER_DIED = "DataLoader worker (pid"
# In torch's errors about the shared memory of workers; the first is in those of dead ones too.
_SHARED_MEMORY = ("shared memory", "file </torch_")
_OPEN_FILES = ("Too many open files", "received 0 items of ancdata")


def worker_died(error: RuntimeError) -> UserError | None:
    """What to say if this is torch's error about a dead worker or its memory, else None."""
    if any(sign in str(error) for sign in _SHARED_MEMORY):
        return UserError(
            "reading the data failed: /dev/shm, through which workers pass their batches, is too "
            "small: run with --num-workers 0, or give it more room (docker run --shm-size=8g)"
        )
    if any(sign in str(error) for sign in _OPEN_FILES):
        return UserError(
            "reading the data failed: too many open files; allow more with `ulimit -n 4096`, or "
            "run with --num-workers 0"
        )
    if not str(error).startswith(_WORKER_DIED):
        return None
    return UserError(
        f"reading the data failed: {first_line(error)} Out of memory? Try fewer --num-workers"
    )


class Batch(NamedTuple):
    """images [B, 3, H, W] float32 (clips: [B, 3, T, H, W]), normalised; indices [B] int64.

    targets [B, ...]: classes [B] int64, or whatever the transforms make of the targets. The indices
    are for `Data.describe`.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor


class Sample(NamedTuple):
    """A worker's result for one example; `image` is None if there is none. Image and target are
    lists where a transform made several versions of it.

    Errors are passed on, not raised: an exception would leave a worker process as a stack trace.
    `problems` has a (name, reason) for each unusable image, to be judged by `BadImages`; `failure`
    ends the run in any case.
    """

    image: Tensor | list[Tensor] | None
    target: Tensor | list[Tensor] | None = None
    index: int = -1
    problems: list[tuple[str, str]] = []
    failure: str | None = None

    def versions(self) -> list[tuple[Tensor, Tensor, int]]:
        """(image, target, index) of each."""
        if not isinstance(self.image, list):
            return [(self.image, self.target, self.index)]
        return [(*pair, self.index) for pair in zip(self.image, self.target, strict=True)]


def transformed(transform: Transform, image: Any, target: Any) -> tuple[Any, Any]:
    """A transformed example, or each of its versions, as plain tensors; Python numbers become int64
    or float32.
    """
    image, target = transform(image, target)
    if isinstance(image, list):
        return [_plain(version) for version in image], [_plain(one) for one in target]
    return _plain(image), _plain(target)


def _plain(value: Any) -> Tensor:
    return torch.as_tensor(value).as_subclass(Tensor)  # torchvision's tv_tensors are subclasses


class Samples(Dataset):
    """Transformed examples of a set, by (index, seed).

    With `replace`, an unusable example is replaced by the next one.
    """

    def __init__(self, images: ImageSet, transform: Transform, replace: bool):
        self.images, self.transform, self.replace = images, transform, replace

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        first, seed = item
        problems = []
        for offset in range(min(MAX_REPLACEMENTS, len(self.images)) if self.replace else 1):
            index = (first + offset) % len(self.images)
            try:
                with random_state(seed):
                    image, target = transformed(self.transform, *self.images.load(index))
            except BadImageError as error:
                problems.append((self.images.describe(index), str(error)))
                continue
            return Sample(image, target, index, problems)
        failure = (
            f"{len(problems)} images in a row cannot be decoded, the last one is "
            f"{': '.join(problems[-1])}"
        )
        return Sample(None, problems=problems, failure=failure if self.replace else None)


class WorkerBatch(NamedTuple):
    """A `Batch` of the usable examples on its way from a worker, and the others' problems."""

    images: Tensor
    targets: Tensor
    indices: Tensor
    problems: list[tuple[str, str]]
    failure: str | None


def collate(samples: list[Sample]) -> WorkerBatch:
    usable = [part for sample in samples if sample.image is not None for part in sample.versions()]
    images, targets, indices = zip(*usable, strict=True) if usable else ((), (), ())
    return WorkerBatch(
        default_collate(list(images)) if usable else torch.empty(0),
        default_collate(list(targets)) if usable else torch.empty(0),
        torch.tensor(indices, dtype=torch.int64),
        [problem for sample in samples for problem in sample.problems],
        next((sample.failure for sample in samples if sample.failure), None),
    )


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Let a worker end only when its parent ends it.

    A scheduler that preempts a job signals all its processes, but the workers must serve the step
    in progress. SIGTERM still ends a worker if its own parent sends it: a thread looks at the
    sender, which a handler does not learn; all other threads have the signal blocked since `_start`
    forked them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()


def _start(loader: DataLoader) -> Iterator:
    """iter(loader), with SIGTERM blocked in its workers from the start.

    Later is too late: torch starts threads in a worker before any code of ours runs.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def loader_arguments(options: DataOptions) -> dict[str, Any]:
    """The arguments of DataLoader that all loaders share.

    With a generator of its own: a loader draws a number at each start, which must not shift the
    random numbers of the model.
    """
    return {
        "collate_fn": collate,
        "pin_memory": options.pin_mem and torch.cuda.is_available(),
        "worker_init_fn": _leave_signals_to_the_parent,
        "generator": torch.Generator(),
    }


def read_batches(loader: DataLoader, bad_images: BadImages) -> Iterator[Batch]:
    """The batches that hold any image.

    Raises UserError for whatever goes wrong in a worker, and for a worker that dies.
    """
    try:
        try:
            for images, targets, indices, problems, failure in _start(loader):
                bad_images.report(problems)
                if failure:
                    raise UserError(failure)
                if len(indices):
                    yield Batch(images, targets, indices)
        except (OSError, EOFError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:  # no room for a worker's semaphore
                raise RuntimeError("no shared memory") from error
            if str(error).startswith("Caught "):  # from a live worker, with its stack trace
                raise
            if getattr(error, "errno", None) == errno.EMFILE:
                raise RuntimeError("Too many open files") from error
            # The batch of a dead worker cannot be fetched; torch's handler of SIGCHLD is about to
            # raise the reason.
            time.sleep(1)
            raise UserError(
                f"reading the data failed: a worker process is gone ({error!r})"
            ) from None
    except RuntimeError as error:
        if failure := worker_died(error):
            raise failure from None
        raise


class TrainLoader:
    """The training batches of this rank, from any epoch and step on.

    Raises:
        UserError: the set is smaller than one batch on each rank.
    """

    def __init__(
        self, images: ImageSet, transform: Transform, options: DataOptions, bad_images: BadImages
    ):
        self.bad_images = bad_images
        self.sampler = TrainBatchSampler(
            len(images),
            options.batch_size,
            options.seed,
            options.rank,
            options.world_size,
            options.repeated_aug,
            options.epoch_steps,
        )
        self.steps_per_epoch = self.sampler.steps_per_epoch
        if not self.steps_per_epoch:
            processes = options.world_size
            ranks = "" if processes == 1 else f" on each of {processes} processes"
            raise UserError(
                f"the training set has {len(images)} images, less than one batch of "
                f"{options.batch_size}{ranks}: give a smaller --batch-size"
            )
        self.loader = DataLoader(
            Samples(images, transform, replace=options.bad_images == "skip"),
            batch_sampler=self.sampler,
            num_workers=options.num_workers,
            persistent_workers=options.num_workers > 0,
            **loader_arguments(options),
        )

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"start_step {start_step} is outside the epoch of {self.steps_per_epoch} steps"
            )
        self.sampler.epoch, self.sampler.start_step = epoch, start_step
        return read_batches(self.loader, self.bad_images)


class EvalLoader:
    """The validation batches of this rank, perhaps none; each usable image is on one rank only."""

    def __init__(
        self, images: ImageSet, transform: Transform, options: DataOptions, bad_images: BadImages
    ):
        self.bad_images = bad_images
        self.batch_size = options.eval_batch_size or options.batch_size
        self.loader = DataLoader(
            Samples(images, transform, replace=False),
            batch_sampler=EvalBatchSampler(
                len(images), self.batch_size, options.rank, options.world_size
            ),
            num_workers=options.num_workers,
            persistent_workers=options.num_workers > 0,
            **loader_arguments(options),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self) -> Iterator[Batch]:
        return read_batches(self.loader, self.bad_images)
