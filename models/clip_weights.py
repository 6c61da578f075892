"""Weights of models of clips: from image models, and at another number of frames.

S slots of t frames, d width. Source: VideoMamba (arXiv 2403.06977).
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .backbone import VisionMamba
from .fitting import PATCHES
from .weights import TEMPORAL, load_weights

_HEAD = "head."

_logger = logging.getLogger(__name__)


def inflate(weight: Tensor, tubelet_size: int, centre: bool = True) -> Tensor:
    """Patch weights of images [d, 3, p, p] -> of clips [d, 3, t, p, p], with equal outputs for a
    clip whose frames are all the same.

    centre: the middle frame alone is read; else their mean.
    """
    if not centre:
        return weight.unsqueeze(2).expand(-1, -1, tubelet_size, -1, -1) / tubelet_size
    frames = [torch.zeros_like(weight)] * tubelet_size
    frames[tubelet_size // 2] = weight
    return torch.stack(frames, dim=2)


def is_of_images(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's patches are those of images."""
    weight = checkpoint["model"].get(PATCHES)
    return isinstance(weight, Tensor) and weight.dim() == 4


def load_images(
    model: VisionMamba, checkpoint: Mapping[str, Any], source: str, centre: bool = True
) -> None:
    """Load an image model's weights into a model of clips, as the start of a training.

    The patches are inflated, the temporal position embedding is zero, the head stays new. New parts
    of a dynamic model may be absent.

    Raises:
        UserError: as in `load_weights`.
    """
    own = model.state_dict()
    state = {
        name: value for name, value in checkpoint["model"].items() if not name.startswith(_HEAD)
    }
    state |= {name: value for name, value in own.items() if name.startswith(_HEAD)}
    state[PATCHES] = inflate(state[PATCHES], model.patch_embed.tubelet_size, centre)
    state[TEMPORAL] = torch.zeros_like(own[TEMPORAL])
    load_weights(model, {**checkpoint, "model": state}, source, from_dense=True)
    _logger.info(
        "%s: an image model; its patches are inflated to %d frames, the head is new",
        source,
        model.patch_embed.tubelet_size,
    )
