"""The interface of a task. Scores, heads and labels are known to tasks alone.

B images, C classes.
"""

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from datasets import build_data
from drawing.pictures import ImageReport
from loading.data import Data
from loading.folders import find_images
from loading.images import ImageSet
from loading.loaders import Batch
from loading.transforms import Transforms, eval_transform, seen_region
from models import Result, VisionMamba
from models.build import ModelSpec, build_model
from models.embedding import PatchEmbed
from utils.distributed import Distributed
from utils.errors import UsageError
from utils.images import ImageSize

from .measures import Measure, Named
from .meters import Meter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIP_ARGUMENTS = {"num_frames", "tubelet_size"}  # of models of clips

BatchTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Criterion = Callable[[Result, Tensor], dict[str, Tensor]]


# Arguments of timm.create_model that have no place in --model-kwargs, and what to do instead.
NOT_HERE = {
    **dict.fromkeys(
        ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
        "weights come from --model-path",
    ),
    **dict.fromkeys(
        ("features_only", "out_indices", "scriptable", "exportable", "no_jit"),
        "it is for programs that import the models",
    ),
}


def check_arguments(spec: ModelSpec) -> None:
    """Raise UsageError for `--model-kwargs` that timm would take, but no run can use."""
    for name in NOT_HERE.keys() & spec.kwargs.keys():
        raise UsageError(f"--model-kwargs {name}=...: leave it out; {NOT_HERE[name]}")
    channels = spec.kwargs.get("in_chans", 3)
    if channels != 3:
        raise UsageError(
            f"--model-kwargs in_chans={channels}: images are read in colour; leave it out, and a "
            "grey image becomes three equal channels"
        )


class Task:
    """One kind of problem. A new task overrides what differs and is registered under its name.

    Attributes:
        measures: what its meter computes, as reports show it; the first one determines the best
            checkpoint.
        details: names of further values of its meter, for eval.json.
        defaults: of flags of all tasks, where this one's differ.
        example: what one entry of its data sets is called.
        has_decoder: whether its models have a decoder, whose operations are told apart.
        fixed_size: whether all images of an evaluation have one size (CUDA graphs need it).
        distils: whether a dynamic model is trained with a dense teacher (`--model-path`).
        evaluation_flags: names of its own flags that alter the result of an evaluation.
        recorded: names of its own flags that `--eval` takes from the checkpoint, unless they are
            given.
        predicts: whether predict.py can use it: `named` is implemented.
        labels_pixels: whether what it names has label maps.
    """

    name: str
    measures: tuple[Measure, ...]
    details: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = {}
    example = "image"
    has_decoder = False
    fixed_size = True
    distils = True
    evaluation_flags: tuple[str, ...] = ()
    recorded: tuple[str, ...] = ()
    predicts = False
    labels_pixels = False
    args: argparse.Namespace | None = None  # the flags of the run, see `of_run`

    def of_run(self, args: argparse.Namespace) -> "Task":
        """This task with a run's flags as `self.args`, for its methods that get none."""
        task = copy.copy(self)
        task.args = args
        return task

    @property
    def best(self) -> Measure:
        return self.measures[0]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags that only this task has.

        Those of `datasets.add_augmentation_arguments` belong to `classification_transforms`.
        """

    def check(self, args: argparse.Namespace) -> None:
        """Raise UsageError for flags that cannot work together."""

    def transforms(
        self, args: argparse.Namespace, img_size: ImageSize, train: bool
    ) -> Transforms | None:
        """The transforms of an image and its target; None: those of classified images."""
        return None

    def data(
        self,
        args: argparse.Namespace,
        img_size: ImageSize,
        distributed: Distributed,
        train: bool = True,
    ) -> Data:
        """The data set named by the flags, for images of a size in pixels."""
        return build_data(
            args,
            img_size,
            rank=distributed.rank,
            world_size=distributed.world_size,
            train=train,
            transforms=self.transforms(args, img_size, train),
            eval_batch_size=self.eval_batch_size(args),
        )

    def eval_batch_size(self, args: argparse.Namespace) -> int | None:
        """Images that an evaluation takes at once; None: `--batch-size`."""
        return None

    def clips_of(self, args: argparse.Namespace) -> int:
        """Versions of each example in a training batch; the learning rate is scaled by them."""
        return 1

    def image_transform(
        self, args: argparse.Namespace, img_size: ImageSize
    ) -> Callable[[Image.Image], Tensor]:
        """What an RGB image becomes where it has no target: in predictions and pictures."""
        return eval_transform(args, img_size)

    def prediction_transform(
        self, args: argparse.Namespace, img_size: ImageSize
    ) -> Callable[[Image.Image], Tensor]:
        """What an RGB image becomes where predict.py names what is in it: as in an evaluation."""
        return self.image_transform(args, img_size)

    def seen_region(
        self, size: tuple[int, int], args: argparse.Namespace, img_size: ImageSize
    ) -> tuple[float, float, float, float]:
        """The part of an image of `size` (width, height) that `image_transform` shows: left, top,
        right, bottom in pixels.
        """
        return seen_region(size, args, img_size)

    def picture(
        self, image: Any, inputs: Tensor, patches: PatchEmbed
    ) -> tuple[Image.Image, tuple[float, float, float, float]]:
        """What a picture of decisions shows of an example's `image`, and the part of it that the
        model sees (left, top, right, bottom).

        inputs: what `image_transform` made of it.
        """
        return image, self.seen_region(image.size, self.args, patches.img_size)

    def moving_picture(
        self, inputs: Tensor, model: VisionMamba, report: ImageReport
    ) -> list[Image.Image]:
        """Pictures of decisions to be shown one after the other; none for what does not move."""
        return []

    def files(self, paths: Sequence[str]) -> ImageSet:
        """The files that predict.py and visualize.py are given, and those below the folders among
        them.

        Raises UserError for a folder without any.
        """
        return find_images(paths)

    def size_of(self, image: Any) -> tuple[int, int]:
        """Height and width of an example's image, for `named`."""
        return image.height, image.width

    def check_checkpoint(
        self, checkpoint: Mapping[str, Any], class_names: Sequence[str], source: str
    ) -> None:
        """Raise UserError for a checkpoint that was trained on something else."""

    def recognises(self, checkpoint: Mapping[str, Any]) -> bool:
        """Whether a checkpoint that records no task is of this one, by its parameters."""
        return False

    def load_start(self, model: VisionMamba, checkpoint: Mapping[str, Any], source: str) -> bool:
        """Load another task's checkpoint where that is a sensible start; -> whether it was.

        There is no teacher then.
        """
        return False

    def num_classes(self, checkpoint: Mapping[str, Any], source: str) -> int:
        """The `num_classes` that a checkpoint's model was built with.

        Raises UserError if it cannot be determined.
        """
        return len(checkpoint.get("class_names") or ())

    def model(self, spec: ModelSpec, num_classes: int) -> VisionMamba:
        """A model with fresh weights, of images."""
        check_arguments(spec)
        for name in CLIP_ARGUMENTS & spec.kwargs.keys():
            raise UsageError(f"--model-kwargs {name}=...: clips need a --data-set of videos")
        return build_model(spec, num_classes)

    def image_size(self, spec: ModelSpec) -> tuple[int, int]:
        """Height and width in pixels of the images that a model takes.

        The model is built without memory, which also checks its arguments before any data is read.
        """
        with torch.device("meta"):
            return self.model(spec, num_classes=1).patch_embed.img_size

    def batch_transform(self, args: argparse.Namespace, num_classes: int) -> BatchTransform | None:
        """A function that mixes a training batch's images [B, 3, H, W] and targets, or None."""
        return None

    def criterion(self, args: argparse.Namespace) -> Criterion:
        """The task's own loss: (result, targets) -> weighted terms by name."""
        raise NotImplementedError

    def distillation(self, result: Result, teacher_result: Result) -> dict[str, Tensor]:
        """Distance of the answers to the teacher's, as terms by name, without that of tokens."""
        return {}

    def predict(self, model: VisionMamba, images: Tensor) -> Result:
        """The prediction of an evaluation, such as a sliding window or a mean over views.

        With several forward passes, the gates [depth, passes, 2] and kept patches of all of them
        belong in the Result: operations are counted from these.
        """
        return model(images)

    def meter(self, args: argparse.Namespace, data: Data, device: torch.device) -> Meter:
        """A meter that computes all `measures`."""
        raise NotImplementedError

    def labels(self, batch: Batch) -> Tensor | None:
        """The class [B] of each image, by which decisions are grouped; None without classes."""
        return None

    def name_of(self, target: Any, class_names: Sequence[str]) -> str:
        """A target of the data set in a few words; empty if that is not possible."""
        return ""

    def answers(self, result: Result, class_names: Sequence[str]) -> list[list[tuple[str, float]]]:
        """A picture's caption for each image: a few (name, share), the most important first."""
        return [[] for _ in range(len(result.logits))]

    def named(
        self, result: Result, sizes: Tensor, class_names: Sequence[str], top: int
    ) -> list[Named]:
        """What predict.py says of each image: of its classes at most `top`.

        sizes [B, 2]: height and width of the images themselves.
        """
        raise NotImplementedError

    def draw_evaluation(
        self,
        predict: Callable[[Tensor], Result],
        data: Data,
        img_size: ImageSize,
        values: Mapping[str, Any],
        output: Path,
    ) -> None:
        """Leave this task's own tables and pictures of an evaluation in the run's folder.

        predict: a batch of images [B, 3, H, W], normalised -> `predict` of the evaluated model.
        values: what the meter computed.
        """

    def drawn_evaluation(
        self, output: Path
    ) -> tuple[list[tuple["Figure", str]], list[tuple[Path, str]]]:
        """What `draw_evaluation` left, for a report: plots and pictures, each with its alternative
        text.

        Raises OSError or ValueError for a damaged table.
        """
        return [], []
