"""Classify images: class and probability of each file.

python predict.py --model-path output/dyvm/best_checkpoint.pth photo.jpg more/
python predict.py --model-path output/dyvm/best_checkpoint.pth --json more/ > predictions.json
"""

import json
import logging
import signal
import sys
from collections.abc import Iterator
from typing import Any

from evaluation.inference import Predictor, build_parser, find_images, load_predictor
from loading.bad_images import BadImages
from loading.images import FileImages
from tasks.classification import CLASSIFICATION, likeliest
from utils.arguments import positive
from utils.errors import UserError
from utils.program import run_main


def predictions(predictor: Predictor, images: FileImages, top: int) -> Iterator[dict[str, Any]]:
    """One entry per image, in the order of the files: its classes, or why it could not be read."""
    bad_images = BadImages("skip")
    names = iter(range(len(images)))

    def unreadable(before: int | None) -> Iterator[dict[str, Any]]:
        """Entries of the files before image `before` that were missing from the batches."""
        for index in names:
            if index == before:
                return
            name = images.describe(index)
            yield {"file": name, "error": bad_images.found[name]}

    for batch, result in predictor.results(images, bad_images):
        answers = likeliest(result.logits, predictor.class_names, top)
        for index, classes in zip(batch.indices.tolist(), answers, strict=True):
            yield from unreadable(index)
            label, name, probability = classes[0]
            yield {
                "file": images.describe(index),
                "class": label,
                "name": name,
                "probability": probability,
                "top": [{"class": c, "name": n, "probability": p} for c, n, p in classes],
            }
    yield from unreadable(None)


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = build_parser(
        "predict.py",
        "Print class and probability of images; unreadable files are reported and skipped.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="image or folder of images")
    parser.add_argument(
        "--json", action="store_true", help="a JSON list with one entry per file and line"
    )
    parser.add_argument(
        "--top", type=positive, default=5, help="likeliest classes to list in --json"
    )
    predictor = load_predictor(parser, sys.argv[1:] if argv is None else argv)
    if predictor.task.name != CLASSIFICATION.name:
        raise UserError(
            f"{predictor.args.model_path} is a model for {predictor.task.name}; predict.py names "
            "the classes of images"
        )
    images = find_images(predictor.args.files)
    read = failed = 0
    if predictor.args.json:
        print("[", end="")
    for entry in predictions(predictor, images, predictor.args.top):
        if "error" in entry:
            failed += 1
            print(f"{entry['file']}: {entry['error']}", file=sys.stderr)
        else:
            read += 1
        if predictor.args.json:
            print(",\n" if read + failed > 1 else "\n", json.dumps(entry), sep="", end="")
        elif "error" not in entry:
            print(f"{entry['file']}\t{entry['name']}\t{100 * entry['probability']:.1f} %")
    if predictor.args.json:
        print("\n]")
    if not read:
        raise UserError(
            f"none of the {failed} files could be read as an image"
            if failed > 1
            else "the file could not be read as an image"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `predict.py ... | head` ends it silently
    run_main(main)
