"""What a model decided for single images, as pictures."""

import hashlib
import os
from pathlib import Path

import torch

from drawing.animation import save_animation
from drawing.pictures import ImageReport, save_picture
from drawing.strips import draw_strip
from evaluation.inference import Predictor
from loading.data import Data
from loading.images import BadImageError
from models import Result
from models.build import ModelSpec
from models.flops import count_flops, flops_per_image


def dense_flops(predictor: Predictor) -> float:
    """`exact` operations of the dense counterpart; only its sizes matter, not its weights."""
    spec = ModelSpec.from_args(predictor.args).dense()
    with torch.device("meta"):
        return count_flops(predictor.task.model(spec, len(predictor.class_names))).exact


def explain(predictor: Predictor, result: Result, names: list[str]) -> list[ImageReport]:
    """A report of each image of a batch from its result."""
    model = predictor.model
    dense = dense_flops(predictor)
    flops = flops_per_image(model, result.gates, result.counts).exact.tolist()
    gates = result.gates.float().cpu().numpy()
    kept, groups = (
        [stage.cpu().numpy() for stage in stages] for stages in (result.kept, result.groups)
    )
    answers = predictor.task.answers(result, predictor.class_names)
    return [
        ImageReport(
            name,
            answer,
            [stage[i][stage[i] >= 0] for stage in kept],
            gates[:, i] if model.route_blocks else None,
            flops[i],
            dense,
            model.pruning_layers,
            [stage[i] for stage in groups],
        )
        for i, (name, answer) in enumerate(zip(names, answers, strict=True))
    ]


class PictureNames:
    """Names for the images' pictures: the image's own name with .png, made unique.

    Of a name that is too long for a file the end is kept, after a hash of the whole.
    """

    LONGEST = 200  # bytes; most file systems take 255, and a file being written has a longer name

    def __init__(self):
        self._taken: set[str] = set()

    def name(self, image: str) -> str:
        """`image`: path relative to the folder passed by the user."""
        flat = image.replace(os.sep, "_")
        stem, ending = os.path.splitext(flat)
        raw = os.fsencode(stem)
        if len(raw) > self.LONGEST:
            end = raw[-self.LONGEST :].decode(errors="ignore")
            stem = f"{hashlib.sha256(raw).hexdigest()[:8]}_{end}"
        name, number = f"{stem}.png", 1
        while name in self._taken:
            suffix = number if number > 1 else ""
            name, number = f"{stem}_{ending.lstrip('.')}{suffix}.png", number + 1
        self._taken.add(name)
        return name


def draw_samples(predictor: Predictor, data: Data, output: Path, count: int = 4) -> None:
    """Strips `sample1.png`, ... of evenly spread validation images; none for a stream."""
    if data.val is None:
        return
    task, args, img_size = predictor.task, predictor.args, predictor.img_size
    transform = task.image_transform(args, img_size)
    count = min(count, len(data.val))
    for number in range(count):
        index = (2 * number + 1) * len(data.val) // (2 * count)
        try:
            image, target = data.val.load(index)
            inputs = transform(image)
        except BadImageError:  # the evaluation has reported it, or ended there
            continue
        name = f"sample {number + 1}"
        label = task.name_of(target, data.class_names)
        title = f"{name}: {label}" if label else name
        [report] = explain(predictor, predictor.forward(inputs[None]), [title])
        picture, region = task.picture(image, inputs, predictor.model.patch_embed)
        strip = draw_strip(picture, region, predictor.model, report)
        save_picture(strip, output / f"sample{number + 1}.png")
        moving = task.moving_picture(inputs, predictor.model, report)
        if moving:
            save_animation(moving, output / f"sample{number + 1}.gif")
