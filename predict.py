"""Name what is in images: the class of each file, or the classes of its pixels.

python predict.py --model-path output/dyvm/best_checkpoint.pth photo.jpg more/
python predict.py --model-path output/dyvm/best_checkpoint.pth --json more/ > predictions.json
python predict.py --model-path output/segmenter/best_checkpoint.pth --overlay pictures photos/
python predict.py --model-path dyvm.onnx photo.jpg        # what export.py has written

With `--overlay DIR`, of a segmenter: `DIR/overlays/X.png` shows the classes over each image,
`DIR/predictions/X.png` holds them, as a palette PNG of the image's own size.
"""

from utils.startup import prepare

prepare()

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from drawing.pictures import save_picture
from drawing.segmentation import draw_overlay, label_map
from evaluation.inference import Predictor, build_parser, check_outside, load_predictor
from evaluation.samples import PictureNames
from loading.bad_images import BadImages
from loading.images import ImageSet
from tasks import TASKS, Named
from utils.arguments import positive
from utils.errors import UsageError, UserError
from utils.files import prepare_output_dir
from utils.program import run_main

NOT_FINITE = "the model's answer is not finite (NaN): look at its weights, or leave out --amp"


class Prediction(NamedTuple):
    """Of one file: what the model says of it, or why it says nothing."""

    index: int
    file: str
    named: Named | None
    error: str | None = None

    @property
    def entry(self) -> dict:
        """For --json."""
        return {"file": self.file} | ({"error": self.error} if self.error else self.named.values)


def predictions(predictor: Predictor, images: ImageSet, top: int) -> Iterator[Prediction]:
    """One per image, in the order of the files."""
    bad_images = BadImages("skip")
    names = iter(range(len(images)))

    def unreadable(before: int | None) -> Iterator[Prediction]:
        """Of the files before image `before` that were missing from the batches."""
        for index in names:
            if index == before:
                return
            name = images.describe(index)
            yield Prediction(index, name, None, bad_images.found[name])

    for batch, result in predictor.results(images, bad_images, evaluated=True):
        answers = predictor.task.named(result, batch.targets, predictor.class_names, top)
        usable = [True] * len(answers)
        if result.logits is not None:  # else too large to be kept: a segmenter's labels alone
            usable = result.logits.flatten(1).isfinite().all(dim=1).tolist()
        for place, (index, named) in enumerate(zip(batch.indices.tolist(), answers, strict=True)):
            yield from unreadable(index)
            error = None if usable[place] else NOT_FINITE
            yield Prediction(index, images.describe(index), named, error)
    yield from unreadable(None)


class Overlays:
    """Writes label maps, and pictures of them over their images."""

    def __init__(self, output: Path, images: ImageSet, class_names: list[str]):
        self.images, self.class_names, self.names = images, class_names, PictureNames()
        self.pictures, self.labels = (
            prepare_output_dir(output / folder) for folder in ("overlays", "predictions")
        )
        folders = {os.path.dirname(os.path.abspath(images.describe(i))) for i in range(len(images))}
        self.root = os.path.commonpath(folders)

    def write(self, prediction: Prediction) -> None:
        """The image is read a second time, to be drawn at its own resolution."""
        labels = prediction.named.labels
        shown = os.path.relpath(os.path.abspath(prediction.file), self.root)
        name = self.names.name(shown)
        image = self.images.load_image(prediction.index)
        save_picture(label_map(labels), self.labels / name)
        save_picture(draw_overlay(image, labels, self.class_names, shown), self.pictures / name)


def check(predictor: Predictor) -> None:
    """Raise UserError for a model that cannot do what is asked for."""
    task, args = predictor.task, predictor.args
    if not task.predicts:
        raise UserError(
            f"{args.model_path} is a model for {task.name}; predict.py names the classes of images"
        )
    if args.overlay and not task.labels_pixels:
        able = ", ".join(name for name, other in TASKS.items() if other.labels_pixels)
        raise UsageError(
            f"--overlay needs a model for {able}; {args.model_path} is one for {task.name}"
        )


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = build_parser(
        "predict.py",
        "Print the class of images and its probability, or the classes of their pixels and their "
        "shares; unreadable files are reported and skipped.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="image or folder of images")
    parser.add_argument(
        "--json", action="store_true", help="a JSON list with one entry per file and line"
    )
    parser.add_argument("--top", type=positive, default=5, help="classes to list of an image")
    parser.add_argument(
        "--overlay",
        metavar="DIR",
        help="for the label maps of a segmenter, and pictures of them over the images",
    )
    predictor = load_predictor(parser, sys.argv[1:] if argv is None else argv, exported=True)
    check(predictor)
    args, overlays = predictor.args, None
    images = predictor.files(args.files)
    if args.overlay:
        check_outside("--overlay", Path(args.overlay), args.files)
        overlays = Overlays(Path(args.overlay), images, predictor.class_names)
    read = failed = 0
    if args.json:
        print("[", end="")
    for prediction in predictions(predictor, images, args.top):
        if prediction.error:
            failed += 1
            print(f"{prediction.file}: {prediction.error}", file=sys.stderr)
        else:
            read += 1
            if overlays:
                overlays.write(prediction)
        if args.json:
            print(
                ",\n" if read + failed > 1 else "\n", json.dumps(prediction.entry), sep="", end=""
            )
        elif not prediction.error:
            print(f"{prediction.file}\t{prediction.named.text}")
    if args.json:
        print("\n]")
    if not read and prediction.error == NOT_FINITE:
        raise UserError(NOT_FINITE)
    if not read:
        raise UserError(
            f"none of the {failed} files could be read as an image"
            if failed > 1
            else "the file could not be read as an image"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `predict.py ... | head` ends it silently
    run_main(main)
