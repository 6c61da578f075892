"""Semantic segmentation: one class for each pixel.

B images, C classes; H, W pixels of the labels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models import Result
from models.upernet import resize

IGNORED = 255
AUX_WEIGHT = 0.4


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits [B, C, ., .] with labels [B, H, W], which they are resized to.

    The mean is over all pixels; ignored ones count 0, as in mmsegmentation.
    """
    logits = resize(logits.float(), labels.shape[-2:])
    loss = F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="sum")
    return loss / labels.numel()


class SegmentationTerms(nn.Module):
    """`decode` and, of the auxiliary head, `aux`: cross entropy of the pixels."""

    def __init__(self, aux_weight: float = AUX_WEIGHT):
        super().__init__()
        self.aux_weight = aux_weight

    def forward(self, result: Result, labels: Tensor) -> dict[str, Tensor]:
        terms = {"decode": pixel_cross_entropy(result.logits, labels)}
        if result.aux_logits is not None:
            terms["aux"] = self.aux_weight * pixel_cross_entropy(result.aux_logits, labels)
        return terms
