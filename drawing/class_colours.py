"""Colours of up to 255 classes, told apart by people with and without colour vision deficiency."""

from functools import lru_cache

import numpy as np

from loading.masks import IGNORED

from .palette import BLUE, rgb

# Where labels are ignored; no class has a colour that is nearly grey.
UNLABELLED = (150, 150, 150)
_STEPS = 16  # candidates along each of red, green and blue
_LIGHTNESS, _CHROMA = (0.38, 0.92), (0.05, 0.25)  # of a class's colour, in Oklab
_DEFICIENT = 2  # weight of distances with a deficiency: so much smaller may they be
# Linear RGB as seen with protanopia and deuteranopia: Machado et al., "A Physiologically-based
# Model for Simulation of Color Vision Deficiency", 2009, severity 1.
_SEEN = (
    np.eye(3),
    np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
)


@lru_cache
def class_colours() -> np.ndarray:
    """[255, 3] uint8: the colour of each class index, the same whatever the number of classes.

    The first is the palette's blue. Each further one is the candidate whose distance to the nearest
    colour before it is largest, where a distance is the smallest one with full colour vision, with
    protanopia and with deuteranopia.
    """
    levels = np.linspace(0, 255, _STEPS).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lightness, *hue = oklab(linear(candidates)).T
    usable = _inside(lightness, _LIGHTNESS) & _inside(np.hypot(*hue), _CHROMA)
    candidates = np.concatenate([[rgb(BLUE)], candidates[usable]]).astype(np.uint8)
    places = appearances(candidates)
    places[1:] *= _DEFICIENT
    chosen = [0]
    nearest = np.full(len(candidates), np.inf)
    while len(chosen) < IGNORED:
        distances = np.linalg.norm(places - places[:, chosen[-1:]], axis=-1).min(axis=0)
        nearest = np.minimum(nearest, distances)
        # Rounded: the last digits of a power differ between processors.
        chosen.append(int(nearest.round(6).argmax()))
    return candidates[chosen]


def _inside(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return (values > limits[0]) & (values < limits[1])


@lru_cache
def label_colours() -> np.ndarray:
    """[256, 3] uint8: the colours of the classes, and `UNLABELLED` for ignored pixels."""
    return np.concatenate([class_colours(), [UNLABELLED]]).astype(np.uint8)


def appearances(colours: np.ndarray) -> np.ndarray:
    """sRGB colours [N, 3] uint8 -> their places [3, N, 3] in Oklab, one for each kind of vision."""
    light = linear(colours)
    return np.stack([oklab((light @ seen.T).clip(0, 1)) for seen in _SEEN])


def linear(colours: np.ndarray) -> np.ndarray:
    """sRGB [..., 3] uint8 -> linear light in [0, 1]."""
    values = colours / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(light: np.ndarray) -> np.ndarray:
    """Linear RGB [..., 3] -> Oklab [..., 3], in which equal distances look equal (Ottosson, 2020).

    https://bottosson.github.io/posts/oklab/
    """
    cones = light @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
