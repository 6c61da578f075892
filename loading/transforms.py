"""What happens to an image between its file and the model: timm's transforms with DeiT's choices."""

import itertools
import math

from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from utils.errors import UsageError

MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
# DeiT's rule for CIFAR: images of this size are not cut from larger ones but shifted within a
# padded border.
SMALL_IMAGE = 32


def train_transform(args, img_size: int):
    """RGB image -> [3, img_size, img_size], augmented and normalised.

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
    if img_size <= SMALL_IMAGE:
        transform.transforms[0] = transforms.Compose(
            [
                transforms.Resize((img_size, img_size), InterpolationMode.BICUBIC),
                transforms.RandomCrop(img_size, padding=args.crop_padding),
            ]
        )
    return transform


def _allow_zero_bits(step) -> None:
    """Makes timm's policies draw Posterize with 0 bits safely.

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


def eval_transform(args, img_size: int):
    """RGB image -> [3, img_size, img_size], normalised; the centre crop, or the whole image if it
    is small.
    """
    whole = img_size <= SMALL_IMAGE
    return create_transform(
        img_size,
        is_training=False,
        interpolation="bicubic",
        crop_pct=1.0 if whole else args.eval_crop_ratio,
        crop_mode="squash" if whole else "center",
        mean=MEAN,
        std=STD,
    )


def seen_region(size: tuple[int, int], args, img_size: int) -> tuple[float, float, float, float]:
    """The part of an image of `size` (width, height) that `eval_transform` shows: left, top, right,
    bottom in pixels.

    The shorter side is resized to img_size / crop ratio and the centre cut out; torchvision's
    rounding is followed.
    """
    width, height = size
    if img_size <= SMALL_IMAGE:
        return 0.0, 0.0, float(width), float(height)
    shorter = math.floor(img_size / args.eval_crop_ratio)
    longer = int(shorter * max(size) / min(size))
    resized = (shorter, longer) if width <= height else (longer, shorter)
    left, top = (int(round((side - img_size) / 2)) for side in resized)
    x, y = width / resized[0], height / resized[1]  # original pixels per resized pixel
    return left * x, top * y, (left + img_size) * x, (top + img_size) * y
