"""Image files of more than 8 bits a channel, and drawings in the alpha channel."""

import argparse
import io
import struct

import numpy as np
import pytest
from helpers.data import make_folders, options, photo
from PIL import Image
from test_images import png

from datasets import build_data
from loading.depth import AUTO, UNIT, bit_depth, to_8_bits
from loading.folders import find_images, image_folders
from loading.images import BadImageError, decode_image, read_image
from loading.video_sets import open_video, video_folders
from tasks.experiment import Experiment
from utils.errors import UserError


def noise(top: float, kind=np.uint16, size=(12, 10), seed: int = 0) -> np.ndarray:
    """Values from 0 to below `top`, which is nearly met."""
    values = np.random.RandomState(seed).rand(*size) * (top * 0.999)
    values.flat[0], values.flat[1] = 0, top * 0.9999
    return values.astype(kind)


def replaced(root, write, ending: str = ".png"):
    """The folders with all images written anew: write(number, path)."""
    for number, file in enumerate(sorted(root.rglob("*.jpg"))):
        file.unlink()
        write(number, file.with_suffix(ending))
    return root


def folder_data(root, *flags, **kwargs):
    flags = ("--data-set", "FOLDER", "--data-path", str(root), *flags)
    return build_data(options(*flags), 32, **kwargs)


@pytest.mark.parametrize(
    "top, kind, ending, depth",
    [
        (4096, np.uint16, ".png", 12),
        (256, np.uint16, ".png", 8),
        (10_000, np.uint16, ".tif", 14),
        (65536, np.uint16, ".png", 16),
        (100_000, np.int32, ".tif", 17),
        (1.0, np.float32, ".tif", UNIT),
        (255.0, np.float32, ".tif", 8),
    ],
)
def test_the_depth_of_a_data_set_follows_from_its_values(
    tmp_path, caplog, top, kind, ending, depth
):
    """One for all images, although each alone would seem to need less."""

    def write(number, path):
        Image.fromarray(noise(top if number % 3 == 0 else top / 8, kind)).save(path)

    root = replaced(make_folders(tmp_path), write, ending)
    with caplog.at_level("INFO"):
        data = folder_data(root)
    assert data.bit_depth == data.train.depth == data.val.depth == depth
    [record] = [record for record in caplog.records if "--bit-depth" in record.message]
    assert record.message.startswith("22 of 22 images looked at have more than 8 bits")
    assert f"--bit-depth {depth} is taken" in record.message
    assert record.levelname == ("INFO" if depth == 16 else "WARNING")
    white = 1 if depth == UNIT else 2**depth - 1
    for index in (0, 1):
        stored = np.asarray(Image.open(data.train.describe(index))).astype(np.float64)
        seen = np.asarray(data.train.load_image(index))[..., 0]
        assert np.abs(stored * 255 / white - seen).max() <= 1
    assert np.asarray(data.train.load_image(0)).max() > 100


def test_a_given_depth_is_kept_and_doubted(tmp_path, caplog):
    root = replaced(
        make_folders(tmp_path), lambda number, path: Image.fromarray(noise(4096)).save(path)
    )
    assert folder_data(root, "--bit-depth", "16").bit_depth == 16
    assert "at --bit-depth 16, given or recorded with the weights, images of more" in caplog.text
    assert "nearly black: the largest value is 4095" in caplog.text
    caplog.clear()
    assert folder_data(root, "--bit-depth", "8").bit_depth == 8
    assert "partly white" in caplog.text
    caplog.clear()
    assert folder_data(root, "--bit-depth", "11").val.depth == 11


def test_an_outlier_does_not_hide_that_the_others_are_dark(tmp_path, caplog):
    def write(number, path):
        values = noise(3000, size=(40, 40))
        values[3, 3] = 14_000
        Image.fromarray(values).save(path)

    assert folder_data(replaced(make_folders(tmp_path), write)).bit_depth == 14
    assert "99.9% of the pixels of each are below" in caplog.text
    assert "--bit-depth 12 would show these brighter" in caplog.text


def test_images_of_8_bits_have_no_depth(tmp_path, caplog):
    root = replaced(make_folders(tmp_path), lambda number, path: photo(seed=number).save(path))
    assert folder_data(root).bit_depth == AUTO and not caplog.text
    # A rare file of 16 bits that no sample shows: with all of its range, or not at all.
    images = image_folders(root, "val")
    images.set_depth(AUTO)
    file = images.describe(0)
    Image.fromarray(noise(65536)).save(file)
    assert np.asarray(images.load_image(0)).max() == 255
    Image.fromarray(noise(4096)).save(file)
    with pytest.raises(BadImageError, match="up to 4095 only, .* give --bit-depth 12, or 16"):
        images.load_image(0)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(file)
    assert np.asarray(images.load_image(0)).max() == 0


def test_what_no_depth_fits(tmp_path):
    def mixed(number, path):
        Image.fromarray(noise(1.0, np.float32) if number % 2 else noise(4096)).save(path)

    root = replaced(make_folders(tmp_path), mixed, ".tif")
    with pytest.raises(UserError, match="some hold fractions up to 1 and others integers"):
        folder_data(root)
    for values, reason in (
        (np.float32([[-0.1, 1]]), "negative pixels"),
        (np.float32([[np.nan, 1]]), "not finite"),
        (np.int32([[-5, 9]]), "negative pixels"),
    ):
        content = io.BytesIO()
        Image.fromarray(values).save(content, "TIFF")
        for depth in (None, 8, UNIT):
            with pytest.raises(BadImageError, match=reason):
                decode_image(content, depth)


@pytest.mark.parametrize("colour, channels", [(2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("depth", [8, 12, 14, 16, None])
def test_colours_of_16_bits_keep_their_lower_bits(colour, channels, depth):
    values = np.random.RandomState(0).randint(0, 1 << (depth or 16), (5, 4, channels)).astype(">u2")
    if channels in (2, 4):
        values[..., -1] = 65535
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    seen = np.asarray(decode_image(io.BytesIO(png(4, 5, rows, 16, colour)), depth))
    expected = values[..., : 1 if channels == 2 else 3] >> ((depth or 16) - 8)
    assert np.array_equal(seen, np.broadcast_to(expected, seen.shape))


def tiff(pixels: np.ndarray, photometric: int, byteorder: str) -> bytes:
    """An uncompressed TIFF of [H, W, C] uint16, two rows in a strip."""
    height, width, count = pixels.shape
    form = {"<": b"II*\0", ">": b"MM\0*"}[byteorder]
    data = pixels.astype(f"{byteorder}u2").tobytes()
    strips = [(first, min(2, height - first)) for first in range(0, height, 2)]
    row, extra = width * count * 2, []
    tags = {256: ("I", [width]), 257: ("I", [height]), 258: ("H", [16] * count), 259: ("H", [1])}
    tags |= {262: ("H", [photometric]), 277: ("H", [count]), 278: ("I", [2]), 284: ("H", [1])}
    begin = 8 + 2 + 12 * (len(tags) + 2) + 4
    outside = sum(len(v) * struct.calcsize(f) for f, v in tags.values() if len(v) > 2)
    outside += 8 * len(strips)
    tags[273] = ("I", [begin + outside + first * row for first, _ in strips])
    tags[279] = ("I", [rows * row for _, rows in strips])
    entries, used = b"", 0
    for tag, (kind, values) in sorted(tags.items()):
        raw = struct.pack(f"{byteorder}{len(values)}{kind}", *values)
        entries += struct.pack(f"{byteorder}HHI", tag, {"H": 3, "I": 4}[kind], len(values))
        if len(raw) > 4:
            entries += struct.pack(f"{byteorder}I", begin + used)
            extra.append(raw)
            used += len(raw)
        else:
            entries += raw.ljust(4, b"\0")
    head = form + struct.pack(f"{byteorder}IH", 8, len(tags))
    return head + entries + b"\0\0\0\0" + b"".join(extra) + data


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_tiffs_of_16_bits(byteorder, tmp_path):
    values = np.random.RandomState(0).randint(0, 4096, (5, 4, 3))
    seen = np.asarray(decode_image(io.BytesIO(tiff(values, 2, byteorder)), 12))
    assert np.array_equal(seen, values >> 4)
    (tmp_path / "x.tif").write_bytes(tiff(values, 1, byteorder))
    with pytest.raises(BadImageError, match="a TIFF of a layout that Pillow does not read"):
        read_image(str(tmp_path / "x.tif"))


def test_a_pgm_tells_its_depth_itself():
    values = noise(4096)
    content = b"P5 10 12 4095\n" + values.astype(">u2").tobytes()
    for depth in (None, AUTO, 12, 8):
        seen = np.asarray(decode_image(io.BytesIO(content), depth))[..., 0]
        assert np.abs(seen - values * 255.0 / 4095).max() <= 1


def drawing(colour: int, mode: str = "RGBA", size: int = 30) -> Image.Image:
    """A square in one colour; around it the same, transparent."""
    alpha = Image.new("L", (size, size))
    alpha.paste(255, (5, 5, 20, 20))
    grey = Image.new("L", (size, size), colour)
    return Image.merge("LA", (grey, alpha)).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("colour, ground", [(0, 255), (80, 255), (255, 0), (200, 0)])
def test_what_is_drawn_in_the_alpha_channel_alone_is_seen(mode, colour, ground):
    content = io.BytesIO()
    drawing(colour, mode).save(content, "PNG")
    seen = np.asarray(decode_image(content))
    assert (seen[10, 10] == colour).all() and (seen[0, 0] == ground).all()


def test_drawings_in_alpha_are_told_once(tmp_path, caplog):
    root = replaced(make_folders(tmp_path), lambda number, path: drawing(0).save(path))
    with caplog.at_level("INFO"):
        assert folder_data(root).bit_depth == AUTO
    assert "22 of 22 images looked at are drawn in their alpha channel alone" in caplog.text


def test_a_run_records_its_depth(tmp_path):
    class FakeTask:
        def of_run(self, args):
            return self

        def image_size(self, spec):
            return 32

        def data(self, args, size, distributed, train):
            return folder_data(root)

    root = replaced(
        make_folders(tmp_path), lambda number, path: Image.fromarray(noise(4096)).save(path)
    )
    args = argparse.Namespace(
        data_set="FOLDER", model="vim_micro", model_kwargs={}, bit_depth=AUTO, output_dir="x"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.experiment.task_named", lambda name: FakeTask())
        Experiment.prepare(args, distributed=None)
    assert args.bit_depth == 12
    images = find_images([str(root)])
    images.set_depth(args.bit_depth)
    assert np.asarray(images.load_image(0)).max() == 255


def test_frames_of_16_bits(tmp_path):
    for split in ("train", "val"):
        for name in ("left", "right"):
            folder = tmp_path / split / name / "shots"
            folder.mkdir(parents=True)
            for number in range(2):
                Image.fromarray(noise(4096, seed=number)).save(folder / f"{number}.png")
    videos = video_folders(tmp_path, "train")
    assert videos.range(int(videos.deep_candidates()[0])).largest == 4095
    videos.set_depth(12)
    assert videos.load(0).image.read([0, 1]).max() == 255
    assert open_video(videos.path(0)).read([0]).max() == 15


def test_depths_as_flags():
    assert [bit_depth(text) for text in ("auto", "unit", "12")] == [AUTO, UNIT, 12]
    for text in ("0", "33", "-1", "12 bits", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="nor a number of bits from 1 to 32"):
            bit_depth(text)
    assert to_8_bits(np.uint16([0, 3]), 2).tolist() == [0, 255]
