"""How a data set is read, as one value built once from the flags."""

import argparse
import os
from dataclasses import dataclass, field, fields

from .depth import AUTO, Depth


def default_workers() -> int:
    return min(4, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class DataOptions:
    """The flags of the group "data", by name and with their defaults, and additions of the task.

    `seed` determines the order of the training images and their augmentation. `subset` is a
    fraction (float) or a number of images (int). An epoch has `epoch_steps` batches, or all images.
    `rank` of `world_size` processes.
    `eval_batch_size` is for a task that cannot evaluate `batch_size` images at once, such as one
    whose images differ in size.
    """

    data_set: str = "DIGITS"
    data_path: str | None = None
    prefix: str | None = None
    part_seconds: int | None = None
    part_stride: int | None = None
    canvas: int | None = None
    train_split: str = "train"
    val_split: str = "validation"
    subset: int | float | None = None
    batch_size: int = 64
    num_workers: int = field(default_factory=default_workers)
    pin_mem: bool = True
    repeated_aug: bool = True
    bad_images: str = "stop"
    bit_depth: Depth = AUTO
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    eval_batch_size: int | None = None
    epoch_steps: int | None = None

    @classmethod
    def from_args(
        cls,
        args: argparse.Namespace,
        rank: int = 0,
        world_size: int = 1,
        eval_batch_size: int | None = None,
    ) -> "DataOptions":
        added = {"rank": rank, "world_size": world_size, "eval_batch_size": eval_batch_size}
        flags = {f.name: getattr(args, f.name) for f in fields(cls) if f.name not in added}
        return cls(**flags, **added)
