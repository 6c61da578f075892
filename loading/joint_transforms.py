"""Transforms of an image together with its label map, for semantic segmentation.

As published for UperNet on ADE20K (mmsegmentation's pipeline, with OpenCV), built on
torchvision.transforms.v2. All randomness is torch's. Both transforms are called with (an RGB image
of Pillow or uint8 [3, H, W], `Mask` [H, W]) and return (float32 [3, H', W'], int64 [H'', W'']);
255 in a label map stands for pixels without a class.
"""

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image, Mask, wrap

from utils.images import MEAN, STD, ImageSize

from .masks import IGNORED
from .transforms import Transform

ASPECT = 4  # the long side may be so many times the short one before it limits the size
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class SegmentationAugmentation:
    """What `segmentation_train_transform` does, in this order; the defaults are ADE20K's.

    crop: size of the result in pixels, of a square or (height, width).
    ratio_range: the image is resized to fit (4 s, s), s being the crop's shorter side, times a
        number drawn uniformly from this range.
    cat_max_ratio: share of a crop's labelled pixels that one class must stay below; 1: no limit.
    flip: probability of a horizontal flip.
    photometric: whether brightness, contrast, saturation and hue are changed.
    """

    crop: ImageSize = 512
    ratio_range: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    photometric: bool = True


def segmentation_train_transform(augmentation: SegmentationAugmentation) -> Transform:
    """Image and label map, both of the crop's size, augmented; padding is 0 and 255."""
    crop = to_2tuple(augmentation.crop)
    steps = [
        v2.ToImage(),
        ResizeToFit(min(crop), augmentation.ratio_range),
        BalancedCrop(crop, augmentation.cat_max_ratio),
        v2.RandomHorizontalFlip(augmentation.flip),
    ]
    if augmentation.photometric:
        steps.append(PhotometricDistortion())
    return v2.Compose([*steps, *_to_tensors(), PadTo(crop), v2.ToPureTensor()])


def segmentation_eval_transform(
    short: int | None = None, size: tuple[int, int] | None = None
) -> Transform:
    """The image resized to fit (4 * short, short), squeezed into `size` (height, width), or in its
    own size; the label map as it is.

    Predictions are compared in the label map's size. As sizes differ, a batch has one image. The
    transform can be called with the image alone.
    """
    resize = [] if short is None else [ResizeToFit(short, masks=False)]
    if size is not None:
        resize = [Squeeze(size)]
    return v2.Compose([v2.ToImage(), *resize, *_to_tensors(), v2.ToPureTensor()])


def _to_tensors() -> list[v2.Transform]:
    dtypes = {Image: torch.float32, Mask: torch.int64, "others": None}
    return [v2.ToDtype(dtypes, scale=True), v2.Normalize(MEAN, STD)]


def fitted_size(size: tuple[int, int], long: int, short: int) -> tuple[int, int]:
    """The largest (height, width) of this aspect whose longer and shorter sides fit the limits."""
    factor = min(long / max(size), short / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), dtype=torch.float64).item()


def _coin() -> bool:
    return _uniform(0, 1) < 0.5


class ResizeToFit(v2.Transform):
    """Resize to fit (4 * short, short), times one number drawn from `ratio_range`.

    Images bilinearly and, as in OpenCV, without a filter against aliasing. Label maps take the
    nearest pixel, measured between centres as for the image; OpenCV's "nearest" is off by up to
    half a pixel.

    Args:
        masks: without it label maps stay as they are.
    """

    def __init__(
        self, short: int, ratio_range: tuple[float, float] = (1.0, 1.0), masks: bool = True
    ):
        super().__init__()
        self.short, self.ratio_range, self.masks = short, ratio_range, masks

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        ratio = _uniform(*self.ratio_range)
        long, short = int(ASPECT * self.short * ratio), int(self.short * ratio)
        return {"size": fitted_size(v2.query_size(flat_inputs), long, short)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        size = list(params["size"])
        if not isinstance(inpt, Mask):
            return self._call_kernel(F.resize, inpt, size, antialias=False)
        if not self.masks:
            return inpt
        values = inpt.as_subclass(Tensor)[None]
        nearest = InterpolationMode.NEAREST_EXACT  # F.resize would take the other one for a Mask
        return wrap(F.resize_image(values, size, interpolation=nearest)[0], like=inpt)


class Squeeze(v2.Transform):
    """Resize images to (height, width), whatever their aspect; label maps stay as they are."""

    _transformed_types = (Image,)

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = list(size)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, self.size, antialias=True)


class BalancedCrop(v2.Transform):
    """A random part of the given size, smaller only where the image is.

    It is drawn again, up to 10 times, until it has two classes or more and the most frequent one
    has less than `cat_max_ratio` of the labelled pixels; the last draw is taken in any case.

    Args:
        size: (height, width) in pixels.
    """

    def __init__(self, size: tuple[int, int], cat_max_ratio: float):
        super().__init__()
        self.size, self.cat_max_ratio = size, cat_max_ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(inpt for inpt in flat_inputs if isinstance(inpt, Mask)).as_subclass(Tensor)
        params = self._draw(mask)
        if self.cat_max_ratio < 1:
            for _ in range(CROP_ATTEMPTS):
                if self._is_balanced(F.crop_image(mask, **params)):
                    break
                params = self._draw(mask)
        return params

    def _draw(self, mask: Tensor) -> dict[str, int]:
        height, width = (min(sides) for sides in zip(self.size, mask.shape, strict=True))
        top = int(torch.randint(mask.shape[0] - height + 1, ()))
        left = int(torch.randint(mask.shape[1] - width + 1, ()))
        return {"top": top, "left": left, "height": height, "width": width}

    def _is_balanced(self, mask: Tensor) -> bool:
        counts = torch.bincount(mask.flatten(), minlength=IGNORED + 1)
        counts[IGNORED] = 0
        return bool(counts.count_nonzero() > 1 and counts.max() < self.cat_max_ratio * counts.sum())

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class PhotometricDistortion(v2.Transform):
    """Change brightness, contrast, saturation and hue of a uint8 image, each with probability 1/2.

    Brightness adds up to 32, contrast multiplies by .5 ... 1.5 (a coin decides whether next or
    last), saturation multiplies by .5 ... 1.5, hue turns by -36 ... 34 degrees in steps of 2; the
    last two in HSV. Each result is cut to 0 ... 255 and truncated. OpenCV, which the published
    recipes use, also rounds hue to 2 degrees and saturation to 1/255 on the way; here HSV is exact,
    its result is rounded once, and colours differ by a few levels of 255.
    """

    _transformed_types = (Image,)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {
            "brightness": _uniform(-32, 32) if _coin() else 0.0,
            "contrast": _uniform(0.5, 1.5) if _coin() else 1.0,
            "contrast_last": _coin(),
            "saturation": _uniform(0.5, 1.5) if _coin() else 1.0,
            "hue": 2 * int(torch.randint(-18, 18, ())) if _coin() else 0,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        pixels = inpt.as_subclass(Tensor)
        if params["brightness"]:
            pixels = (pixels + params["brightness"]).clamp_(0, 255).to(torch.uint8)
        if not params["contrast_last"]:
            pixels = F.adjust_brightness_image(pixels, params["contrast"])  # it multiplies
        if params["saturation"] != 1 or params["hue"]:
            pixels = change_colours(pixels, params["saturation"], params["hue"])
        if params["contrast_last"]:
            pixels = F.adjust_brightness_image(pixels, params["contrast"])
        return wrap(pixels, like=inpt)


def change_colours(pixels: Tensor, saturation: float, hue: float) -> Tensor:
    """RGB [3, H, W] uint8 with its saturation in HSV multiplied and its hue turned by degrees.

    With V the largest and C the largest less the smallest channel, saturation is C / V. A channel
    is V - C k(h), where k depends on the hue h in sixths of a circle
    (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative). torchvision's
    `adjust_saturation` blends with grey instead, which changes V, and its `adjust_hue` is several
    times slower.
    """
    red, green, blue = rgb = pixels.to(torch.float32)
    value = rgb.amax(0)
    chroma = value - rgb.amin(0)
    divisor = chroma.clamp(min=1)  # without chroma there is no hue
    sixths = torch.where(
        red == value,
        (green - blue) / divisor,
        torch.where(green == value, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    offsets = torch.tensor([5.0, 3.0, 1.0])[:, None, None] + hue / 60
    k = (sixths + offsets).remainder_(6)
    k = torch.minimum(k, 4 - k).clamp_(0, 1)
    chroma = torch.minimum(chroma * saturation, value)
    return (value - chroma * k).round_().to(torch.uint8)


class PadTo(v2.Transform):
    """Pad right and below to a size (height, width): images with 0, label maps with 255."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, max(self.size[1] - width, 0), max(self.size[0] - height, 0)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        fill = IGNORED if isinstance(inpt, Mask) else 0
        return self._call_kernel(F.pad, inpt, fill=fill, **params)
