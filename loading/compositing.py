"""Composed pictures: objects before a backdrop, the same pixels on every machine.

Everything is computed in integers and with numpy's RandomState; libraries' resize kernels round
differently from one processor to the next.
"""

import colorsys

import numpy as np

GARMENT_EDGE = 16  # intensity at which a garment of Fashion-MNIST ends


def backdrop(random: np.random.RandomState, size: int) -> np.ndarray:
    """A wall and a floor, each of smooth noise between two muted colours: [size, size, 3]."""
    wall, floor = (
        blend(
            colour(random, (0.05, 0.4), (0.3, 0.8)),
            colour(random, (0.05, 0.4), (0.3, 0.8)),
            smooth_noise(random, size),
        )
        for _ in range(2)
    )
    horizon = random.randint(size * 2 // 5, size * 4 // 5)
    wall[horizon:] = floor[horizon:] * 4 // 5
    grain = random.randint(-7, 8, (size, size, 1))
    return (wall + grain).clip(0, 255)


def smooth_noise(random: np.random.RandomState, size: int) -> np.ndarray:
    """Value noise of four octaves, stretched to 0 ... 256: [size, size]."""
    octaves = (
        zoom(random.randint(0, 256, (cells, cells)), size) * weight
        for cells, weight in ((3, 8), (6, 4), (12, 3), (24, 2))
    )
    noise = sum(octaves)
    return (noise - noise.min()) * 256 // max(int(np.ptp(noise)), 1)


def colour(
    random: np.random.RandomState, saturation: tuple[float, float], value: tuple[float, float]
) -> np.ndarray:
    """A random RGB colour [3] in 0 ... 255, any hue."""
    hsv = random.random_sample(), random.uniform(*saturation), random.uniform(*value)
    return np.array([int(255 * channel) for channel in colorsys.hsv_to_rgb(*hsv)])


def blend(below: np.ndarray, above: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Colours [..., 3] with an opacity [h, w] of 256 for those above."""
    return (below * (256 - opacity[..., None]) + above * opacity[..., None]) >> 8


def over(image: np.ndarray, colours: np.ndarray, opacity: np.ndarray, top: int, left: int) -> None:
    """Paint colours [s, s, 3] or [3] over the image, in place; what lies outside is left out."""
    window, part = overlap(image, opacity, top, left)
    image[window] = blend(
        image[window], colours[part] if colours.ndim == 3 else colours, opacity[part]
    )


def overlap(
    image: np.ndarray, picture: np.ndarray, top: int, left: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a picture at (top, left) meets the image: in the image, in the picture."""
    spans = [
        (max(start, 0), max(min(start + length, total), 0), start)
        for start, length, total in zip((top, left), picture.shape, image.shape, strict=False)
    ]
    window = tuple(slice(first, end) for first, end, _ in spans)
    return window, tuple(slice(first - start, end - start) for first, end, start in spans)


def zoom(picture: np.ndarray, side: int) -> np.ndarray:
    """Bilinear resize of [h, w] to a square, int64. In fixed point: libraries' resize kernels round
    differently from one processor to the next.
    """
    for axis in (0, 1):
        length = picture.shape[axis]
        place = ((2 * np.arange(side) + 1) * length * 128 // side - 128).clip(0, (length - 1) * 256)
        low, fraction = place >> 8, place & 255
        if axis == 0:
            fraction = fraction[:, None]
        lower = picture.take(low, axis).astype(np.int64)
        upper = picture.take(np.minimum(low + 1, length - 1), axis)
        picture = lower * (256 - fraction) + upper * fraction
    return picture >> 16


def cut_out(
    random: np.random.RandomState, picture: np.ndarray, side: int, edge: int
) -> tuple[np.ndarray, np.ndarray]:
    """A grey picture [h, w] as an object of a random colour: its opacity [s, s] of 256, its colours
    [s, s, 3]. It ends where it is half opaque, at the intensity `edge` (of 255).
    """
    intensity = zoom(picture, side)
    opacity = (128 + (intensity - edge) * 8).clip(0, 256)
    shade = 80 + intensity * 175 // 255
    return opacity, shade[..., None] * colour(random, (0.4, 0.95), (0.7, 1.0)) // 255
