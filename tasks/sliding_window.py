"""Prediction of images larger than a model's input: the mean logits of windows that overlap.

Window positions and the mean are those of mmsegmentation's slide test. Two ways give the same
labels: `sliding_logits` holds the logits of the whole image, `label_bands` only those of the rows
that a window covers.

B images, H x W pixels, crop h x w, C classes, N windows.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from models.upernet import resize

Forward = Callable[[Tensor], Tensor]
"""Images [N, 3, h, w] -> logits [N, C, h', w'] at any resolution.

What else the model returns for each window (its gates and kept patches) is collected by the
function itself: it is called in the order of the windows.
"""
Size = tuple[int, int]  # height, width
CLASSES_AT_ONCE = 16


def positions(length: int, crop: int, stride: int) -> list[int]:
    """Where windows start along one axis; the last one is pulled back to the border.

    Windows must not leave a gap: ValueError for a stride outside 1 ... crop.
    """
    if length < 1 or not 1 <= stride <= crop:
        raise ValueError(f"length {length}, crop {crop}, stride {stride}: 1 <= stride <= crop")
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [min(i * stride, max(length - crop, 0)) for i in range(count)]


def windows(size: Size, crop: Size, stride: Size) -> list[tuple[int, int]]:
    """(top, left) of each window, row by row. In an image smaller than the crop: one, at (0, 0)."""
    rows, columns = (positions(*axis) for axis in zip(size, crop, stride, strict=True))
    return [(top, left) for top in rows for left in columns]


def coverage(size: Size, crop: Size, stride: Size, device: torch.device | str = "cpu") -> Tensor:
    """How many windows cover each pixel: [H, W] float32."""
    rows, columns = (
        _covering(positions(*axis), axis[1], 0, axis[0], device)
        for axis in zip(size, crop, stride, strict=True)
    )
    return rows[:, None] * columns


def _covering(
    starts: Iterable[int], crop: int, first: int, end: int, device: torch.device | str
) -> Tensor:
    """Windows over each of the places first ... end - 1 of an axis: [end - first] float32."""
    places = torch.arange(first, end, device=device)
    # Comparisons with numbers, on the device: a copy from the host would make the host wait.
    return sum(((places >= start) & (places < start + crop)).float() for start in starts)


def _window_logits(
    forward: Forward, crops: Iterable[Tensor], crop: Size, batch: int
) -> Iterator[Tensor]:
    """Logits [C, h, w] of each crop [3, <= h, <= w], at the crop's own resolution, in order."""
    pending = []

    def answer() -> Iterator[Tensor]:
        for logits in forward(torch.stack(pending)):
            if logits.shape[-2:] != crop:
                logits = resize(logits[None], crop)[0]
            yield logits
        pending.clear()

    for image in crops:
        height, width = image.shape[-2:]
        pending.append(F.pad(image, (0, crop[1] - width, 0, crop[0] - height)))
        if len(pending) == batch:
            yield from answer()
    if pending:
        yield from answer()


@torch.no_grad()
def sliding_logits(
    forward: Forward, images: Tensor, crop: Size, stride: Size, batch: int = 8
) -> Tensor:
    """Mean of the windows' logits over normalised images [B, 3, H, W] -> [B, C, H, W] float32.

    The windows of all images, image by image, are computed `batch` at a time. An image smaller than
    the crop is padded with 0 right and below; what is predicted there is cut off.
    """
    size = images.shape[-2:]
    places = windows(size, crop, stride)
    crops = (_cut(image, *place, *crop) for image in images for place in places)
    answers = _window_logits(forward, crops, tuple(crop), batch)
    total = None
    for index in range(len(images)):
        for top, left in places:
            logits = next(answers)
            if total is None:
                total = logits.new_zeros((len(images), len(logits), *size), dtype=torch.float32)
            part = _cut(total[index], top, left, *crop)
            part += logits[:, : part.shape[1], : part.shape[2]]
    return total.div_(coverage(size, crop, stride, total.device))


def _cut(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """A view of [..., H, W], smaller where it would reach over the border."""
    return image[..., top : top + height, left : left + width]


def labels_of(logits: Tensor, size: Size | None = None) -> Tensor:
    """logits [B, C, H, W], resized (bilinear) to `size` unless None -> labels [B, *size] int64.

    A few classes are resized at a time: of all, a photograph takes gigabytes.
    """
    if size is None or logits.shape[-2:] == tuple(size):
        return logits.argmax(1)
    best = labels = None
    for first in range(0, logits.shape[1], CLASSES_AT_ONCE):
        part = resize(logits[:, first : first + CLASSES_AT_ONCE].float(), tuple(size))
        value, index = part.max(1)
        if best is None:
            best, labels = value, index
        else:
            labels = torch.where(value > best, index + first, labels)
            best = torch.maximum(value, best)
    return labels


@torch.no_grad()
def label_bands(
    forward: Forward,
    read: Callable[[int, int, int, int], Tensor],
    size: Size,
    crop: Size,
    stride: Size,
    batch: int = 8,
) -> Iterator[tuple[int, Tensor]]:
    """Labels of an image of `size` that is too large for memory, from top to bottom.

    The logits of h rows are held, C h W float32 (and those of the current windows), whatever H is.
    A horizontal band is finished when no later window reaches it. The image is read, and its labels
    are given, at its own resolution, for any H and W: to resize either, resize before and after.

    Args:
        read: (top, left, height, width) -> that part of the image, [3, height, width], normalised,
            on the model's device. Parts lie inside the image and come row by row.

    Yields:
        (top, labels [rows, W] int64 on the device of the logits), without gap or overlap.
    """
    height, width = size
    rows, columns = (positions(*axis) for axis in zip(size, crop, stride, strict=True))
    total = None  # [C, min(h, H), W]; its first row is the image's row `top`
    for top, following in zip(rows, [*rows[1:], height], strict=True):
        held = min(crop[0], height - top)
        crops = (read(top, left, held, min(crop[1], width - left)) for left in columns)
        for left, logits in zip(
            columns, _window_logits(forward, crops, tuple(crop), batch), strict=True
        ):
            if total is None:
                total = logits.new_zeros((len(logits), held, width), dtype=torch.float32)
                across = _covering(columns, crop[1], 0, width, total.device)
            part = _cut(total, 0, left, held, crop[1])
            part += logits[:, :held, : part.shape[2]]
        done = following - top
        down = _covering(rows, crop[0], top, following, total.device)
        mean = total[:, :done].div_(down[:, None] * across)
        yield top, mean.argmax(0)
        _scroll(total, done)


def _scroll(total: Tensor, done: int) -> None:
    """Move the rows of [C, rows, W] up by `done` in place, zeros below."""
    for plane in total:  # one by one: a copy of all would be as large as they are
        plane[: len(plane) - done] = plane[done:].clone()
        plane[len(plane) - done :] = 0


def sliding_labels(
    forward: Forward,
    read: Callable[[int, int, int, int], Tensor],
    size: Size,
    crop: Size,
    stride: Size,
    batch: int = 8,
) -> Tensor:
    """`label_bands` put together: [H, W] uint8 on the CPU, for at most 256 classes."""
    labels = torch.empty(size, dtype=torch.uint8)
    for top, band in label_bands(forward, read, size, crop, stride, batch):
        labels[top : top + len(band)] = band
    return labels


def parts_of(image: Tensor) -> Callable[[int, int, int, int], Tensor]:
    """`read` of an image [3, H, W] that is in memory."""
    return lambda *part: _cut(image, *part)
