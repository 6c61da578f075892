"""Video classification: one label for each video, by clips of it.

A model sees clips of a fixed number of frames. In training a video gives one or several augmented
clips of the same frames; an evaluation looks at one or several views and takes the mean of their
probabilities.

B videos, V views, T frames, C classes, S slots. Source: VideoMamba (arXiv 2403.06977).
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup
from timm.layers import to_2tuple
from torch import Tensor

from drawing.animation import animate
from drawing.pictures import ImageReport, filmstrip, to_pixels
from loading.clip_transforms import EvalViews, TrainClips, clip_augmentation
from loading.data import Data
from loading.frames import SAMPLINGS, make_sampling
from loading.loaders import Batch
from loading.transforms import Transforms
from loading.video import Video
from loading.video_sets import Videos, find_videos
from models import Result, VisionMamba
from models.build import ModelSpec, build_model
from models.clip_weights import is_of_images, load_images
from models.embedding import PatchEmbed
from models.tokens import kept_in_all
from models.weights import TEMPORAL
from utils.arguments import positive, probability, ratio, whole
from utils.distributed import Distributed
from utils.errors import UsageError
from utils.images import ImageSize

from .base import CLIP_ARGUMENTS, check_arguments
from .classification import Classification, ClassificationMeter, add_mixup_arguments
from .registry import register


class ClipMixup(Mixup):
    """Mixup and CutMix of clips [B, 3, T, H, W]: one box for all frames."""

    def __call__(self, clips: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        frames = clips.shape[2]
        mixed, targets = super().__call__(clips.flatten(1, 2), targets)
        return mixed.unflatten(1, (-1, frames)), targets


class VideoMeter(ClassificationMeter):
    """Top-1, top-5 and loss of the videos; top-1 and top-5 of their single views; and how many
    patches of each slot every stage keeps, on average over all views.
    """

    def __init__(self, device: torch.device, slots: int):
        super().__init__(device)
        self.slots = slots
        self.views = torch.zeros(3, dtype=torch.float64, device=device)  # views, correct in 1, in 5
        self.kept: Tensor | None = None  # [stages, S] and, last, the number of passes

    def update(self, batch: Batch, result: Result) -> None:
        super().update(batch, result)
        logits = result.logits[:, None] if result.view_logits is None else result.view_logits
        ranked = logits.float().topk(min(5, logits.shape[-1])).indices
        right = ranked == batch.targets[:, None, None]
        views = self.views.new_tensor(right[..., 0].numel())
        self.views += torch.stack([views, right[..., 0].sum(), right.sum()]).double()
        if result.kept:
            of_slot = result.owner.shape[1] // self.slots
            stages = [
                torch.bincount(stage[stage >= 0] // of_slot, minlength=self.slots)
                for stage in result.kept
            ]
            passes = torch.full_like(stages[0], len(result.kept[0]))
            counted = torch.stack([*stages, passes]).double()
            self.kept = counted if self.kept is None else self.kept + counted

    def compute(self, distributed: Distributed) -> dict[str, Any]:
        values: dict[str, Any] = super().compute(distributed)
        views, first, five = distributed.all_reduce_sum(self.views).tolist()
        values |= {"view_top1": 100 * first / views, "view_top5": 100 * five / views}
        # A rank without videos has counted nothing, and does not know the number of stages.
        counted = [part for part in distributed.gather_objects(self._kept()) or () if part]
        values["kept_per_slot"] = None
        if counted:
            *stages, passes = torch.tensor(counted, dtype=torch.float64).sum(dim=0)
            values["kept_per_slot"] = [(stage / passes).tolist() for stage in stages]
        return values

    def _kept(self) -> list[list[float]] | None:
        return None if self.kept is None else self.kept.tolist()


class VideoClassification(Classification):
    """As of images: cross entropy with mixup and label smoothing."""

    name = "video"
    example = "video"
    mixup = ClipMixup
    details = ("view_top1", "view_top5", "kept_per_slot")
    defaults = {"repeated_aug": False, "model": "videomamba_tiny"}
    recorded = evaluation_flags = (
        "num_frames",
        "tubelet_size",
        "frame_sampling",
        "sampling_rate",
        "eval_segments",
        "eval_crops",
        "eval_short_side",
        "eval_shuffle_frames",
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("clips")
        group.add_argument("--num-frames", type=positive, default=8, help="of a clip")
        group.add_argument(
            "--tubelet-size", type=positive, default=1, help="frames that a patch spans"
        )
        group.add_argument(
            "--frame-sampling",
            choices=SAMPLINGS,
            help="uniform: over the whole video (the default); parts: a frame of each of its parts "
            "(that of SSV2); dense: at a distance of --sampling-rate frames",
        )
        group.add_argument("--sampling-rate", type=positive, default=4, metavar="N")
        group.add_argument(
            "--num-sample",
            type=positive,
            default=1,
            metavar="N",
            help="clips of the same frames of a video in a batch, differently augmented; each "
            "counts, so that a batch has N times --batch-size of them",
        )
        group = parser.add_argument_group("augmentation")
        group.add_argument(
            "--aa",
            default="rand-m7-n4-mstd0.5-inc1",
            metavar="POLICY",
            help="RandAugment by timm's name, the same for all frames; or none",
        )
        group.add_argument(
            "--hflip",
            type=probability,
            help="default: 0.5; for SSV2, where left and right differ, 0",
        )
        group.add_argument("--reprob", type=probability, default=0.25, help="random erasing")
        group.add_argument(
            "--crop-area",
            type=ratio,
            nargs=2,
            default=[0.08, 1.0],
            metavar=("LEAST", "MOST"),
            help="share of a frame that the random crop of a clip covers",
        )
        add_mixup_arguments(parser)
        group = parser.add_argument_group("video evaluation")
        group.add_argument(
            "--eval-segments",
            type=positive,
            default=1,
            metavar="N",
            help="clips of a video; between epochs one view is looked at, in the middle",
        )
        group.add_argument(
            "--eval-crops",
            type=positive,
            default=1,
            metavar="N",
            help="of each, along the longer side",
        )
        group.add_argument(
            "--eval-short-side",
            type=whole,
            metavar="PIXELS",
            help="that frames are resized to (default: the model's size)",
        )
        group.add_argument(
            "--eval-shuffle-frames",
            action="store_true",
            help="put the frames of each clip in a random order, always the same: tells how much a "
            "model makes of time",
        )

    def check(self, args: argparse.Namespace) -> None:
        sided = args.data_set == "SSV2"
        if args.frame_sampling is None:
            args.frame_sampling = "parts" if sided else "uniform"
        if args.hflip is None:
            args.hflip = 0.0 if sided else 0.5
        if args.crop_area[0] > args.crop_area[1]:
            raise UsageError(
                "--crop-area {:g} {:g}: the first is the least".format(*args.crop_area)
            )
        if (args.mixup or args.cutmix) and args.batch_size * args.num_sample % 2 and not args.eval:
            raise UsageError(
                f"--batch-size {args.batch_size} must be even for mixup; or give --mixup 0 "
                "--cutmix 0"
            )

    def transforms(self, args: argparse.Namespace, img_size: ImageSize, train: bool) -> Transforms:
        side = self._side(args, img_size)
        sampling = make_sampling(args.frame_sampling, args.sampling_rate)
        view = EvalViews(
            sampling, args.num_frames, side, args.eval_short_side, shuffled=args.eval_shuffle_frames
        )
        views, quick = view, None
        if args.eval_segments * args.eval_crops > 1:
            views, quick = view.several(args.eval_segments, args.eval_crops), view
        if not train:
            return Transforms(None, views, quick)
        policy = None if args.aa in ("", "none", "None") else args.aa
        augment = clip_augmentation(side, policy, args.hflip, args.reprob, args.crop_area)
        clips = TrainClips(sampling, args.num_frames, augment, args.num_sample)
        return Transforms(clips, views, quick)

    def eval_batch_size(self, args: argparse.Namespace) -> int:
        return max(1, args.batch_size // (args.eval_segments * args.eval_crops))

    def clips_of(self, args: argparse.Namespace) -> int:
        return args.num_sample

    def _side(self, args: argparse.Namespace, img_size: ImageSize) -> int:
        height, width = to_2tuple(img_size)
        if height != width:
            raise UsageError(f"--input-size {height}x{width}: crops of videos are square")
        if args.eval_short_side is not None and args.eval_short_side < height:
            raise UsageError(
                f"--eval-short-side {args.eval_short_side} is less than a crop of {height} pixels"
            )
        return height

    def image_transform(
        self, args: argparse.Namespace, img_size: ImageSize
    ) -> Callable[[Video], Tensor]:
        """The one view in the middle, for pictures."""
        sampling = make_sampling(args.frame_sampling, args.sampling_rate)
        view = EvalViews(sampling, args.num_frames, self._side(args, img_size))
        return lambda video: view(video, None)[0]

    def prediction_transform(
        self, args: argparse.Namespace, img_size: ImageSize
    ) -> Callable[[Video], Tensor]:
        views = self.transforms(args, img_size, train=False).eval
        return lambda video: views(video, None)[0]

    def picture(
        self, image: Video, inputs: Tensor, patches: PatchEmbed
    ) -> tuple[Image.Image, tuple[float, float, float, float]]:
        """The frames of the view side by side, as the model sees them."""
        picture = Image.fromarray(to_pixels(filmstrip(inputs[None], patches))[0])
        return picture, (0.0, 0.0, float(picture.width), float(picture.height))

    def moving_picture(
        self, inputs: Tensor, model: VisionMamba, report: ImageReport
    ) -> list[Image.Image]:
        return animate(inputs, model, report)

    def files(self, paths: Sequence[str]) -> Videos:
        return find_videos(paths)

    def size_of(self, image: Video) -> tuple[int, int]:
        return 0, 0  # a label has no size

    def recognises(self, checkpoint: Mapping[str, Any]) -> bool:
        return TEMPORAL in checkpoint["model"]

    def load_start(self, model: VisionMamba, checkpoint: Mapping[str, Any], source: str) -> bool:
        if not is_of_images(checkpoint):
            return False
        if model.pruning_layers or model.route_blocks:
            raise UsageError(
                f"--model-path {source} is an image model; a dynamic model of clips starts from a "
                "dense one, its teacher: train that first with --method dense"
            )
        load_images(model, checkpoint, source)
        return True

    def model(self, spec: ModelSpec, num_classes: int) -> VisionMamba:
        check_arguments(spec)
        for name in CLIP_ARGUMENTS & spec.kwargs.keys():
            raise UsageError(f"--model-kwargs {name}=...: use --{name.replace('_', '-')}")
        frames = {name: getattr(self.args, name) for name in CLIP_ARGUMENTS}
        spec = dataclasses.replace(spec, kwargs={**spec.kwargs, **frames})
        return build_model(spec, num_classes)

    def predict(self, model: VisionMamba, images: Tensor) -> Result:
        """images [B, 3, T, H, W], or views [B, V, 3, T, H, W] -> the mean of their probabilities,
        as logarithms.
        """
        if images.dim() == 5:
            return model(images)
        return _mean([model(images[:, view]) for view in range(images.shape[1])])

    def meter(self, args: argparse.Namespace, data: Data, device: torch.device) -> VideoMeter:
        return VideoMeter(device, args.num_frames // args.tubelet_size)


def _mean(results: Sequence[Result]) -> Result:
    """One Result of the views' results: the first one's, with the decisions of all, those of a
    video beside each other.
    """
    logits = torch.stack([result.logits.float() for result in results], dim=1)
    merged = logits.log_softmax(-1).logsumexp(1) - math.log(len(results))
    return dataclasses.replace(
        results[0],
        logits=merged,
        view_logits=logits,
        gates=torch.stack([result.gates for result in results], dim=2).flatten(1, 2),
        kept=[torch.stack(stage, dim=1).flatten(0, 1) for stage in kept_in_all(results)],
    )


VIDEO = register(VideoClassification())
