"""Batch norm over the images of all processes, on any device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`; in training with several processes its statistics are those of all images.

    PyTorch's `nn.SyncBatchNorm`, into which training.py converts it on GPUs, does not run on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same size; processes may have different B, H and W."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        values = x.float()
        count = values.new_full((1,), values.numel() / values.shape[1])
        total, count = all_reduce(torch.cat([values.sum(dim=(0, 2, 3)), count])).split(
            [self.num_features, 1]
        )
        centred = values - (total / count)[:, None, None]
        variance = all_reduce(centred.square().sum(dim=(0, 2, 3))) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                unbiased = variance * count / (count - 1).clamp_min(1)
                self.running_mean.lerp_((total / count).to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Training passes in this context leave the running statistics of batch norms as they are."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
