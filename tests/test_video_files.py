"""Reading videos: the right frames of every container and codec, and one line for a bad file."""

import os
import random
import subprocess
import sys

import av
import numpy as np
import pytest
from helpers.videos import numbered, numbers_of, write_video
from PIL import Image

from loading.images import BadImageError
from loading.video import FrameFolder, VideoFile

FRAMES = 60
KINDS = {
    "h264.mp4": dict(codec="libx264"),
    "h264-long-gop.mkv": dict(codec="libx264", g="250", bf="3"),
    "h265.mp4": dict(codec="libx265", x265_params="log-level=none"),
    "mpeg4.avi": dict(codec="mpeg4"),
    "mpeg4-b-frames.avi": dict(codec="mpeg4", bf="2"),
    "mpeg4.mp4": dict(codec="mpeg4", bf="2"),
    "vp9.webm": dict(codec="libvpx-vp9", cpu_used="8", deadline="realtime"),
    "av1.mkv": dict(codec="libsvtav1", preset="12", crf="15", g="20"),
    "av1.mp4": dict(codec="libsvtav1", preset="12", crf="15"),
    "h264.ts": dict(codec="libx264", bf="2"),
    "mjpeg.avi": dict(codec="mjpeg", pixels="yuvj420p"),
    "ffv1.mkv": dict(codec="ffv1", pixels="yuv444p"),
}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square(one.astype(float) - other).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A file of each kind with the same frames."""
    folder, frames = tmp_path_factory.mktemp("videos"), numbered(FRAMES)
    return {name: write_video(folder / name, frames, **kind) for name, kind in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_that_are_wanted(videos, kind):
    """At the start, in the middle, the last one, in any order and twice; close to the originals."""
    video, frames = VideoFile(str(videos[kind])), numbered(FRAMES)
    assert len(video) == FRAMES
    generator = random.Random(0)
    for wanted in (
        [0],
        [FRAMES - 1],
        [29, 30, 31],
        [45, 3, 3, 59, 0],
        list(range(FRAMES)),
        *(sorted(generator.choices(range(FRAMES), k=8)) for _ in range(10)),
    ):
        read = video.read(wanted)
        assert read.dtype == np.uint8 and read.shape == (len(wanted), 64, 96, 3)
        assert numbers_of(read) == wanted
        assert psnr(read, frames[wanted]) > 25


def test_a_seek_reaches_far_frames_without_decoding_all(videos, monkeypatch):
    """With key frames every 10 frames, frame 55 costs at most 10 decoded ones."""
    import loading.video as module

    counted = []
    frames = module._frames

    def counting(*arguments):
        for item in frames(*arguments):
            counted.append(item)
            yield item

    monkeypatch.setattr(module, "_frames", counting)
    path = write_video(videos["h264.mp4"].with_name("gop10.mp4"), numbered(FRAMES), g="10")
    assert numbers_of(VideoFile(str(path)).read([2, 55])) == [2, 55]
    assert len(counted) <= 3 + 10


def test_variable_frame_rate(tmp_path):
    times = np.cumsum([0, *([10, 3, 40, 7] * 9)]).tolist()
    path = write_video(tmp_path / "vfr.mkv", numbered(len(times)), times=times)
    video = VideoFile(str(path))
    assert len(video) == len(times) and numbers_of(video.read([0, 5, 30])) == [0, 5, 30]


@pytest.mark.parametrize("height, width", [(51, 97), (64, 98), (270, 34)])
def test_odd_sizes(tmp_path, height, width):
    frames = numbered(9, height, width)
    path = write_video(tmp_path / "odd.mkv", frames, "ffv1", "yuv444p")
    read = VideoFile(str(path)).read([0, 8])
    assert read.shape == (2, height, width, 3) and psnr(read, frames[[0, 8]]) > 30


@pytest.mark.parametrize("pixels", ["yuv420p10le", "gray", "yuva420p", "bgra"])
def test_ten_bits_grey_and_transparency(tmp_path, pixels):
    codec = "libx264" if pixels == "yuv420p10le" else "ffv1"
    path = write_video(tmp_path / "video.mkv", numbered(20), codec, pixels)
    assert numbers_of(VideoFile(str(path)).read([7, 19])) == [7, 19]


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_display_matrix_is_applied(tmp_path, turn):
    """The file holds frames turned by `turn` degrees and a matrix that turns them back."""
    upright = numbered(12)
    stored = np.rot90(upright, turn // 90, axes=(1, 2))
    plain = write_video(tmp_path / "plain.mp4", np.ascontiguousarray(stored))
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(with_rotation(plain.read_bytes(), turn))
    assert psnr(VideoFile(str(turned)).read([3]), upright[[3]]) > 25
    if turn != 180:
        assert VideoFile(str(plain)).read([3]).shape == (1, 96, 64, 3)


def with_rotation(content: bytes, degrees: int) -> bytes:
    """An MP4 file whose track header turns the picture clockwise."""
    one, minus = (1 << 16).to_bytes(4, "big"), (-(1 << 16)).to_bytes(4, "big", signed=True)
    none, last = bytes(4), (1 << 30).to_bytes(4, "big")
    a, b, c, d = {
        90: (none, one, minus, none),
        180: (minus, none, none, minus),
        270: (none, minus, one, none),
    }[degrees]
    place = content.index(b"tkhd") + 4 + 40
    matrix = a + b + none + c + d + none + none + none + last
    assert content[place : place + 36] == one + bytes(12) + one + bytes(12) + last
    return content[:place] + matrix + content[place + 36 :]


@pytest.mark.parametrize(
    "name", ["Ein Vidéo – ü.mp4", "видео 视频.mp4", "http:x?y#z%41.mp4", b"\xff\xfe.mp4"]
)
def test_names_in_any_alphabet(videos, tmp_path, name):
    path = os.path.join(tmp_path, os.fsdecode(name))
    os.symlink(videos["h264.mp4"], path)
    assert numbers_of(VideoFile(path).read([31])) == [31]


def test_one_frame(tmp_path):
    video = VideoFile(str(write_video(tmp_path / "one.mp4", numbered(1))))
    assert len(video) == 1 and numbers_of(video.read([0, 0, 0])) == [0, 0, 0]


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for number in range(4):
            samples = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.rate, frame.pts = 44100, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def damaged(kind, videos, folder):
    path = folder / f"{kind}.mp4"
    content = videos["h264.mp4"].read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is not a video\n" * 50)
    elif kind == "audio":
        audio_only(path)
    elif kind == "no frames":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
            stream.codec_context.open()
            container.start_encoding()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "unknown codec":
        path.write_bytes(content.replace(b"avc1", b"zzz9"))
    elif kind == "playlist":
        path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    return path


@pytest.mark.parametrize(
    "kind, words",
    [
        ("truncated", "it has no video stream|moov atom not found|Invalid data"),
        ("empty", "the file is empty"),
        ("text", "Invalid data"),
        ("audio", "it has no video stream"),
        ("no frames", "it has no frames|it has no video stream|Invalid data"),
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
        ("missing", "No such file"),
        ("unknown codec", "."),
        ("playlist", "Invalid|not allowed|no video"),
    ],
)
def test_bad_files_have_a_reason_in_one_line(kind, words, videos, tmp_path):
    path = damaged(kind, videos, tmp_path)
    with pytest.raises(BadImageError, match=words) as raised:
        video = VideoFile(str(path))
        video.read([0, len(video) - 1])
    assert "\n" not in str(raised.value) and str(path) not in str(raised.value)


def test_a_header_that_lies_about_the_length(videos, tmp_path):
    """The Matroska header of a file that was cut off still tells the whole duration."""
    content = videos["h264-long-gop.mkv"].read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(content[: len(content) * 2 // 3])
    video = VideoFile(str(path))
    count = len(video)
    assert 10 < count < FRAMES
    assert numbers_of(video.read([0, count // 2])) == [0, count // 2]


def test_damage_in_the_middle(videos, tmp_path):
    """Zeros over a part of the file: a reason, or the frames that there are; no crash, no hang."""
    content = bytearray(videos["h264.mp4"].read_bytes())
    generator, reasons = random.Random(0), set()
    for number in range(30):
        broken = bytearray(content)
        start = generator.randrange(len(content))
        broken[start : start + 400] = bytes(min(400, len(content) - start))
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(broken)
        try:
            video = VideoFile(str(path))
            assert video.read([0, len(video) - 1]).dtype == np.uint8
        except BadImageError as error:
            reasons.add(str(error))
    assert reasons and all(reasons)


def test_frames_that_are_too_large(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mp4", numbered(8))
    monkeypatch.setattr("loading.video.MAX_CLIP_PIXELS", 4 * 64 * 96)
    assert len(VideoFile(str(path)).read([0, 1, 2, 3])) == 4
    with pytest.raises(BadImageError, match="too large: 5 frames of 6,144 pixels, at most 24,576"):
        VideoFile(str(path)).read([0, 1, 2, 3, 4])
    monkeypatch.setattr("loading.images.MAX_PIXELS", 100)
    with pytest.raises(BadImageError, match="too large: 96 x 64"):
        VideoFile(str(path)).read([0])


def test_a_folder_of_frames(tmp_path):
    frames = numbered(12)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"img_{number + 1:05}.png")
    paths = sorted(map(str, tmp_path.iterdir()))
    folder = FrameFolder(paths)
    assert len(folder) == 12
    assert np.array_equal(folder.read([11, 0, 5, 5]), frames[[11, 0, 5, 5]])
    Image.fromarray(frames[0][:10]).save(paths[3])
    with pytest.raises(BadImageError, match="differ in size"):
        folder.read([2, 3])
    os.truncate(paths[4], 20)
    with pytest.raises(BadImageError):
        folder.read([4])


DECODES = """
import gc, resource, sys
from loading.video import VideoFile
path, count = sys.argv[1], int(sys.argv[2])
for number in range(count):
    video = VideoFile(path)
    assert len(video.read([number % 60, 59])) == 2
    if number == count // 4:
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_two_thousand_decodes_do_not_leak(videos):
    done = subprocess.run(
        [sys.executable, "-c", DECODES, str(videos["mpeg4.mp4"]), "2000"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20_000, "KiB more than after a quarter of them"
