"""Loading weights into a model: strict, with every difference named.

Four things may differ, each logged in one line: the new parts of a dynamic model that starts from a
dense checkpoint, the size of the position embedding (another image size), that of the temporal one
(another number of frames), and the head (another number of classes).
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError

from .backbone import VisionMamba
from .fitting import check_numbers, check_stride, doubt_family, grid_of, listing, other_size
from .official_names import from_official

_logger = logging.getLogger(__name__)

# What maps to classes: the head itself, or parts of a segmenter's.
_CLASSIFIERS = (
    "head",
    "head.decode_head.conv_seg",
    "head.decode_head.segmentation_head.0",
    "head.auxiliary_head.conv_seg",
)
_FAMILIES = ("videomamba", "mambareg", "vim")
TEMPORAL = "temporal_pos_embedding"


def resize_pos_embed(
    pos_embed: Tensor,
    grid: tuple[int, int],
    class_row: int | None,
    new_class_row: int | None,
    old_grid: tuple[int, int] | None = None,
) -> Tensor:
    """Resample a position embedding [1, rows, d] to `grid` (h, w), bicubic.

    class_row: row of the class token, or None; it is moved unchanged to `new_class_row`, or left
    out if that is None. Raises ValueError if the patch rows are not a square.
    """
    if class_row is None:
        patches, class_token = pos_embed, pos_embed[:, :0]
    else:
        patches = torch.cat([pos_embed[:, :class_row], pos_embed[:, class_row + 1 :]], dim=1)
        class_token = pos_embed[:, class_row : class_row + 1]
    side = math.isqrt(patches.shape[1])
    height, width = old_grid or (side, side)
    if height * width != patches.shape[1]:
        raise ValueError(
            f"position embedding with {pos_embed.shape[1]} rows cannot be resized to "
            f"{math.prod(grid)} patches: no square grid"
        )
    if (height, width) != tuple(grid):
        from einops import rearrange

        table = rearrange(patches, "1 (h w) d -> 1 d h w", h=height).float()
        table = F.interpolate(table, size=tuple(grid), mode="bicubic", align_corners=False)
        patches = rearrange(table, "1 d h w -> 1 (h w) d").to(pos_embed.dtype)
    if class_row is None or new_class_row is None:
        return patches
    return torch.cat([patches[:, :new_class_row], class_token, patches[:, new_class_row:]], dim=1)


def resize_temporal(table: Tensor, slots: int) -> Tensor:
    """Resample a temporal position embedding [1, S, d] to `slots`, linear."""
    rows = table.float().transpose(1, 2)
    rows = F.interpolate(rows, size=slots, mode="linear", align_corners=False)
    return rows.transpose(1, 2).to(table.dtype)


def is_new_part(key: str) -> bool:
    """Whether a parameter belongs to a dynamic model but not to its dense teacher."""
    return key.startswith("score_predictors.") or ".block_head." in key


def checkpoint_family(checkpoint: Mapping[str, Any]) -> str | None:
    """The backbone family of a checkpoint, from its record or its keys; None if unknown.

    Our checkpoints record it; official ones may hold their training arguments; MambaReg has keys of
    its own.
    """
    if checkpoint.get("family") in _FAMILIES:
        return checkpoint["family"]
    if "pos_embed_cls" in checkpoint["model"]:
        return "mambareg"
    args = checkpoint.get("args")
    name = str(
        getattr(args, "model", None)
        or (args.get("model") if isinstance(args, Mapping) else "")
        or checkpoint.get("arch")  # of timm
        or ""
    ).lower()
    for family in _FAMILIES:
        if name.removeprefix("dyvm_").startswith(family):
            return family
    return None


def load_weights(
    model: VisionMamba,
    checkpoint: Mapping[str, Any],
    source: str,
    *,
    from_dense: bool = False,
    new_head: bool = False,
) -> None:
    """Load `checkpoint["model"]` into a model.

    Args:
        source: the file, for messages.
        from_dense: the new parts of a dynamic model may be absent, all of them together.
        new_head: a head for another number of classes is replaced by a new one (fine-tuning), and
            patches at another stride are a warning.

    Raises:
        UserError: another family or stride, numbers that are not finite, or missing, unexpected or
            misshapen parameters; all are counted, the first ones listed.
    """
    family = checkpoint_family(checkpoint)
    if family is not None and family != model.family.name:
        raise UserError(
            f"{source}: this is a {family} checkpoint, the model is a {model.family.name}; choose "
            "--model to agree with the checkpoint"
        )
    own = model.state_dict()
    state = from_official(checkpoint["model"])
    not_tensors = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if not_tensors:
        raise UserError(
            f"{source}: {listing(not_tensors)} of 'model' are no tensors; this is not a "
            "checkpoint of a vision model"
        )
    check_numbers(own, state, source)
    _check_frames(model, state, source)
    check_stride(model, checkpoint, source, allowed=new_head)
    _fit_pos_embed(model, state, source, grid_of(checkpoint))
    _fit_temporal(model, state, source)
    dropped = _drop_other_head(own, state, source) if new_head else set()
    absent = [key for key in own if key not in state]
    if from_dense and not any(is_new_part(key) for key in state):
        absent = [key for key in absent if not is_new_part(key)]
    problems = {
        "missing": [key for key in absent if key not in dropped],
        "unexpected": [key for key in state if key not in own],
        "misshapen": [
            f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    if any(problems.values()):
        message = "; ".join(
            f"{len(keys)} {kind}: {listing(keys)}" for kind, keys in problems.items() if keys
        )
        head = state.get("head.weight")
        if head is not None and head.dim() == 2 and len(head) != model.num_classes:
            message += (
                f". It was trained on {len(head)} classes, the data set has {model.num_classes}: "
                "choose its --data-set, or fine-tune it first with --method dense --model-path"
            )
        if problems["unexpected"] and all(
            key.startswith("score_predictors.") for key in problems["unexpected"]
        ):
            message += (
                ". It chooses tokens by learned scores: leave out --token-strategy, --reduction "
                "and --method, which it records"
            )
        size = other_size(own, state)
        raise UserError(f"{source} does not fit this {model.family.name} model: {size}{message}")
    if family is None and model.has_class_token:
        doubt_family(model.family.name, source)
    model.load_state_dict(state, strict=False)


def _check_frames(model: VisionMamba, state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError for an image model's weights in a model of clips, and the reverse."""
    if TEMPORAL in state and model.num_frames is None:
        raise UserError(
            f"{source}: this is a checkpoint of clips ({state[TEMPORAL].shape[1]} temporal "
            "positions), the model is one of images; give a --data-set of videos"
        )
    if model.num_frames is not None and TEMPORAL not in state and "pos_embed" in state:
        raise UserError(
            f"{source}: this is a checkpoint of images, the model is one of clips; train it on "
            "clips first (--method dense --model-path starts from images)"
        )


def _fit_temporal(model: VisionMamba, state: dict[str, Tensor], source: str) -> None:
    """Resample the temporal position embedding in `state` if it is of another number of frames."""
    table = state.get(TEMPORAL)
    if table is None or table.dim() != 3 or len(table) != 1 or not table.shape[1]:
        return  # reported among the misshapen ones
    slots = model.patch_embed.slots
    if table.shape[1] != slots:
        state[TEMPORAL] = resize_temporal(table, slots)
        _logger.info(
            "%s: temporal position embedding resampled from %d to %d positions",
            source,
            table.shape[1],
            slots,
        )


def _fit_pos_embed(
    model: VisionMamba, state: dict[str, Tensor], source: str, old_grid: tuple[int, int] | None
) -> None:
    """Resize the position embedding in `state` if it was trained at another image size."""
    table = state.get("pos_embed")
    if table is None or table.dim() != 3 or len(table) != 1 or table.shape[2] != model.embed_dim:
        return  # reported among the misshapen ones
    grid, new_row = model.patch_embed.plane, model.class_row()
    same_rows = table.shape == model.pos_embed.shape
    if (same_rows and old_grid in (None, grid)) or table.shape[1] <= (new_row is not None):
        return
    try:
        patches = table.shape[1] - (new_row is not None)
        row = None if new_row is None else model.layout.class_slots(patches)[0]
        state["pos_embed"] = resize_pos_embed(table, grid, row, new_row, old_grid)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    _logger.info(
        "%s: position embedding resized from %d to %d patches", source, patches, math.prod(grid)
    )


def _drop_other_head(own: dict[str, Tensor], state: dict[str, Tensor], source: str) -> set[str]:
    """Remove classifiers for another number of classes from `state`; -> the keys removed."""
    dropped: set[str] = set()
    for classifier in _CLASSIFIERS:
        old, fresh = (part.get(f"{classifier}.weight") for part in (state, own))
        if (
            not isinstance(old, Tensor)
            or fresh is None
            or old.dim() != fresh.dim()
            or len(old) == len(fresh)
            or old.shape[1:] != fresh.shape[1:]
        ):
            continue
        if not dropped:
            _logger.info(
                "%s: head of %d classes replaced by a new one of %d", source, len(old), len(fresh)
            )
        dropped |= {f"{classifier}.weight", f"{classifier}.bias"}
    for key in dropped:
        state.pop(key, None)
    return dropped
