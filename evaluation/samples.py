"""What a model decided for single images, as pictures."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from drawing.pictures import Decisions, draw_strip
from evaluation.inference import Classifier
from loading.data import Data
from loading.images import BadImageError
from loading.transforms import eval_transform, seen_region
from models import DynamicVisionMamba, Result
from models.build import build_dense
from models.flops import count_flops, exact_per_image
from utils.files import atomic_file

CLASSES = 5


def dense_flops(args: argparse.Namespace, num_classes: int) -> float:
    """`exact` operations of the dense counterpart, which need its sizes alone."""
    with torch.device("meta"):
        return count_flops(build_dense(args, num_classes)).exact


def explain(classifier: Classifier, result: Result, names: list[str]) -> list[Decisions]:
    """What a result says of each image of its batch."""
    model = classifier.model
    dynamic = isinstance(model, DynamicVisionMamba)
    dense = dense_flops(classifier.args, model.num_classes)
    flops = exact_per_image(model, result.gates).tolist()
    gates = result.gates.float().cpu().numpy()
    kept = [stage.cpu().numpy() for stage in result.kept]
    return [
        Decisions(
            name,
            [(label, p) for _, label, p in likeliest],
            [stage[i] for stage in kept],
            gates[:, i] if dynamic and model.route_blocks else None,
            flops[i],
            dense,
            model.pruning_layers if dynamic else (),
        )
        for i, (name, likeliest) in enumerate(
            zip(names, classifier.likeliest(result.logits, CLASSES), strict=True)
        )
    ]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, atomically."""
    with atomic_file(path) as file:
        picture.save(file, format="PNG", optimize=False, compress_level=4)


def draw_samples(classifier: Classifier, data: Data, output: Path, count: int = 4) -> None:
    """Strips of validation images spread over the data set, `sample1.png`, ...; none for a stream."""
    if data.val is None:
        return
    transform = eval_transform(classifier.args, classifier.img_size)
    count = min(count, len(data.val))
    for number in range(count):
        index = (2 * number + 1) * len(data.val) // (2 * count)
        try:
            image, label = data.val.load(index)
        except BadImageError:  # the evaluation has named it, or ended there
            continue
        name = f"sample {number + 1}: {data.class_names[label]}"
        [said] = explain(classifier, classifier.forward(transform(image)[None]), [name])
        region = seen_region(image.size, classifier.args, classifier.img_size)
        save_picture(
            draw_strip(image, region, classifier.model, said), output / f"sample{number + 1}.png"
        )
