"""Semantic segmentation: one class for each pixel.

A segmenter is trained on crops of the model's image size and predicts larger images in windows of
it. Its backbone starts from a classifier, or from a dense segmenter, which is then the teacher.

B images, C classes; H, W pixels of an image or label map. Source: Vim's and DyVM's releases, after
mmsegmentation.
"""

import argparse
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import to_2tuple
from torch import Tensor, nn

from loading.data import Data
from loading.joint_transforms import (
    SegmentationAugmentation,
    segmentation_eval_transform,
    segmentation_train_transform,
)
from loading.masks import IGNORED
from loading.transforms import Transform, Transforms
from models import Result, VisionMamba
from models.build import ModelSpec, build_model
from models.official_names import is_segmenter
from models.segmentation import as_segmenter, follow_release, make_head
from models.segmentation_weights import load_backbone
from models.tokens import kept_in_all
from models.upernet import resize
from utils.errors import UsageError, UserError
from utils.images import ImageSize

from .base import Task, check_arguments
from .checkpoints import check_classes
from .measures import Measure, Named
from .registry import register
from .segmentation_flags import add_segmentation_arguments, check_segmentation_arguments
from .segmentation_measures import SegmentationMeter, frozen_pixels
from .segmentation_pictures import (
    PICTURES,
    draw_comparisons,
    frozen_text,
    list_comparisons,
    name_pixels,
    read_class_scores,
    write_class_scores,
)
from .sliding_window import parts_of, sliding_labels, sliding_logits

WINDOWS_AT_ONCE = 8
MOST_LOGITS = 1 << 29  # numbers of one image (2 GiB); above that only labels are kept
SHOWN = 5  # classes in a picture's caption

_logger = logging.getLogger(__name__)


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits [B, C, ., .] with labels [B, H, W], which they are resized to.

    The mean is over all pixels; ignored ones count 0, as in mmsegmentation.
    """
    logits = resize(logits.float(), labels.shape[-2:])
    loss = F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="sum")
    return loss / labels.numel()


class SegmentationTerms(nn.Module):
    """`decode` and, of the auxiliary head, `aux`: cross entropy of the pixels."""

    def __init__(self, aux_weight: float):
        super().__init__()
        self.aux_weight = aux_weight

    def forward(self, result: Result, labels: Tensor) -> dict[str, Tensor]:
        terms = {"decode": pixel_cross_entropy(result.logits, labels)}
        if result.aux_logits is not None:
            terms["aux"] = self.aux_weight * pixel_cross_entropy(result.aux_logits, labels)
        return terms


class Segmentation(Task):
    """Pixel-wise cross entropy and mean IoU, as on ADE20K."""

    name = "segmentation"
    measures = (
        Measure("miou", "mIoU", "miou", unit="%"),
        Measure("macc", "mean class accuracy", "macc", unit="%"),
        Measure("aacc", "pixel accuracy", "aacc", unit="%"),
    )
    details = ("iou_per_class", "accuracy_per_class", "frozen_per_class")
    evaluation_flags = ("eval_mode", "eval_stride", "eval_short_side", "flip_test")
    recorded = (
        "decoder",
        "decoder_channels",
        "output_layers",
        "features",
        "eval_mode",
        "eval_stride",
        "eval_short_side",
    )
    has_decoder = True
    fixed_size = False
    predicts = labels_pixels = True
    defaults = {
        "model_ema": False,
        "repeated_aug": False,
        "token_pruning_weight": 20.0,
        "block_pruning_weight": 20.0,
    }

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_segmentation_arguments(parser)

    def check(self, args: argparse.Namespace) -> None:
        check_segmentation_arguments(args)

    def transforms(self, args: argparse.Namespace, img_size: ImageSize, train: bool) -> Transforms:
        augmentation = SegmentationAugmentation(
            crop=img_size,
            ratio_range=tuple(args.scale_range),
            cat_max_ratio=args.cat_max_ratio,
            flip=args.hflip,
            photometric=args.photometric,
        )
        return Transforms(
            segmentation_train_transform(augmentation) if train else None,
            _eval_transform(args, img_size),
        )

    def eval_batch_size(self, args: argparse.Namespace) -> int:
        return 1  # images differ in size

    def image_transform(
        self, args: argparse.Namespace, img_size: ImageSize
    ) -> Callable[[Image.Image], Tensor]:
        """Squeezes an image into one window, so that a picture shows one set of decisions."""
        return segmentation_eval_transform(size=to_2tuple(img_size))

    def seen_region(
        self, size: tuple[int, int], args: argparse.Namespace, img_size: ImageSize
    ) -> tuple[float, float, float, float]:
        return 0.0, 0.0, float(size[0]), float(size[1])

    def check_checkpoint(
        self, checkpoint: Mapping[str, Any], class_names: Sequence[str], source: str
    ) -> None:
        check_classes(checkpoint, class_names, source)

    def recognises(self, checkpoint: Mapping[str, Any]) -> bool:
        return is_segmenter(checkpoint["model"])

    def num_classes(self, checkpoint: Mapping[str, Any], source: str) -> int:
        for name, value in checkpoint["model"].items():
            # The auxiliary head is the same whatever the decoder is.
            if name.endswith("auxiliary_head.conv_seg.weight") and isinstance(value, Tensor):
                return len(value)
        raise UserError(f"{source}: no auxiliary_head.conv_seg.weight in it; it is no segmenter")

    def model(self, spec: ModelSpec, num_classes: int) -> VisionMamba:
        check_arguments(spec)
        args = self.args
        kwargs = dict(spec.kwargs)
        if not spec.name.removeprefix("dyvm_").startswith("mambareg"):  # it cannot do without
            kwargs.setdefault("class_token", False)
        model = build_model(dataclasses.replace(spec, kwargs=kwargs), 0)
        try:
            head = make_head(
                args.decoder,
                model,
                num_classes,
                layers=args.output_layers,
                features=args.features,
                channels=args.decoder_channels,
            )
            as_segmenter(model, head, num_classes)
        except ValueError as error:
            raise UsageError(f"--model {spec.name}, --decoder {args.decoder}: {error}") from None
        if args.release_gradients:
            follow_release(model)
        return model

    def load_start(self, model: VisionMamba, checkpoint: Mapping[str, Any], source: str) -> bool:
        if is_segmenter(checkpoint["model"]):
            return False
        load_backbone(model, checkpoint, source)
        return True

    def criterion(self, args: argparse.Namespace) -> SegmentationTerms:
        return SegmentationTerms(args.aux_weight)

    def distillation(self, result: Result, teacher_result: Result) -> dict[str, Tensor]:
        """`pixel_kl`: KL divergence to the teacher's class probabilities, mean over pixels."""
        student, teacher = (
            r.logits.float().log_softmax(1).flatten(2) for r in (result, teacher_result)
        )
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True)
        return {"pixel_kl": divergence.sum(1).mean()}

    def predict(self, model: VisionMamba, images: Tensor) -> Result:
        """The mean of the windows' logits [B, C, H, W], the decisions of all windows."""
        args, results = self.args, []
        crop = model.patch_embed.img_size

        def answer(windows: Tensor) -> Tensor:
            result = model(windows)
            results.append(_decisions_of(result))
            return result.logits.float()

        def forward(windows: Tensor) -> Tensor:
            logits = answer(windows)
            return (logits + answer(windows.flip(-1)).flip(-1)) / 2 if args.flip_test else logits

        stride = to_2tuple(args.eval_stride) if args.eval_stride else _two_thirds(crop)
        height, width = images.shape[-2:]
        if model.num_classes * height * width > MOST_LOGITS and len(images) == 1:
            read = parts_of(images[0])
            labels = sliding_labels(forward, read, (height, width), crop, stride, WINDOWS_AT_ONCE)
            return dataclasses.replace(_joined(results), labels=labels[None])
        logits = sliding_logits(forward, images, crop, stride, WINDOWS_AT_ONCE)
        joined = dataclasses.replace(_joined(results), logits=logits)
        if len(results) == 1 and results[0].kept and len(results[0].owner) == len(images):
            frozen = frozen_pixels(results[0], model.patch_embed.grid, crop)
            joined.frozen = frozen[:, :height, :width]
        return joined

    def meter(
        self, args: argparse.Namespace, data: Data, device: torch.device
    ) -> SegmentationMeter:
        return SegmentationMeter(data.num_classes, device)

    def answers(self, result: Result, class_names: Sequence[str]) -> list[list[tuple[str, float]]]:
        """The largest classes of each image, with their share of its pixels."""
        answers = []
        labelled = result.logits.argmax(1) if result.labels is None else result.labels.long()
        for labels in labelled.flatten(1):
            shares = labels.bincount(minlength=len(class_names)) / len(labels)
            top = shares.topk(min(SHOWN, len(class_names)))
            pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
            answers.append([(class_names[label], share) for share, label in pairs if share])
        return answers

    def prediction_transform(
        self, args: argparse.Namespace, img_size: ImageSize
    ) -> Callable[[Image.Image], Tensor]:
        return self.transforms(args, img_size, train=False).eval

    def named(
        self, result: Result, sizes: Tensor, class_names: Sequence[str], top: int
    ) -> list[Named]:
        """The largest classes with their share of the pixels, at the image's own size."""
        return [
            name_pixels(result, index, size, class_names, top)
            for index, size in enumerate(sizes.tolist())
        ]

    def draw_evaluation(
        self,
        predict: Callable[[Tensor], Result],
        data: Data,
        img_size: ImageSize,
        values: Mapping[str, Any],
        output: Path,
    ) -> None:
        folder = output / PICTURES
        folder.mkdir(exist_ok=True)
        write_class_scores(values, data.class_names, folder)
        if values["frozen_per_class"] is not None:
            _logger.info("dropped patches show %s", frozen_text(values, data.class_names))
        transform = self.transforms(self.args, img_size, train=False).eval
        draw_comparisons(predict, data, transform, folder)

    def drawn_evaluation(self, output: Path):
        return read_class_scores(output / PICTURES), list_comparisons(output / PICTURES)


def _eval_transform(args: argparse.Namespace, img_size: ImageSize) -> Transform:
    if args.eval_mode == "whole":
        return segmentation_eval_transform(size=to_2tuple(img_size))
    if args.eval_stride:
        stride, crop = to_2tuple(args.eval_stride), to_2tuple(img_size)
        if any(step > side for step, side in zip(stride, crop, strict=True)):
            raise UsageError(
                f"--eval-stride {_sides(stride)} is larger than a window of {_sides(crop)}"
            )
    if args.eval_short_side is None:
        return segmentation_eval_transform(min(to_2tuple(img_size)))
    return segmentation_eval_transform(args.eval_short_side or None)


def _two_thirds(crop: tuple[int, int]) -> tuple[int, int]:
    return tuple(max(1, side * 2 // 3) for side in crop)


def _sides(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _decisions_of(result: Result) -> Result:
    """A Result without what grows with the number of windows and nobody reads later."""
    return dataclasses.replace(
        result, logits=None, aux_logits=None, tokens=None, class_tokens=None, maps={}
    )


def _joined(results: Sequence[Result]) -> Result:
    """One Result of all forward passes of a prediction: the last one's, with all decisions."""
    return dataclasses.replace(
        results[-1],
        gates=torch.cat([result.gates for result in results], dim=1),
        kept=[torch.cat(stage) for stage in kept_in_all(results)],
    )


SEGMENTATION = register(Segmentation())
