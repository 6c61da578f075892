"""Clips at 224 pixels: what dropping tokens saves, what decoding costs, what memory they need.

    python benchmarks/video.py --output benchmarks/results/video-cpu.json

Models: dense and dynamic VideoMamba with the same random weights see the same clip in turn, for
each number of frames; samples are redone while other processes are busy. The logits of everything
that is timed are compared with the float32 definition first.

Decoding: the frames of a clip, spread over a video of Kinetics' size, by the reader of this
repository, by a loop that decodes every frame, and by torchcodec where it is installed. All must
give the same pixels (torchcodec, which converts colours by itself, nearly so).

Memory: of one forward pass of the dense and of the dynamic model, for the longest clips.

What is wrong gets no number, and the command fails.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import checking, flags, records
from benchmarks.memory import mebibytes, peak_memory
from benchmarks.model import SIZES, TOLERANCES, random_images, set_routers
from loading.compositing import backdrop
from loading.frames import Uniform
from loading.video import VideoFile
from models import VisionMamba
from models.build import ModelSpec, build_model
from models.flops import count_flops
from utils import arguments
from utils.errors import first_line
from utils.files import write_json
from utils.precision import autocast
from utils.program import run_main
from utils.tables import text_table
from utils.timing import interleaved

TOKEN_KEEP, BLOCK_KEEP = 0.7, 0.8
CALIBRATION = 5  # clips on which the routers are set
CLASSES = 400
IMG_SIZE = 224
HEIGHT, WIDTH, LENGTH, RATE = 256, 340, 300, 30  # of the video: ten seconds, as in Kinetics
NEARLY = 3  # mean difference, of 255, that another colour conversion may make


def parse_args():
    parser = flags.build_parser("video.py", __doc__)
    parser.add_argument("--models", nargs="*", choices=("T", "S"), default=["T"])
    parser.add_argument("--frames", nargs="+", type=arguments.positive, default=[8, 16])
    parser.add_argument(
        "--memory-frames", nargs="*", type=arguments.positive, default=[8, 64], metavar="T"
    )
    flags.add_seconds(parser, 60.0)
    flags.add_retries(parser, 10)
    flags.add_precision(parser)
    return flags.parse(parser)


def random_clips(count: int, frames: int, device: str) -> Tensor:
    """[count, 3, frames, H, W]: a picture that changes a little from frame to frame."""
    still = random_images(count, IMG_SIZE, device)[:, :, None]
    return still + 0.3 * torch.randn(count, 3, frames, IMG_SIZE, IMG_SIZE, device=device)


def build(size: str, frames: int, args) -> dict[str, VisionMamba]:
    """Dense and dynamic model with the same random weights."""
    torch.manual_seed(0)
    found = {}
    for kind, method in (("dense", "dense"), ("dynamic", "dyvm")):
        name = ("dyvm_" if method == "dyvm" else "") + f"videomamba_{SIZES[size]}"
        spec = ModelSpec(
            name,
            method=method,
            kwargs={"num_frames": frames, "tubelet_size": 1},
            pruning_layers=(6, 12, 18),
            token_keep_ratio=TOKEN_KEEP,
            img_size=IMG_SIZE,
        )
        found[kind] = build_model(spec, CLASSES)
    checking.set_telling_weights(found["dense"])
    found["dynamic"].load_state_dict(found["dense"].state_dict(), strict=False)
    for model in found.values():
        model.to(args.device).eval().requires_grad_(False)
    set_routers(found["dynamic"], random_clips(CALIBRATION, frames, args.device), BLOCK_KEEP)
    return found


def forward(model: VisionMamba, clips: Tensor, args) -> Any:
    with autocast(args.device, args.precision):
        return model(clips)


def measure_models(size: str, frames: int, args) -> dict[str, Any]:
    """Clips a second and operations of both models, if they are right."""
    clips = random_clips(1, frames, args.device)
    calls, errors, operations, kept = {}, {}, {}, {}
    with torch.inference_mode():
        for kind, model in build(size, frames, args).items():
            precision = autocast(args.device, args.precision)
            errors[kind] = checking.logits_error(model, clips, None, precision)
            result = model(clips)
            operations[kind] = count_flops(model, result.gates.float().mean(dim=1).cpu()).exact
            kept[kind] = result.gates.float().mean().item()
            calls[kind] = partial(forward, model, clips, args)
        wrong = [kind for kind, error in errors.items() if not error <= TOLERANCES[args.precision]]
        checking.require_correct(wrong, TOLERANCES[args.precision])
        for call in calls.values():
            call()
        times = interleaved(calls, args.device, 5, args.seconds, args.retries)
    return {
        "size": size,
        "frames": frames,
        "errors": errors,
        "operations": operations,
        "scans_kept": kept,
        "times": times,
    }


def measure_memory(size: str, frames: int, args) -> dict[str, Any]:
    """Bytes that a forward pass of one clip needs at its peak, by model."""
    clips = random_clips(1, frames, args.device)
    found = {}
    with torch.inference_mode():
        for kind, model in build(size, frames, args).items():
            forward(model, clips, args)  # allocates what stays
            found[kind] = peak_memory(partial(forward, model, clips, args), args.device)
    return {"size": size, "frames": frames, "bytes": found}


def write_sample(path: Path) -> None:
    """A video of Kinetics' size and length as H.264: a view that drifts over a backdrop."""
    random = np.random.RandomState(0)
    ground = backdrop(random, 2 * WIDTH).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "23"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number in range(LENGTH):
            top, left = number, number // 2
            image = ground[top : top + HEIGHT, left : left + WIDTH]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def ours(path: Path, count: int) -> np.ndarray:
    video = VideoFile(str(path))
    return video.read(Uniform().middle(len(video), count))


def every_frame(path: Path, count: int) -> np.ndarray:
    """Decode all frames, as a plain loop does, and choose among them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    return np.stack([frames[index] for index in Uniform().middle(len(frames), count)])


def torchcodec_decoder():
    """torchcodec's class, or the reason why it cannot be used."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:
        return first_line(error)
    return VideoDecoder


def by_torchcodec(decoder, path: Path, count: int) -> np.ndarray:
    video = decoder(str(path), num_ffmpeg_threads=1)
    chosen = Uniform().middle(len(video), count)
    return video.get_frames_at(chosen).data.permute(0, 2, 3, 1).numpy()


def measure_decoding(frames: int, args) -> dict[str, Any]:
    """Milliseconds for the frames of a clip by each reader that gives the right pixels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.mp4"
        write_sample(path)
        calls = {
            "this repository": partial(ours, path, frames),
            "every frame": partial(every_frame, path, frames),
        }
        decoder = torchcodec_decoder()
        if not isinstance(decoder, str):
            calls["torchcodec"] = partial(by_torchcodec, decoder, path, frames)
        expected = calls["every frame"]().astype(float)
        errors = {name: float(np.abs(call() - expected).mean()) for name, call in calls.items()}
        wrong = [name for name, error in errors.items() if error > (name == "torchcodec") * NEARLY]
        checking.require_correct(wrong, NEARLY)
        times = interleaved(calls, "cpu", 5, args.seconds / 3, args.retries)
    found = {"frames": frames, "errors": errors, "times": times}
    return found | ({"torchcodec": decoder} if isinstance(decoder, str) else {})


def model_table(parts: list[dict[str, Any]]) -> str:
    rows = []
    for part in parts:
        dense, dynamic = (part["times"][kind] for kind in ("dense", "dynamic"))
        before, after = (part["operations"][kind] for kind in ("dense", "dynamic"))
        speed, saved = dense["ms"] / dynamic["ms"], before / after
        rows.append(
            [
                f"VideoMamba-{part['size']}, {part['frames']} frames",
                f"{before / 1e9:.2f}",
                f"{after / 1e9:.2f}",
                f"{1e3 / dense['ms']:.3f}",
                f"{1e3 / dynamic['ms']:.3f}",
                f"{speed:.3f}",
                f"{saved:.3f}",
                f"{100 * speed / saved:.0f} %",
                f"{dense['samples']}",
            ]
        )
    headers = [
        "", "GFLOPs dense", "dynamic", "clips/s dense", "dynamic", "x as fast", "x by exact",
        "reached", "samples",
    ]  # fmt: skip
    return text_table(rows, headers)


def decoding_table(parts: list[dict[str, Any]]) -> str:
    rows = []
    for part in parts:
        plain = part["times"]["every frame"]["ms"]
        rows += [
            [
                f"{part['frames']} of {LENGTH} frames, {name}",
                f"{row['ms']:.1f}",
                f"{plain / row['ms']:.2f}",
                f"{part['errors'][name]:.2f}",
                f"{row['samples']}",
            ]
            for name, row in part["times"].items()
        ]
    return text_table(rows, ["decoding", "ms", "x as fast", "difference", "samples"])


def memory_table(parts: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"VideoMamba-{part['size']}, {part['frames']} frames",
            *(mebibytes(part["bytes"][kind]) for kind in ("dense", "dynamic")),
        ]
        for part in parts
    ]
    return text_table(rows, ["MiB of a forward pass", "dense", "dynamic"])


def main() -> None:
    args = parse_args()
    record = {
        **records.head("video.py", args.device, "av"),
        "precision": args.precision,
        "token_keep_ratio": TOKEN_KEEP,
        "block_keep_ratio": BLOCK_KEEP,
        "models": [],
        "decoding": [measure_decoding(frames, args) for frames in args.frames],
        "memory": [],
    }
    print(f"{record['device']}, {record['threads']} threads, {args.precision}")
    print(decoding_table(record["decoding"]), flush=True)
    for size in args.models:
        record["models"] += [measure_models(size, frames, args) for frames in args.frames]
        record["memory"] += [measure_memory(size, frames, args) for frames in args.memory_frames]
    if args.models:
        print(model_table(record["models"]))
        print(memory_table(record["memory"]))
    if args.output:
        write_json(args.output, record)


if __name__ == "__main__":
    run_main(main)
