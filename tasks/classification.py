"""Image classification: one label for each image.

B images, C classes.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from datasets import add_augmentation_arguments
from loading.data import Data, refuse_one_class
from loading.loaders import Batch
from losses import ClassificationTerms, logits_terms
from models import Result
from utils.arguments import below_one, not_negative, probability
from utils.distributed import Distributed
from utils.errors import UsageError, UserError

from .base import Task
from .checkpoints import check_classes
from .measures import Measure, Named
from .meters import exact_sum
from .registry import register

SHOWN = 5  # classes in a picture


class ClassificationMeter:
    """Top-1 and top-5 accuracy in percent, and cross entropy."""

    def __init__(self, device: torch.device):
        # images, correct in 1, correct in 5, summed loss
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, batch: Batch, result: Result) -> None:
        logits, targets = result.logits.float(), batch.targets
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = exact_sum(F.cross_entropy(logits, targets, reduction="none"))
        counts = [self.totals.new_tensor(len(logits)), ranked[:, 0].sum(), ranked.sum(), loss]
        self.totals += torch.stack(counts).double()

    def compute(self, distributed: Distributed) -> dict[str, float]:
        count, *sums = distributed.all_reduce_sum(self.totals).tolist()
        return {
            "top1": 100 * sums[0] / count,
            "top5": 100 * sums[1] / count,
            "loss": sums[2] / count,
        }


class Classification(Task):
    """Cross entropy with mixup and label smoothing as in DeiT."""

    name = "classification"
    mixup: type[Mixup] = Mixup
    measures = (
        Measure("top1", "top-1", "acc1", unit="%"),
        Measure("top5", "top-5", "acc5", unit="%"),
        Measure("loss", "loss", "loss", format="{:.4f}", higher_is_better=False, compared=False),
    )
    predicts = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_augmentation_arguments(parser)
        add_mixup_arguments(parser)

    def check(self, args: argparse.Namespace) -> None:
        if (args.mixup or args.cutmix) and args.batch_size % 2 and not args.eval:
            raise UsageError(
                f"--batch-size {args.batch_size} must be even for mixup; or give --mixup 0 "
                "--cutmix 0"
            )

    def check_checkpoint(
        self, checkpoint: Mapping[str, Any], class_names: Sequence[str], source: str
    ) -> None:
        check_classes(checkpoint, class_names, source)

    def num_classes(self, checkpoint: Mapping[str, Any], source: str) -> int:
        head = checkpoint["model"].get("head.weight")
        if not isinstance(head, Tensor) or head.dim() != 2:
            raise UserError(f"{source}: no head.weight in it, so that it names no classes")
        return len(head)

    def data(self, args: argparse.Namespace, *settings, **more) -> Data:
        data = super().data(args, *settings, **more)
        refuse_one_class(args.data_path or args.data_set, data)
        return data

    def batch_transform(self, args: argparse.Namespace, num_classes: int) -> Mixup | None:
        if not (args.mixup or args.cutmix):
            return None
        return self.mixup(
            args.mixup,
            args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )

    def criterion(self, args: argparse.Namespace) -> ClassificationTerms:
        if args.mixup or args.cutmix:
            return ClassificationTerms(SoftTargetCrossEntropy())
        if args.smoothing:
            return ClassificationTerms(LabelSmoothingCrossEntropy(args.smoothing))
        return ClassificationTerms(nn.CrossEntropyLoss())

    def distillation(self, result: Result, teacher_result: Result) -> dict[str, Tensor]:
        return logits_terms(result, teacher_result)

    def meter(
        self, args: argparse.Namespace, data: Data, device: torch.device
    ) -> ClassificationMeter:
        return ClassificationMeter(device)

    def labels(self, batch: Batch) -> Tensor:
        return batch.targets

    def name_of(self, target: int, class_names: Sequence[str]) -> str:
        return class_names[target]

    def answers(self, result: Result, class_names: Sequence[str]) -> list[list[tuple[str, float]]]:
        return [
            [(name, share) for _, name, share in image]
            for image in likeliest(result.logits, class_names, SHOWN)
        ]

    def named(
        self, result: Result, sizes: Tensor, class_names: Sequence[str], top: int
    ) -> list[Named]:
        named = []
        for classes in likeliest(result.logits, class_names, top):
            label, name, probability = classes[0]
            values = {
                "class": label,
                "name": name,
                "probability": probability,
                "top": [{"class": c, "name": n, "probability": p} for c, n, p in classes],
            }
            named.append(Named(values, f"{name}\t{100 * probability:.1f} %"))
        return named


def add_mixup_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("mixup")
    group.add_argument("--mixup", type=not_negative, default=0.8, help="alpha of mixup; 0: none")
    group.add_argument("--cutmix", type=not_negative, default=1.0, help="alpha of CutMix; 0: none")
    group.add_argument(
        "--mixup-prob", type=probability, default=1.0, help="probability that a batch is mixed"
    )
    group.add_argument(
        "--mixup-switch-prob", type=probability, default=0.5, help="of CutMix, where both are on"
    )
    group.add_argument("--smoothing", type=below_one, default=0.1, help="label smoothing")


CLASSIFICATION = register(Classification())


def likeliest(
    logits: Tensor, class_names: Sequence[str], count: int
) -> list[list[tuple[int, str, float]]]:
    """logits [B, C] -> (class, name, probability) of each image's likeliest classes, sorted."""
    probabilities, classes = logits.float().softmax(-1).topk(min(count, logits.shape[1]))
    return [
        [(label, class_names[label], p) for label, p in zip(*image, strict=True)]
        for image in zip(classes.tolist(), probabilities.tolist(), strict=True)
    ]
