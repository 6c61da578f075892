"""Draw what a model decides for images: tokens kept per stage, scans that run, cost.

    python visualize.py --model-path output/dyvm/best_checkpoint.pth --images photo.jpg \
        --output_dir pictures
    python visualize.py --model-path output/dyvm/best_checkpoint.pth --images photos/ \
        --output_dir pictures

One PNG per image, and a GIF for a video; for several images also contact sheets and `images.csv`.
"""

from utils.startup import prepare

prepare()

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from drawing.animation import save_animation
from drawing.pictures import ImageReport, save_picture
from drawing.sheets import ContactSheets
from drawing.strips import draw_strip
from evaluation.inference import Predictor, build_parser, check_outside, load_predictor
from evaluation.samples import PictureNames, explain
from loading.bad_images import BadImages
from loading.images import ImageSet
from utils.errors import UserError, printable
from utils.files import prepare_output_dir, write_csv
from utils.program import run_main

_logger = logging.getLogger(__name__)


def draw_all(
    predictor: Predictor, images: ImageSet, root: str, output: Path
) -> Iterator[tuple[ImageReport, str]]:
    """Write the strip of each readable image; -> its report and the name of its picture.

    Images are read twice, for the model and to be drawn at their own resolution; none is kept.
    """
    bad_images, names = BadImages("skip"), PictureNames()
    sheets = ContactSheets(output) if len(images) > 1 else None
    for batch, result in predictor.results(images, bad_images):
        files = [os.path.relpath(images.describe(index), root) for index in batch.indices.tolist()]
        reports = explain(predictor, result, files)
        for place, (index, report) in enumerate(zip(batch.indices.tolist(), reports, strict=True)):
            patches = predictor.model.patch_embed
            image, region = predictor.task.picture(
                images.load(index).image, batch.images[place], patches
            )
            picture = names.name(report.name)
            save_picture(draw_strip(image, region, predictor.model, report), output / picture)
            moving = predictor.task.moving_picture(batch.images[place], predictor.model, report)
            if moving:
                save_animation(moving, (output / picture).with_suffix(".gif"))
            if sheets is not None:
                sheets.add(image, region, predictor.model, report)
            yield report, picture
    if sheets is not None:
        sheets.close()
    for name, reason in bad_images.found.items():
        _logger.warning("%s: %s; left out", name, reason)


def log_what_is_missing(predictor: Predictor) -> None:
    """One line on what cannot be shown of this model."""
    model = predictor.model
    if not (model.pruning_layers or model.route_blocks):
        _logger.info(
            "%s is a dense model: it drops no tokens and has no gates to show",
            predictor.args.model_path,
        )
    elif not model.pruning_layers:
        _logger.info(
            "%s routes blocks alone: it drops no tokens to show", predictor.args.model_path
        )
    elif not model.route_blocks:
        _logger.info("%s prunes tokens alone: it has no gates to show", predictor.args.model_path)


def _first_answer(report: ImageReport) -> tuple[str, str]:
    """The likeliest class and its probability; empty for a task without classes."""
    return next(((name, f"{share:.6f}") for name, share in report.classes), ("", ""))


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = build_parser("visualize.py", "Draw the tokens kept, the gates and the cost of images.")
    parser.add_argument("--images", required=True, metavar="FILE|FOLDER")
    parser.add_argument("--output_dir", "--output-dir", required=True, metavar="DIR")
    predictor = load_predictor(parser, sys.argv[1:] if argv is None else argv)
    source = os.path.normpath(predictor.args.images)
    output = Path(predictor.args.output_dir)
    check_outside("--output_dir", output, [source], "--images")
    images = predictor.files([source])
    # A folder may be one video, by its frames.
    alone = len(images) == 1 and images.describe(0) == source
    root = source if os.path.isdir(source) and not alone else os.path.dirname(source)
    prepare_output_dir(output)
    log_what_is_missing(predictor)
    rows = [
        (report.name, picture, *_first_answer(report), int(report.flops), int(report.dense_flops))
        for report, picture in draw_all(predictor, images, printable(root) or ".", output)
    ]
    if not rows:
        raise UserError(f"--images {source}: nothing in it could be read as an image")
    header = ("file", "picture", "class", "probability", "exact_flops", "dense_exact_flops")
    if len(images) > 1:
        write_csv(output / "images.csv", header, rows)
    share = sum(row[4] for row in rows) / sum(row[5] for row in rows)
    _logger.info(
        "%d of %d images drawn in %s; on average %.1f %% of the dense model's operations (exact)",
        len(rows),
        len(images),
        output,
        100 * share,
    )


if __name__ == "__main__":
    run_main(main)
