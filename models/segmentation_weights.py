"""A segmenter's start from a classifier's weights."""

import logging
from collections.abc import Mapping
from typing import Any

from utils.errors import UserError

from .backbone import VisionMamba
from .fitting import check_stride, doubt_family, grid_of
from .weights import checkpoint_family, is_new_part, load_weights, resize_pos_embed

_CLASSIFIER = ("head.", "neck.", "norm_neck.")

_logger = logging.getLogger(__name__)


def load_backbone(model: VisionMamba, checkpoint: Mapping[str, Any], source: str) -> None:
    """Load a classifier's layers into a segmenter; its head and routers stay as they are.

    The position embedding is resized, without the row of a class token that the segmenter does not
    have. Score predictors are taken where the classifier has them.

    Raises:
        UserError: as in `load_weights`.
    """
    check_stride(model, checkpoint, source, allowed=True)
    own = model.state_dict()
    state = {
        name: value
        for name, value in checkpoint["model"].items()
        if not name.startswith(_CLASSIFIER) and not (is_new_part(name) and name not in own)
    }
    state |= {
        name: value
        for name, value in own.items()
        if name.startswith(("head.", "rope."))
        or ".block_head." in name
        or (is_new_part(name) and name not in state)
    }
    checkpoint = {**checkpoint, "model": state, "stride": list(model.patch_embed.stride)}
    if not model.has_class_token and "cls_token" in state:
        try:
            _remove_class_token(model, state, checkpoint)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from None
        checkpoint["grid"] = list(model.patch_embed.grid)
        if checkpoint_family(checkpoint) is None:
            doubt_family(model.family.name, source)
    load_weights(model, checkpoint, source)
    _logger.info("%s: the backbone starts from a classifier; decoder and routers are new", source)


def _remove_class_token(
    model: VisionMamba, state: dict[str, Any], checkpoint: Mapping[str, Any]
) -> None:
    """Take the class token out, with its row of the position embedding where it stands."""
    del state["cls_token"]
    table = state.get("pos_embed")
    if table is None or table.dim() != 3 or table.shape[1] < 2:
        return  # reported by load_weights
    row = model.family.make_layout(1, class_token=True).class_slots(table.shape[1] - 1)[0]
    grid = model.patch_embed.grid
    state["pos_embed"] = resize_pos_embed(table, grid, row, None, grid_of(checkpoint))
