"""Whether weights fit a model though their shapes do."""

import logging
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from utils.errors import UserError

from .backbone import VisionMamba

PATCHES = "patch_embed.proj.weight"
_LISTED = 8  # keys named in an error before the rest is counted
_ALIKE = ("vim", "videomamba")  # families whose parameters have the same names and shapes

_logger = logging.getLogger(__name__)


def listing(keys: list[str]) -> str:
    """The first of the keys, and how many more there are."""
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more


def check_numbers(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError for weights that are not finite, or whole numbers in place of fractions.

    own: the parameters of the model that they are for.
    """
    broken = [
        key
        for key, value in state.items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if broken:
        raise UserError(
            f"{source}: {len(broken)} of its {len(state)} tensors hold NaN or infinity, numbers "
            f"that are not finite ({listing(broken)}): the training that wrote it had diverged; "
            "use an earlier checkpoint"
        )
    coded = [
        key
        for key, value in state.items()
        if key in own and own[key].is_floating_point() and not value.is_floating_point()
    ]
    if coded:
        raise UserError(
            f"{source}: {len(coded)} of its {len(state)} tensors hold {state[coded[0]].dtype} "
            f"instead of floating-point numbers ({listing(coded)}); quantised weights cannot be "
            "used"
        )


@cache  # a student and its teacher may start from one file
def doubt_family(family: str, source: str) -> None:
    """Say that a file names no family, where the place of a class token tells families apart."""
    if family in _ALIKE:
        _logger.warning(
            "%s does not say which family it is of: it is taken to be %s, by --model; %s have the "
            "same shapes and differ in the place of the class token, and with that of the other "
            "family the answers are wrong",
            source,
            family,
            " and ".join(_ALIKE),
        )


def other_size(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """A sentence on --model where the weights are of a model of another size; else empty."""
    sizes = [_size_of(part) for part in (state, own)]
    if None in sizes or sizes[0] == sizes[1]:
        return ""
    return (
        f"it has {sizes[0]}, the model {sizes[1]}: choose --model and --model-kwargs to agree with "
        "it; "
    )


def _size_of(state: Mapping[str, Tensor]) -> str | None:
    """Layers, channels and patches of a model."""
    layers = {key.split(".")[1] for key in state if key.startswith("layers.")}
    stem = state.get(PATCHES)
    if not layers or stem is None or stem.dim() < 4:
        return None
    patch = " x ".join(map(str, stem.shape[2:]))
    return f"{len(layers)} layers of {len(stem)} channels and patches of {patch}"


def grid_of(checkpoint: Mapping[str, Any]) -> tuple[int, int] | None:
    """The grid of an image's patches, or of a slot's, that a checkpoint of ours records; None:
    unknown, taken to be square.
    """
    grid = checkpoint.get("grid")
    table = checkpoint["model"].get("pos_embed")
    if not isinstance(grid, list) or len(grid) not in (2, 3) or not isinstance(table, Tensor):
        return None
    if not all(type(side) is int and side > 0 for side in grid) or table.dim() != 3:
        return None
    patches = math.prod(grid[-2:])  # there may be a row of a class token
    return tuple(grid[-2:]) if table.shape[1] - patches in (0, 1) else None


def check_stride(
    model: VisionMamba, checkpoint: Mapping[str, Any], source: str, allowed: bool = False
) -> None:
    """Raise UserError for patches at another stride than the model's; with `allowed`, warn.

    Checkpoints of ours record their stride. Of others the grid tells: it may be exactly that of
    another stride, a divisor of the patch, at the model's own image size. Vim's published weights
    at stride 8 have 27 x 27 patches, which no usual image size has at stride 16.
    """
    patches, recorded = model.patch_embed, checkpoint.get("stride")
    trained = recorded if isinstance(recorded, list) else _stride_by_grid(model, checkpoint)
    if trained is None or list(trained) == list(patches.stride):
        return
    weight = checkpoint["model"].get("patch_embed.proj.weight")
    if isinstance(weight, Tensor) and weight.shape != patches.proj.weight.shape:
        return  # a model of another size: another stride would not help
    was, now = (step[0] if len({*step}) == 1 else tuple(step) for step in (trained, patches.stride))
    advice = f"give --model-kwargs stride={was}"
    if trained is recorded:
        message = f"{source}: its patches have stride {was}, the model's {now}: {advice}"
    else:
        size = patches.img_size[0]
        count = (size - patches.patch_size[0]) // trained[0] + 1
        other = (count - 1) * patches.stride[0] + patches.patch_size[0]
        message = (
            f"{source}: its {count} patches a side are those of stride {was} at {size} pixels, and "
            f"the model has stride {now}: {advice} (or, if it was trained at stride {now} and "
            f"{other} pixels, --input-size {other})"
        )
    if not allowed:
        raise UserError(message)
    _logger.warning("%s; the position embedding is resized", message)


def _stride_by_grid(model: VisionMamba, checkpoint: Mapping[str, Any]) -> list[int] | None:
    """The stride other than the model's that explains the rows of the position embedding."""
    patches, table = model.patch_embed, checkpoint["model"].get("pos_embed")
    if not isinstance(table, Tensor) or table.dim() != 3:
        return None
    rows = table.shape[1] - int("cls_token" in checkpoint["model"] and not model.family.registers)
    side = math.isqrt(max(rows, 0))
    grid = grid_of(checkpoint) or (side, side)
    if math.prod(grid) != rows or grid == tuple(patches.plane):
        return None
    for step in range(1, max(patches.patch_size) + 1):
        if all(
            patch % step == 0 and (size - patch) % step == 0 and (size - patch) // step + 1 == count
            for size, patch, count in zip(patches.img_size, patches.patch_size, grid, strict=True)
        ):
            return [step, step]
    return None
