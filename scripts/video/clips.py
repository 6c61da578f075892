"""Make short videos of moving garments, to try video classification in minutes.

    python scripts/video/clips.py --output data/clips [--data-path DIR] [--train 3000] [--val 400] \
        [--size 48] [--frames 24] [--seed 0]

A garment of Fashion-MNIST, tinted, moves left, right, up or down before a backdrop; the direction
is the label. The same way is taken to and fro equally often: a single frame says nothing of the
direction, and all of them in another order no more than whether it is along the rows. The folder
is one of `--data-set VIDEO_FOLDER`, with MP4 files (H.264) in {train,val}/{left,right,up,down}/.
Validation videos show garments of Fashion-MNIST's own test part.

The pixels depend on the seed, the split, the number of the video and the size alone; the encoder
decides on the bytes.
"""

import argparse
import sys
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from loading.arrays import fashion_mnist
from loading.compositing import GARMENT_EDGE, backdrop, cut_out, over
from utils import arguments
from utils.errors import UsageError, UserError, printable
from utils.files import prepare_output_dir
from utils.program import run_main

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
SPLITS = ("train", "val")
RATE = 12  # frames a second
SMALLEST = 32  # picture


def main() -> None:
    args = parse()
    garments = {split: fashion_mnist(args.data_path, split) for split in SPLITS}
    output = prepare_output_dir(args.output)
    if any(output.iterdir()):
        raise UserError(
            f"{printable(str(output))} is not empty: give --output a new folder, or empty it"
        )
    names = list(DIRECTIONS)
    for stream, split in enumerate(SPLITS):
        for name in names:
            (output / split / name).mkdir(parents=True)
        count = {"train": args.train, "val": args.val}[split]
        for number in tqdm(range(count), desc=split, unit="video", disable=None):
            name = names[number % len(names)]
            frames = moving_garment(
                garments[split].pixels,
                DIRECTIONS[name],
                args.size,
                args.frames,
                [args.seed, stream, number],
            )
            write_video(output / split / name / f"clip_{number:06}.mp4", frames)
    (output / "classes.txt").write_text("\n".join(sorted(names)) + "\n")  # all is there
    print(f"{args.train} training and {args.val} validation videos in {printable(str(output))}")


def parse() -> argparse.Namespace:
    parser = arguments.OneLineParser(
        prog="scripts/video/clips.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--data-path",
        type=Path,
        metavar="DIR",
        help="Fashion-MNIST, as of torchvision; default: that of Debian's dataset-fashion-mnist",
    )
    parser.add_argument("--train", type=arguments.positive, default=3000, metavar="N")
    parser.add_argument("--val", type=arguments.positive, default=400, metavar="N")
    parser.add_argument(
        "--size", type=arguments.positive, default=48, help="of a frame in pixels, %(default)s"
    )
    parser.add_argument("--frames", type=arguments.positive, default=24, metavar="N")
    parser.add_argument("--seed", type=arguments.whole, default=0)
    args = parser.parse_args()
    if args.size < SMALLEST or args.size % 2:
        raise UsageError(
            f"--size {args.size}: a frame has an even number of pixels from {SMALLEST}"
        )
    if min(args.train, args.val) < len(DIRECTIONS):
        raise UsageError(
            f"--train {args.train} --val {args.val}: there are {len(DIRECTIONS)} classes, and each "
            "needs a video"
        )
    if args.seed >= 2**32:
        raise UsageError(f"--seed {args.seed}: must be below 2^32")
    return args


def moving_garment(
    garments: np.ndarray, direction: tuple[int, int], size: int, frames: int, seed: list[int]
) -> np.ndarray:
    """garments [N, 28, 28] -> a video [T, size, size, 3] uint8."""
    random = np.random.RandomState(seed)
    background = backdrop(random, size)
    picture = garments[random.randint(len(garments))]
    if random.randint(2):
        picture = picture[:, ::-1]
    side = random.randint(size // 3, size // 2 + 1)
    opacity, colours = cut_out(random, picture, side, GARMENT_EDGE)
    # Up to an eighth of the picture's side lies outside. The way is at least half of what is free.
    free = size - side + 2 * (size // 8)
    length = random.randint(free // 2, free * 9 // 10 + 1)
    first, beside = random.randint(0, free - length + 1), random.randint(0, free + 1)
    video = np.empty((frames, size, size, 3), np.uint8)
    for number in range(frames):
        image = background.copy()
        done = number if sum(direction) > 0 else frames - 1 - number
        along = first + length * done // max(frames - 1, 1)
        place = (beside, along) if direction[1] else (along, beside)
        over(image, colours, opacity, *(axis - size // 8 for axis in place))
        video[number] = image
    return video


def write_video(path: Path, frames: np.ndarray) -> None:
    """Encode frames [T, H, W, 3] uint8 as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "18", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    run_main(main)
