"""What happens to an image between its file and the model: timm's transforms with DeiT's choices."""

import math
import random
from contextlib import contextmanager

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from utils.errors import UsageError

MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
# DeiT's rule for CIFAR: images of this size are not cut from larger ones but shifted within a padded border.
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
    if img_size <= SMALL_IMAGE:
        transform.transforms[0] = transforms.Compose(
            [
                transforms.Resize((img_size, img_size), InterpolationMode.BICUBIC),
                transforms.RandomCrop(img_size, padding=args.crop_padding),
            ]
        )
    return transform


def eval_transform(args, img_size: int):
    """RGB image -> [3, img_size, img_size], normalised; the centre crop, or the whole image if it is small."""
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
    """The part of an image of `size` (width, height) that `eval_transform` shows: left, top, right, bottom in pixels.

    The shorter side is resized to img_size / crop ratio and the centre cut out; torchvision's rounding is followed.
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


@contextmanager
def random_state(seed: int):
    """Python's, numpy's and torch's CPU generators start at `seed` inside, and are as before afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def derive_seed(*numbers: int) -> int:
    """One seed out of several numbers, such as (seed, epoch, position)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
