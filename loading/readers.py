"""Data sets that timm reads: WebDataset shards (`wds/`), Hugging Face (`hfds/`, `hfids/`),
TensorFlow (`tfds/`).

All but `hfds/` are streams: images come in the order of the shards and have no number.

    python main.py --data-set wds/birds --data-path shards --train-split 'birds-train-{000..063}.tar|80000' \\
        --val-split 'birds-val-{000..007}.tar|10000'

The splits are names if the folder of the shards has timm's `_info.json`. The number of classes is
its `num_classes` (or the length of its `class_names`); without it, the labels in the shards are
read once.

What differs from other data sets: timm decodes (EXIF orientation is not applied, 16-bit grey is
clipped, and Pillow's own size limit holds); `--subset` and `--repeated-aug` are not available; an
epoch depends on the number of workers too, and timm fills it up to whole batches for each worker;
resuming within an epoch reads on to the step; in evaluation every rank reads all shards and keeps
its share, so that each image counts once.
"""

import importlib
import itertools
import logging
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from timm.data import create_dataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from utils.errors import UsageError, UserError, first_line, printable
from utils.seeding import derive_seed, random_state

from .images import ReaderImages
from .loaders import BadImages, Batch, Data, Sample, assemble, loader_options, read_batches
from .transforms import eval_transform, train_transform


def build_timm_data(args, img_size: int, rank: int, world_size: int, train: bool) -> Data:
    """`datasets.build_data` for the names that timm reads."""
    if args.data_set.lower().startswith("hfds/"):
        splits = [
            _random_access(args, split)
            for split in ([args.train_split] if train else []) + [args.val_split]
        ]
        return assemble(args, img_size, splits[0] if train else None, splits[-1], rank, world_size)
    if args.subset is not None:
        raise UsageError(
            f"--subset: {args.data_set} is read as a stream, of which no part can be chosen"
        )
    bad_images = BadImages(args.bad_images)
    val_reader = _open(args, args.val_split, training=False)
    train_reader = _open(args, args.train_split, training=True) if train else None
    classes = _class_names(
        args, [reader for reader in (train_reader, val_reader) if reader is not None]
    )
    train_loader = None
    if train_reader is not None:
        train_reader.dist_rank, train_reader.dist_num_replicas = rank, world_size
        stream = Stream(
            args,
            train_reader,
            train_transform(args, img_size),
            len(classes),
            rank,
            world_size,
            True,
        )
        train_loader = StreamTrainLoader(args, stream, bad_images)
    val_reader.dist_rank, val_reader.dist_num_replicas = 0, 1
    stream = Stream(
        args, val_reader, eval_transform(args, img_size), len(classes), rank, world_size, False
    )
    val_loader = StreamEvalLoader(args, stream, bad_images)
    return Data(
        classes, None, None, val_reader.num_samples or None, train_loader, val_loader, bad_images
    )


class Stream(IterableDataset):
    """Lists of samples, a batch each, from a timm reader; what timm leaves out is told in the
    samples.

    In training every batch is full; `epoch` is to be set before iterating. In evaluation the images
    are dealt out to the ranks in turn.
    """

    def __init__(
        self, args, reader, transform, num_classes: int, rank: int, world_size: int, training: bool
    ):
        self.name, self.seed, self.batch_size = args.data_set, args.seed, args.batch_size
        self.reader, self.transform, self.num_classes = reader, transform, num_classes
        self.rank, self.world_size, self.training = rank, world_size, training
        self.epoch = 0

    def __iter__(self) -> Iterator[list[Sample]]:
        batch, usable = [], 0
        for sample in self._samples(get_worker_info().id):
            batch.append(sample)
            usable += sample.image is not None
            if usable == self.batch_size:
                yield batch
                batch, usable = [], 0
        if batch and self.training:
            batch = [sample._replace(image=None) for sample in batch]
        if batch:
            yield batch

    def _samples(self, worker: int) -> Iterator[Sample]:
        skipped = _Skipped(f"{self.name}, worker {worker}")
        place = 0
        try:
            for place, (image, target) in enumerate(self.reader):
                problems = skipped.take(place)
                if not 0 <= int(target) < self.num_classes:
                    yield Sample(
                        None,
                        failure=f"{self.name}: label {target} is outside the {self.num_classes} "
                        "classes",
                    )
                elif self.training or place % self.world_size == self.rank:
                    with random_state(derive_seed(self.seed, self.epoch, self.rank, worker, place)):
                        yield Sample(self.transform(image), int(target), problems=problems)
                elif problems:
                    yield Sample(None, problems=problems)
        except Exception as error:  # whatever a reader raises has to leave the worker as one line
            yield Sample(
                None,
                failure=f"{self.name}: reading failed after {place} images: "
                f"{printable(repr(error))}",
            )
        yield Sample(None, problems=skipped.take(place))


class _Skipped(logging.Handler):
    """Collects what timm's WebDataset reader only logs: the images and shards that it leaves out."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.reasons: list[str] = []
        logger = logging.getLogger("timm.data.readers.reader_wds")
        logger.handlers, logger.propagate = [self], False

    def emit(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]  # timm logs inside its exception handler
        self.reasons.append(printable(repr(error) if error else record.getMessage()))

    def take(self, place: int) -> list[tuple[str, str]]:
        """The problems since the last call, named after the images of this worker that came before."""
        problems = [(f"{self.source}, after {place} images", reason) for reason in self.reasons]
        self.reasons = []
        return problems


def _stream_loader(args, stream: Stream) -> DataLoader:
    """At least one worker, and new ones for each epoch: timm's readers keep their shuffling from
    one to the next.
    """
    workers = max(1, args.num_workers)
    if hasattr(stream.reader, "split_info") and hasattr(stream.reader.split_info, "filenames"):
        ranks = stream.world_size if stream.training else 1
        shards = len(stream.reader.split_info.filenames)
        if shards < ranks:
            raise UserError(f"{stream.name}: {shards} shards are too few for {ranks} processes")
        workers = min(workers, shards // ranks)
    stream.reader.set_loader_cfg(num_workers=workers)
    return DataLoader(stream, batch_size=None, num_workers=workers, **loader_options(args))


class StreamTrainLoader:
    """`loaders.TrainLoader` for a stream."""

    def __init__(self, args, stream: Stream, bad_images: BadImages):
        self.stream, self.bad_images = stream, bad_images
        self.loader = _stream_loader(args, stream)
        self.steps_per_epoch = len(stream.reader) // args.batch_size

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"start_step {start_step} is outside the epoch of {self.steps_per_epoch} steps"
            )
        self.stream.epoch = epoch
        self.stream.reader.set_epoch(epoch)
        self.loader.generator.manual_seed(derive_seed(self.stream.seed, epoch, self.stream.rank))
        step = 0
        for batch in itertools.islice(
            read_batches(self.loader, self.bad_images), self.steps_per_epoch
        ):
            step += 1
            if step > start_step:
                yield batch
        if step < self.steps_per_epoch:
            # The other ranks would wait for this one in their next step.
            raise UserError(
                f"{self.stream.name}: the stream ended after {step} of {self.steps_per_epoch} steps"
            )


class StreamEvalLoader:
    """`loaders.EvalLoader` for a stream."""

    def __init__(self, args, stream: Stream, bad_images: BadImages):
        self.bad_images = bad_images
        self.loader = _stream_loader(args, stream)

    def batches(self) -> Iterator[Batch]:
        return read_batches(self.loader, self.bad_images)


def _open(args, split: str, training: bool):
    """timm's reader of one split."""
    name, path = args.data_set, args.data_path
    webdataset = name.lower().startswith("wds/")
    if webdataset and path is None:
        raise UsageError(f"--data-set {name} needs --data-path: the folder of the shards")
    local = path is not None and "://" not in path and not path.startswith("pipe:")
    if local and not Path(path).is_dir():
        raise UserError(f"--data-path {printable(path)}: no such folder")
    if name.lower().startswith("hf"):
        _let_timm_import_hugging_face(name)
    try:
        data_set = create_dataset(
            name,
            path,
            split=split,
            is_training=training,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    except ImportError as error:
        raise UserError(
            f"--data-set {name} needs a package that is not installed: {error}"
        ) from None
    except Exception as error:  # readers raise what their libraries raise
        raise UserError(
            f"{name}: split {split!r} cannot be opened: {printable(str(error) or repr(error))}"
        ) from None
    reader = data_set.reader
    if webdataset and local:
        for shard in reader.split_info.filenames:
            if not (Path(path) / shard).is_file():
                raise UserError(f"{name}: no shard {printable(shard)} in {printable(path)}")
    return reader


def _class_names(args, readers: list) -> list[str]:
    reader = readers[0]
    info = getattr(reader, "info", None)
    if isinstance(info, dict) and isinstance(info.get("class_names"), list):
        return [str(name) for name in info["class_names"]]
    if isinstance(info, dict) and isinstance(info.get("num_classes"), int):
        return [str(label) for label in range(info["num_classes"])]
    if getattr(reader, "class_to_idx", None):
        return [
            printable(str(name))
            for name in sorted(reader.class_to_idx, key=reader.class_to_idx.get)
        ]
    if not args.data_set.lower().startswith("wds/"):
        raise UserError(f"{args.data_set}: the number of classes is unknown")
    return [
        str(label) for label in range(1 + max(_largest_label(args, reader) for reader in readers))
    ]


def _largest_label(args, reader) -> int:
    """The largest label in the .cls members of a reader's shards."""
    largest = -1
    for shard in reader.split_info.filenames:
        path = Path(args.data_path) / shard
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.name.endswith(".cls"):
                        largest = max(largest, int(archive.extractfile(member).read()))
        except (OSError, ValueError, tarfile.TarError) as error:
            reason = printable(first_line(error)).rstrip(":")
            raise UserError(
                f"{printable(str(path))}: cannot read the labels ({reason}); write num_classes "
                "into _info.json instead"
            ) from None
    if largest < 0:
        raise UserError(
            f"{args.data_set}: no .cls labels in the shards; write num_classes into _info.json"
        )
    return largest


def _random_access(args, split: str) -> ReaderImages:
    reader = _open(args, split, training=False)
    targets = np.fromiter(reader.iter_targets(), dtype=np.int64)
    if not len(targets):
        raise UserError(f"{args.data_set}: split {split!r} has no images")
    names = reader.class_to_idx or {str(label): label for label in range(1 + targets.max())}
    return ReaderImages(reader, targets, sorted(names, key=names.get), f"{args.data_set} {split}")


def _let_timm_import_hugging_face(name: str) -> None:
    """timm imports Hugging Face's package as `datasets`, a name under which this project's own file
    comes first.
    """
    here = Path(__file__).resolve().parents[1]
    own = sys.modules.get("datasets")
    if own is not None and Path(own.__file__).resolve().parent != here:
        return
    path = sys.path
    sys.path = [entry for entry in path if Path(entry).resolve() != here]
    sys.modules.pop("datasets", None)
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        sys.modules["datasets"] = own
        raise UserError(
            f"--data-set {name} needs Hugging Face's package: pip install datasets ({error})"
        ) from None
    finally:
        sys.path = path
