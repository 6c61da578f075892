"""What a stage left of an image: dropped patches dimmed, or merged ones in the colour of their
group.

M patches on a grid, k kept patches; H, W pixels.
"""

from collections.abc import Sequence

import numpy as np

from .class_colours import class_colours

# A dropped patch keeps a fifth of its contrast, on slate, which shows on images of any brightness.
DIMMED = 0.2
VEIL = np.array([100, 116, 146])
# What lies outside the model's crop fades into the paper.
OUTSIDE = 0.15
TINT = 0.6  # share of a group's colour in its patches


def stage_pixels(
    pixels: np.ndarray, patch_of: np.ndarray, kept: Sequence[int], groups: np.ndarray | None = None
) -> np.ndarray:
    """pixels [H, W, 3] uint8, patch_of [H, W] -> [H, W, 3] uint8.

    kept [k]; groups [M]: which patch speaks for each, where patches are merged.
    """
    if groups is None:
        return dim_dropped(pixels, patch_of, kept)
    return tint_groups(pixels, patch_of, groups)


def dim_dropped(pixels: np.ndarray, patch_of: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """Dim the patches that are not in `kept` [k]."""
    kept = np.asarray(kept, dtype=int)
    entries = max(patch_of.max(), kept.max(initial=-1)) + 2  # the last one is for index -1
    veil = np.tile(VEIL * (1 - DIMMED), (entries, 1)).astype(np.float32)
    contrast = np.full(entries, DIMMED, np.float32)
    veil[kept], contrast[kept] = 0, 1
    return _veiled(pixels, patch_of, veil, contrast)


def tint_groups(pixels: np.ndarray, patch_of: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Tint patches that were merged, each group in one colour; single ones stay as they are."""
    members = np.bincount(groups, minlength=len(groups))
    merged = np.flatnonzero(members > 1)  # by their speakers, in raster order
    colours = np.zeros((len(groups), 3))
    colours[merged] = class_colours()[np.arange(len(merged)) % len(class_colours())]
    tinted = members[groups] > 1
    veil = np.zeros((len(groups) + 1, 3), np.float32)
    contrast = np.ones(len(groups) + 1, np.float32)
    veil[:-1][tinted] = TINT * colours[groups[tinted]]
    contrast[:-1][tinted] = 1 - TINT
    return _veiled(pixels, patch_of, veil, contrast)


def _veiled(
    pixels: np.ndarray, patch_of: np.ndarray, veil: np.ndarray, contrast: np.ndarray
) -> np.ndarray:
    """contrast * pixels + veil, by patch; the last entry is for index -1, outside the crop."""
    veil[-1], contrast[-1] = 255 * (1 - OUTSIDE), OUTSIDE
    return (pixels * contrast[patch_of][..., None] + veil[patch_of]).round().astype(np.uint8)
