"""Small real video files whose frames say their own number."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8  # of a frame's number, as dark and bright columns


def numbered(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames [count, H, W, 3] uint8 whose columns are the bits of their number, most significant
    first; a red band at the bottom tells which way is up.
    """
    numbers = np.arange(count)[:, None] >> np.arange(BITS)[::-1] & 1
    columns = np.repeat(numbers, -(-width // BITS), axis=1)[:, :width]
    frames = np.repeat((40 + 170 * columns)[:, None, :, None], height, axis=1).repeat(3, axis=3)
    frames[:, -height // 4 :] = (200, 30, 30)
    return frames.astype(np.uint8)


def numbers_of(frames: np.ndarray) -> list[int]:
    """The numbers that `numbered` frames [T, H, W, 3] show."""
    width = frames.shape[2] // BITS
    centres = np.arange(BITS) * width + width // 2
    row = frames[:, frames.shape[1] // 4, centres].mean(axis=-1) > 125
    return (row << np.arange(BITS)[::-1]).sum(axis=1).tolist()


def write_video(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times: Sequence[int] | None = None,
    rate: int = 25,
    **options: str,
) -> Path:
    """Encode frames [T, H, W, 3] uint8.

    times: of each frame, in 1 / (10 `rate`) seconds; None: evenly spaced.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        base = Fraction(1, 10 * rate)
        if times is not None:
            stream.codec_context.time_base = base
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
