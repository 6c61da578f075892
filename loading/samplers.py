"""Which images form a batch, for every epoch, step and rank: a function of the seed alone."""

from collections.abc import Iterator

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler

from utils.seeding import derive_seed

REPEATS = 3  # views of an image under repeated augmentation; the epoch is as long as without


class TrainBatchSampler(Sampler):
    """Batches of (index, seed) pairs; an epoch can start at any step.

    The seed of the augmentation follows from (seed, epoch, position in the epoch): it depends
    neither on the worker nor on the steps done before. Positions interleave the ranks, as in
    DistributedSampler. The last incomplete batch is dropped.

    An epoch is one pass over the images, or `epoch_steps` batches: these go on where the epoch
    before has ended, through as many passes as they take.

    Set `epoch` and `start_step` before iterating.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        repeated_aug: bool,
        epoch_steps: int | None = None,
    ):
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.epoch = self.start_step = 0
        images = range(num_images)
        if repeated_aug:
            self.order = RepeatAugSampler(images, world_size, rank, num_repeats=REPEATS)
        else:
            self.order = DistributedSampler(images, world_size, rank, shuffle=True, drop_last=True)
        self.steps_per_pass = len(self.order) // batch_size
        self.steps_per_epoch = (epoch_steps or self.steps_per_pass) if self.steps_per_pass else 0

    def __len__(self) -> int:
        return self.steps_per_epoch - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        passing, indices = None, []
        for step in range(self.start_step, self.steps_per_epoch):
            number, within = divmod(self.epoch * self.steps_per_epoch + step, self.steps_per_pass)
            if number != passing:
                passing = number
                # Both samplers seed their shuffle with the epoch.
                self.order.set_epoch(self.seed + passing)
                indices = list(self.order)
            places = range(within * self.batch_size, (within + 1) * self.batch_size)
            yield [
                (
                    indices[place],
                    derive_seed(self.seed, passing, place * self.world_size + self.rank),
                )
                for place in places
            ]


class EvalBatchSampler(Sampler):
    """Batches of (index, 0) pairs; every image is on exactly one rank. Lengths may differ."""

    def __init__(self, num_images: int, batch_size: int, rank: int, world_size: int):
        self.indices = range(rank, num_images, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield [(index, 0) for index in self.indices[first : first + self.batch_size]]
