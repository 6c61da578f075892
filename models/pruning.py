"""Token pruning: score predictor, order of kept tokens, and why training agrees with evaluation.

In the paper's training nothing is removed: kept tokens move to the front, dropped ones behind them,
and every later mixer masks the dropped ones. Dropped tokens thus come last for the forward scan and
first, with zero input, for the backward scan, so the states that reach a kept token are those of
the sequence without them.

One idea has a name at each of its moments: `policy` is what was alive before a stage, `decision`
what the stage keeps of it, `alive` the same in slot order after the re-arrangement, and `mask` the
same with the class tokens inserted.

B images, M tokens that enter a stage (class tokens excluded), k tokens that survive it, d width.
Source: "Dynamic Vision Mamba" (arXiv 2504.04787), section 3; the predictor is DynamicViT's (arXiv
2106.02034).
"""

import torch
from torch import Tensor, nn

from ops.linear import Linear

from .layouts import masked_sum


class ScorePredictor(nn.Module):
    """Log-probabilities of keeping and dropping each token, from its features and the kept mean.

    tokens [B, M, width], policy [B, M] (1 = still kept) -> [B, M, 2]; class 0 is "keep".
    """

    def __init__(self, width: int):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width), Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            Linear(width, width // 2),
            nn.GELU(),
            Linear(width // 2, width // 4),
            nn.GELU(),
            Linear(width // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, tokens: Tensor, policy: Tensor) -> Tensor:
        # The residual stream is float32, the weights may be bfloat16.
        tokens = tokens.to(self.in_conv[0].weight.dtype)
        local, pooled = self.in_conv(tokens).chunk(2, dim=-1)
        weight = policy.unsqueeze(-1)
        pooled = masked_sum(pooled, weight) / (weight.sum(dim=1, keepdim=True) + 1)
        return self.out_conv(torch.cat([local, pooled.to(local.dtype).expand_as(local)], dim=-1))


def kept_first(policy: Tensor) -> tuple[Tensor, Tensor]:
    """Stable order that puts kept tokens before dropped ones.

    policy [B, M] of 0 and 1 -> order [B, M] (slot -> where its token stood), number of kept tokens
    [B].
    """
    alive = policy > 0.5
    counts = alive.sum(dim=1)
    behind = counts.unsqueeze(1) + (~alive).cumsum(dim=1)
    slot = torch.where(alive, alive.cumsum(dim=1), behind) - 1
    source = torch.arange(policy.shape[1], device=policy.device).expand_as(slot)
    return torch.empty_like(slot).scatter_(1, slot, source), counts


def best_in_order(scores: Tensor, count: int) -> Tensor:
    """Indexes of the `count` best tokens in sequence order: scores [B, M] -> [B, count]."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values
