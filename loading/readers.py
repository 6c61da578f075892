"""Data sets that timm reads: WebDataset (`wds/`), Hugging Face (`hfds/`, `hfids/`), `tfds/`.

All but `hfds/` are streams: images come in the order of the shards and have no index.

    python main.py --data-set wds/birds --data-path shards \\
        --train-split 'birds-train-{000..063}.tar|80000' \\
        --val-split 'birds-val-{000..007}.tar|10000'

The splits are names if the folder of the shards has timm's `_info.json`. The number of classes is
its `num_classes` (or the length of its `class_names`); without it, the labels in the shards are
read once.

Differences from other data sets: timm decodes (EXIF orientation is not applied, colours keep the
upper 8 of 16 bits, `--bit-depth auto` looks at no sample, and Pillow's own size limit holds);
`--subset` and `--repeated-aug` are not available; an
epoch depends on the number of workers too, and timm fills it up to whole batches for each worker;
resuming within an epoch reads up to the step; in evaluation every rank reads all shards and keeps
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
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from utils.errors import UsageError, UserError, first_line, printable
from utils.seeding import derive_seed, random_state

from .bad_images import BadImages
from .data import Data, assemble, told_empty
from .depth import UnknownDepth
from .images import ReaderImages
from .loaders import Batch, Sample, loader_arguments, read_batches, transformed
from .options import DataOptions
from .pixels import StoredPixels
from .transforms import Transform, Transforms
from .walking import IMAGE_ENDINGS

_logger = logging.getLogger(__name__)


def build_timm_data(options: DataOptions, transforms: Transforms, train: bool) -> Data:
    """`datasets.build_data` for the names that timm reads."""
    name = options.data_set
    if name.lower().startswith("hfds/"):
        train_images = _random_access(options, options.train_split) if train else None
        return assemble(
            options, transforms, train_images, _random_access(options, options.val_split)
        )
    if options.subset is not None:
        raise UsageError(f"--subset: {name} is read as a stream, of which no part can be chosen")
    bad_images = BadImages(options.bad_images)
    val_reader = _open(options, options.val_split, training=False)
    train_reader = _open(options, options.train_split, training=True) if train else None
    classes = _class_names(
        options, [reader for reader in (train_reader, val_reader) if reader is not None]
    )
    train_loader = None
    if train_reader is not None:
        train_reader.dist_rank, train_reader.dist_num_replicas = options.rank, options.world_size
        stream = Stream(options, train_reader, transforms.train, len(classes), training=True)
        train_loader = StreamTrainLoader(stream, bad_images)
    val_reader.dist_rank, val_reader.dist_num_replicas = 0, 1
    stream = Stream(options, val_reader, transforms.eval, len(classes), training=False)
    val_loader = StreamEvalLoader(stream, bad_images)
    return Data(
        classes,
        None,
        None,
        val_reader.num_samples or None,
        train_loader,
        val_loader,
        bad_images,
        val_loader,
        bit_depth=options.bit_depth,
    )


# Endings of the images in shards, in timm's words; .jpg is the key that it decodes to.
_KEYS = [ending[1:] for ending in IMAGE_ENDINGS]


class Stream(IterableDataset):
    """Lists of samples, one per batch, from a timm reader; the samples carry what timm left out.

    In training every batch is full; set `epoch` before iterating. In evaluation the images are
    dealt out to the ranks in turn.
    """

    def __init__(
        self, options: DataOptions, reader, transform: Transform, num_classes: int, training: bool
    ):
        self.options, self.name = options, options.data_set
        self.reader, self.transform, self.num_classes = reader, transform, num_classes
        self.training = training
        self.batch_size = options.batch_size
        if not training:
            self.batch_size = options.eval_batch_size or options.batch_size
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
        rank, world_size = self.options.rank, self.options.world_size
        place = 0
        try:
            for place, (image, label) in enumerate(self.reader):
                problems = skipped.take(place)
                if not 0 <= int(label) < self.num_classes:
                    yield Sample(
                        None,
                        failure=f"{self.name}: label {label} is outside the {self.num_classes} "
                        "classes, whose labels count from 0",
                    )
                elif self.training or place % world_size == rank:
                    if isinstance(image, Image.Image):
                        try:
                            image = StoredPixels(None, image).rgb(self.options.bit_depth)
                        except UnknownDepth as reason:
                            name = f"{skipped.source}, after {place} images"
                            yield Sample(None, problems=[*problems, (name, str(reason))])
                            continue
                    seed = derive_seed(self.options.seed, self.epoch, rank, worker, place)
                    with random_state(seed):
                        yield Sample(
                            *transformed(self.transform, image, int(label)), problems=problems
                        )
                elif problems:
                    yield Sample(None, problems=problems)
        except Exception as error:  # whatever a reader raises must leave the worker as one line
            yield Sample(
                None,
                failure=f"{self.name}: reading failed after {place} images: "
                f"{printable(repr(error))}",
            )
        yield Sample(None, problems=skipped.take(place))


class _Skipped(logging.Handler):
    """Collects the images and shards that timm's WebDataset reader leaves out and only logs."""

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
        """The problems since the last call, named by the number of this worker's images before."""
        problems = [(f"{self.source}, after {place} images", reason) for reason in self.reasons]
        self.reasons = []
        return problems


def _stream_loader(stream: Stream) -> DataLoader:
    """A loader of at least one worker, not persistent: timm's readers keep shuffling state."""
    options = stream.options
    workers = max(1, options.num_workers)
    if hasattr(stream.reader, "split_info") and hasattr(stream.reader.split_info, "filenames"):
        ranks = options.world_size if stream.training else 1
        shards = len(stream.reader.split_info.filenames)
        if shards < ranks:
            raise UserError(f"{stream.name}: {shards} shards are too few for {ranks} processes")
        workers = min(workers, shards // ranks)
    stream.reader.set_loader_cfg(num_workers=workers)
    return DataLoader(stream, batch_size=None, num_workers=workers, **loader_arguments(options))


class StreamTrainLoader:
    """`loaders.TrainLoader` for a stream."""

    def __init__(self, stream: Stream, bad_images: BadImages):
        self.stream, self.bad_images = stream, bad_images
        self.loader = _stream_loader(stream)
        self.steps_per_epoch = len(stream.reader) // stream.batch_size

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"start_step {start_step} is outside the epoch of {self.steps_per_epoch} steps"
            )
        self.stream.epoch = epoch
        self.stream.reader.set_epoch(epoch)
        options = self.stream.options
        self.loader.generator.manual_seed(derive_seed(options.seed, epoch, options.rank))
        step = 0
        for batch in itertools.islice(
            read_batches(self.loader, self.bad_images), self.steps_per_epoch
        ):
            step += 1
            if step > start_step:
                yield batch
        if step < self.steps_per_epoch:
            # Ending here quietly would leave the other ranks waiting in their next step.
            raise UserError(
                f"{self.stream.name}: the stream ended after {step} of {self.steps_per_epoch} steps"
            )


class StreamEvalLoader:
    """`loaders.EvalLoader` for a stream."""

    def __init__(self, stream: Stream, bad_images: BadImages):
        self.bad_images = bad_images
        self.batch_size = stream.batch_size
        self.loader = _stream_loader(stream)

    def batches(self) -> Iterator[Batch]:
        return read_batches(self.loader, self.bad_images)


def _open(options: DataOptions, split: str, training: bool):
    """timm's reader of one split."""
    name, path = options.data_set, options.data_path
    webdataset = name.lower().startswith("wds/")
    if webdataset and path is None:
        raise UsageError(f"--data-set {name} needs --data-path: the folder of the shards")
    local = path is not None and "://" not in path and not path.startswith("pipe:")
    if local and not Path(path).is_dir():
        raise UserError(f"--data-path {printable(path)}: no such folder")
    if name.lower().startswith("hf"):
        _let_timm_import_hugging_face(name)
    wanted = {"input_key": ";".join(_KEYS), "input_img_mode": ""} if webdataset else {}
    try:
        data_set = create_dataset(
            name,
            path,
            split=split,
            is_training=training,
            batch_size=options.batch_size,
            seed=options.seed,
            **wanted,
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
        _check_members(Path(path) / reader.split_info.filenames[0])
    return reader


def _check_members(shard: Path) -> None:
    """Raise UserError if the first members of a shard have endings that are not read."""
    try:
        with tarfile.open(shard) as archive:
            names = [member.name for member in itertools.islice(archive, 20) if member.isfile()]
    except (OSError, tarfile.TarError):
        return  # told by whoever reads it
    endings = dict.fromkeys("." + name.rpartition("/")[2].partition(".")[2] for name in names)
    if names and not any(ending[1:].lower() in _KEYS for ending in endings):
        raise UserError(
            f"{printable(str(shard))}: no images in its first samples, whose members end in "
            f"{', '.join(map(printable, endings))}; read are .{', .'.join(_KEYS)}"
        )


def _class_names(options: DataOptions, readers: list) -> list[str]:
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
    if not options.data_set.lower().startswith("wds/"):
        raise UserError(f"{options.data_set}: the number of classes is unknown")
    labels = [_labels(options, reader) for reader in readers]
    classes = [str(label) for label in range(1 + max(set().union(*labels)))]
    empty = sorted({*range(len(classes))} - labels[0])
    if empty and len(readers) > 1:  # the first one is of the training
        _logger.warning("%s: %s", options.data_set, told_empty(empty, classes))
    return classes


def _labels(options: DataOptions, reader) -> set[int]:
    """The labels in the .cls members of a reader's shards."""
    labels: set[int] = set()
    for shard in reader.split_info.filenames:
        path = Path(options.data_path) / shard
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.name.endswith(".cls"):
                        labels.add(int(archive.extractfile(member).read()))
        except (OSError, ValueError, tarfile.TarError) as error:
            reason = printable(first_line(error)).rstrip(":")
            raise UserError(
                f"{printable(str(path))}: cannot read the labels ({reason}); write num_classes "
                "into _info.json instead"
            ) from None
    if not labels:
        raise UserError(
            f"{options.data_set}: no .cls labels in the shards; write num_classes into _info.json"
        )
    return labels


def _random_access(options: DataOptions, split: str) -> ReaderImages:
    reader = _open(options, split, training=False)
    labels = np.fromiter(reader.iter_targets(), dtype=np.int64)
    if not len(labels):
        raise UserError(f"{options.data_set}: split {split!r} has no images")
    names = reader.class_to_idx or {str(label): label for label in range(1 + labels.max())}
    return ReaderImages(reader, labels, sorted(names, key=names.get), f"{options.data_set} {split}")


def _let_timm_import_hugging_face(name: str) -> None:
    """Let timm import Hugging Face's `datasets`, a name that this project's own file shadows."""
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
