"""Examples by number, and defensive decoding of image files.

An image set holds what training needs to know of one split: how many examples, how to load one, and
its name in a message. For a file that cannot be used it raises only `BadImageError`.
"""

import io
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image

from utils.contents import HEAD, kind_of
from utils.errors import printable

from .depth import Depth, Range, UnknownDepth
from .pixels import FORMATS, StoredPixels

# Decoding takes 3 bytes a pixel and copies it a few times: a larger image is refused from its
# header alone. ImageNet's largest image has 18 million pixels.
MAX_PIXELS = 80_000_000
# Resizing the shorter side to 256 makes a strip of 1 x 30,000 pixels 2 billion pixels large.
MAX_ASPECT_RATIO = 100
# What turns an image of this EXIF orientation upright; orientation 1 is upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Decoded = TypeVar("Decoded")


class BadImageError(Exception):
    """An image that cannot be decoded, with the reason in one line."""


def decode_image(file: BinaryIO, depth: Depth | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB, or raise `BadImageError`.

    The EXIF orientation is applied, so that an image is upright as in a viewer. Transparency is
    dropped, as in torchvision's loader: a transparent pixel shows the colour stored below; but what
    is drawn in the alpha channel alone is shown on white, or on black if it is light. Of several
    frames the first is used.

    depth: of files with more than 8 bits a channel, see `depth.to_8_bits`.
    """
    return upright(*decode_stored(file, depth))


def decode_stored(file: BinaryIO, depth: Depth | None = None) -> tuple[Image.Image, int]:
    """As `decode_image`, but the pixels as they are stored, and the EXIF orientation beside them.

    For an image with a label map, which has no EXIF block of its own.
    """
    return decode(file, lambda stored: (stored.rgb(depth), _orientation(stored.image)))


def file_range(file: BinaryIO) -> Range | None:
    """What an image file tells of the depth of its data set; None: nothing, or it is unusable."""
    try:
        return decode(file, StoredPixels.range)
    except BadImageError:
        return None  # told when it is loaded


def upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def decode(file: BinaryIO, convert: Callable[[StoredPixels], Decoded]) -> Decoded:
    """`convert`(the image in `file`, which is not yet loaded), or `BadImageError`."""
    try:
        with warnings.catch_warnings():
            # Pillow would warn of odd metadata once per image and worker. Our own size limit is
            # below the one at which it warns.
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=FORMATS)
            check_size(*image.size)
            return convert(StoredPixels(file, image))
    except BadImageError:
        raise
    except UnknownDepth as reason:
        raise BadImageError(str(reason)) from None
    except Image.DecompressionBombError as error:
        raise BadImageError(f"too large: {error}") from None
    except Image.UnidentifiedImageError:
        raise BadImageError(_unidentified(file)) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise BadImageError(printable(str(error)) or type(error).__name__) from None


def _unidentified(file: BinaryIO) -> str:
    file.seek(0)
    kind = kind_of(file.read(HEAD))
    if kind in ("a TIFF", "a BigTIFF"):
        return (
            f"{kind} of a layout that Pillow does not read, such as bands that are not red, green "
            "and blue; save it as an RGB or grey TIFF, or as PNG"
        )
    known = f"not an image in a known format ({', '.join(FORMATS)})"
    return f"{known}: it is {kind}" if kind else known


def read_image(path: bytes | str, depth: Depth | None = None) -> Image.Image:
    """Open and decode the file at `path` to 8-bit RGB, or raise `BadImageError`."""
    return read_file(path, partial(decode_image, depth=depth))


def read_file(path: bytes | str, decoder: Callable[[BinaryIO], Decoded]) -> Decoded:
    """`decoder`(the open file at `path`), or `BadImageError` for what is not a readable file."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError("not a regular file")
            if status.st_size == 0:
                raise BadImageError("the file is empty")
            return decoder(file)
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from None


def _open_without_waiting(path, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe among the images must not stop the run


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImageError(f"too large: {width} x {height} pixels, at most {MAX_PIXELS:,} in all")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadImageError(
            f"too narrow: {width} x {height} pixels, at most {MAX_ASPECT_RATIO} to 1"
        )


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
        return value if value in UPRIGHT else 1
    except Exception:  # the pixels may be fine although the EXIF block is damaged
        return 1


class Example(NamedTuple):
    """What a transform is called with.

    image: an image or clip; target: whatever the transforms of its task take, such as an int, a
    tensor or a `torchvision.tv_tensors.Mask`.
    """

    image: Any
    target: Any


class ImageSet:
    """One split of a data set. Subclasses load and describe its examples.

    `labels` [N] int64 are used to choose stratified parts; None if examples have no class.
    `classes` names the classes by index; empty for a set without classes. `depth` is that of image
    files with more than 8 bits a channel; a set that decodes such overrides `deep_candidates` and
    `range`.
    """

    knows_objects = False
    depth: Depth | None = None

    def __init__(self, labels=None, classes: Sequence[str] = ()):
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes = [printable(str(name)) for name in classes]

    def __len__(self) -> int:
        """The number of examples; a set without labels must override it."""
        if self.labels is None:
            raise NotImplementedError
        return len(self.labels)

    def set_depth(self, depth: Depth | None) -> None:
        self.depth = depth

    def deep_candidates(self) -> np.ndarray:
        """Indices [K] of the examples whose files may have more than 8 bits a channel."""
        return np.empty(0, dtype=np.int64)

    def range(self, index: int) -> Range | None:
        """`file_range` of one of these. Raises `BadImageError`."""
        raise NotImplementedError

    def load(self, index: int) -> Example:
        """Raises `BadImageError`. Random numbers drawn here are reproducible, as in a transform."""
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """The name of an example in a message, on one line."""
        raise NotImplementedError

    def object_mass(self, index: int) -> np.ndarray:
        """How much of the object that decides about the label lies in each pixel [H, W].

        Only of sets that `knows_objects`, such as composed images; what a model keeps of the object
        is then measured.
        """
        raise NotImplementedError


class LabelledImages(ImageSet):
    """Images with one class each, an int, as their target. Subclasses only load the image."""

    def load_image(self, index: int) -> Image.Image:
        """The image as 8-bit RGB. Raises `BadImageError`."""
        raise NotImplementedError

    def load(self, index: int) -> Example:
        return Example(self.load_image(index), int(self.labels[index]))


class ArrayImages(LabelledImages):
    """Images held in memory: `pixels` [N, H, W] or [N, H, W, 3], uint8.

    on_black: they are [N, H, W] and show nothing but the object, before a black ground.
    """

    def __init__(
        self, pixels: np.ndarray, labels, classes: list[str], name: str, on_black: bool = False
    ):
        super().__init__(labels, classes)
        self.pixels, self.name, self.knows_objects = pixels, name, on_black

    def load_image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def describe(self, index: int) -> str:
        return f"{self.name} image {index}"

    def object_mass(self, index: int) -> np.ndarray:
        return self.pixels[index]


_JPEG = (b".jpg", b".JPG", b".jpeg", b".JPEG")


def deep_files(paths: np.ndarray) -> np.ndarray:
    """Indices of the files [N] of bytes that are no JPEGs, which always have 8 bits, by name."""
    return np.flatnonzero([not path.endswith(_JPEG) for path in paths.tolist()])


class FileImages(LabelledImages):
    """Images in files below `root`; `paths` are relative to it.

    The paths are kept in one array of bytes: a list of a million strings would be copied to every
    worker, since each access to a string writes its reference count.
    """

    def __init__(self, root: str, paths: list[str], labels, classes: list[str]):
        super().__init__(labels, classes)
        self.root = os.fsencode(root)
        self.paths = np.array([os.fsencode(path) for path in paths])

    def load_image(self, index: int) -> Image.Image:
        return read_image(os.path.join(self.root, self.paths[index]), self.depth)

    def deep_candidates(self) -> np.ndarray:
        return deep_files(self.paths)

    def range(self, index: int) -> Range | None:
        return read_file(os.path.join(self.root, self.paths[index]), file_range)

    def describe(self, index: int) -> str:
        return printable(os.fsdecode(os.path.join(self.root, self.paths[index])))


class ReaderImages(LabelledImages):
    """Images behind a timm reader with random access (`hfds/...`)."""

    def __init__(self, reader, labels, classes: list[str], name: str):
        super().__init__(labels, classes)
        self.reader, self.name = reader, name

    def _content(self, index: int) -> BinaryIO:
        try:
            with self.reader[int(index)][0] as file:
                return io.BytesIO(file.read())
        except Exception as error:  # whatever the library behind the reader raises
            raise BadImageError(printable(repr(error))) from None

    def load_image(self, index: int) -> Image.Image:
        return decode_image(self._content(index), self.depth)

    def deep_candidates(self) -> np.ndarray:
        return np.arange(len(self))

    def range(self, index: int) -> Range | None:
        return file_range(self._content(index))

    def describe(self, index: int) -> str:
        return f"{self.name} image {index}"


class SubsetImages(ImageSet):
    """The examples `indices` of another set."""

    def __init__(self, images: ImageSet, indices: np.ndarray):
        labels = None if images.labels is None else images.labels[indices]
        super().__init__(labels, images.classes)
        self.images, self.indices = images, indices
        self.knows_objects = images.knows_objects

    def __len__(self) -> int:
        return len(self.indices)

    def set_depth(self, depth: Depth | None) -> None:
        self.images.set_depth(depth)

    def deep_candidates(self) -> np.ndarray:
        return np.flatnonzero(np.isin(self.indices, self.images.deep_candidates()))

    def range(self, index: int) -> Range | None:
        return self.images.range(self.indices[index])

    def load(self, index: int) -> Example:
        return self.images.load(self.indices[index])

    def describe(self, index: int) -> str:
        return self.images.describe(self.indices[index])

    def object_mass(self, index: int) -> np.ndarray:
        return self.images.object_mass(self.indices[index])


def fixed_part(images: ImageSet, count: int) -> SubsetImages:
    """`count` examples, the same on every machine: stratified by class, or else evenly spread."""
    if images.labels is None:
        return SubsetImages(images, spread_choice(len(images), count))
    return SubsetImages(images, stratified_choice(images.labels, count))


def spread_choice(total: int, count: int) -> np.ndarray:
    """`count` sorted indices below `total`, one drawn from each of `count` equal stretches."""
    edges = np.arange(count + 1) * total // count
    draws = np.random.RandomState(0).random_sample(count)
    return edges[:-1] + np.floor(draws * np.diff(edges)).astype(np.int64)


def stratified_choice(labels: np.ndarray, count: int) -> np.ndarray:
    """`count` sorted indices with every class in its share of `labels` [N], on every machine alike.

    Shares are rounded by largest remainder; ties go to the smaller class index.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * count / len(labels)
    taken = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(taken - shares, kind="stable")
    taken[by_remainder[: count - taken.sum()]] += 1
    generator = np.random.RandomState(0)  # numpy guarantees its sequence across versions
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:number]
        for label, number in zip(classes, taken, strict=True)
    ]
    return np.sort(np.concatenate(chosen))
