"""What happens to an example between its file and the model.

A transform is called with (image, target) and returns both: the image as a tensor [3, H, W] (a
clip: [3, T, H, W]), the target as a tensor of any shape or a number. This is the convention of a
`torchvision.transforms.v2.Compose`, which can be used as it is. A transform may also return a list
of images and one of targets: versions of the example, each of which counts in the batch. The
transforms below are classification's: timm's, with DeiT's choices. They take the image alone, and
`ImageOnly` adapts them.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image, ImageOps
from timm.data import create_transform
from timm.layers import to_2tuple
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from utils.errors import UsageError
from utils.images import MEAN, SMALL_IMAGE, STD, ImageSize

Transform = Callable[[Any, Any], tuple[Tensor, Any]]


class Transforms(NamedTuple):
    """A task's transforms of its examples; `train` may be None if nothing is trained.

    quick: that of the evaluations between the epochs of a training and of the calibration, where
    one of the whole takes long; None: `eval`. Streams evaluate with `eval` alone.
    """

    train: Transform | None
    eval: Transform
    quick: Transform | None = None


class ImageOnly:
    """Turns a transform of an image into one of an example; the target stays as it is."""

    def __init__(self, transform: Callable[[Any], Tensor]):
        self.transform = transform

    def __call__(self, image: Any, target: Any) -> tuple[Tensor, Any]:
        return self.transform(image), target


def classification_transforms(args, img_size: ImageSize, train: bool = True) -> Transforms:
    """The transforms selected by the flags of the group "augmentation".

    Raises:
        UsageError: as in `train_transform`.
    """
    return Transforms(
        ImageOnly(train_transform(args, img_size)) if train else None,
        ImageOnly(eval_transform(args, img_size)),
    )


def train_transform(args, img_size: ImageSize):
    """RGB image -> [3, H, W] of the given size, augmented and normalised.

    Raises:
        UsageError: timm does not know the policy given by --aa.
    """
    policy = None if args.aa in ("", "none", "None") else args.aa
    try:
        transform = create_transform(
            img_size,
            is_training=True,
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=policy,
            interpolation=args.train_interpolation,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            mean=MEAN,
            std=STD,
        )
    except (AssertionError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise UsageError(f"--aa {args.aa!r} is not a policy that timm knows ({error})") from None
    for step in transform.transforms:
        _allow_zero_bits(step)
    if shown_whole(args, img_size):
        transform.transforms[0] = transforms.Compose(
            [
                transforms.Resize(to_2tuple(img_size), InterpolationMode.BICUBIC),
                transforms.RandomCrop(img_size, padding=args.crop_padding),
            ]
        )
    return transform


def shown_whole(args, img_size: ImageSize) -> bool:
    """Whether images are resized to the model's size and not cropped; see `--whole-images`."""
    if args.whole_images is None:
        return max(to_2tuple(img_size)) <= SMALL_IMAGE
    return args.whole_images


def _allow_zero_bits(step) -> None:
    """Make timm's policies safe for Posterize with 0 bits.

    Their stronger magnitudes ask for it now and then. Older versions of Pillow returned a black
    image, and the published recipes trained with that; version 13 raises ValueError.
    """
    policies = getattr(step, "policy", [getattr(step, "ops", [])])
    for operation in itertools.chain.from_iterable(policies):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_unused) -> Image.Image:
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def eval_transform(args, img_size: ImageSize):
    """RGB image -> [3, H, W], normalised: the centre crop, or the whole image."""
    whole = shown_whole(args, img_size)
    return create_transform(
        img_size,
        is_training=False,
        interpolation="bicubic",
        crop_pct=1.0 if whole else args.eval_crop_ratio,
        crop_mode="squash" if whole else "center",
        mean=MEAN,
        std=STD,
    )


def seen_region(
    size: tuple[int, int], args, img_size: ImageSize
) -> tuple[float, float, float, float]:
    """The part of an image that `eval_transform` shows: left, top, right, bottom in pixels.

    `size` is (width, height). The image is resized until it just covers `img_size` / crop ratio,
    and its centre cropped; this follows torchvision's rounding, and timm's if the size is not
    square.
    """
    width, height = size
    if shown_whole(args, img_size):
        return 0.0, 0.0, float(width), float(height)
    rows, columns = to_2tuple(img_size)
    least = [math.floor(side / args.eval_crop_ratio) for side in (columns, rows)]
    if rows == columns:
        longer = int(least[0] * max(size) / min(size))
        resized = (least[0], longer) if width <= height else (longer, least[0])
    else:
        ratio = min(width / least[0], height / least[1])
        resized = round(width / ratio), round(height / ratio)
    left, top = (
        int(round((side - crop) / 2)) for side, crop in zip(resized, (columns, rows), strict=True)
    )
    x, y = width / resized[0], height / resized[1]  # original pixels per resized pixel
    return left * x, top * y, (left + columns) * x, (top + rows) * y
