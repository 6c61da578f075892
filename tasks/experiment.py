"""The parts of a run in one object."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from datasets import task_of
from loading.data import Data
from models import VisionMamba
from models.build import ModelSpec
from utils.distributed import Distributed

from .base import Task
from .registry import task_named


@dataclass(frozen=True)
class Experiment:
    """What a run consists of: its flags, task, data, processes and folder."""

    args: argparse.Namespace
    task: Task
    data: Data
    distributed: Distributed
    output: Path

    @classmethod
    def prepare(
        cls, args: argparse.Namespace, distributed: Distributed, train: bool = True
    ) -> "Experiment":
        """Read the data set named by the flags; without `train`, not its training images."""
        task = task_named(task_of(args.data_set)).of_run(args)
        data = task.data(args, task.image_size(ModelSpec.from_args(args)), distributed, train)
        args.bit_depth = data.bit_depth  # recorded with the weights
        return cls(args, task, data, distributed, Path(args.output_dir))

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_args(self.args)

    @property
    def device(self) -> torch.device:
        return self.distributed.device

    @property
    def is_main(self) -> bool:
        return self.distributed.is_main

    @property
    def precision(self) -> str:
        """Number format of the forward pass, as in records."""
        return "float32" if self.args.amp == "off" else self.args.amp

    def model(self, spec: ModelSpec) -> VisionMamba:
        """A model for this data set, with fresh weights, on the device."""
        return self.task.model(spec, self.data.num_classes).to(self.device)
