"""Every kind of image file that misbehaves, each with its outcome: an RGB image, or one line that
says why not.
"""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
from helpers.data import photo
from PIL import Image

from loading.images import MAX_PIXELS, BadImageError, decode_image, read_image


def saved(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    image = decode_image(io.BytesIO(content))
    assert image.mode == "RGB"
    return np.asarray(image)


def close(image: np.ndarray, expected: Image.Image, tolerance: float) -> bool:
    expected = np.asarray(expected, dtype=np.float64)
    return image.shape == expected.shape and np.abs(image - expected).mean() < tolerance


def test_cmyk_jpeg():
    assert close(decoded(saved(photo().convert("CMYK"), format="JPEG", quality=95)), photo(), 3)


def test_greyscale_and_black_and_white():
    grey = photo().convert("L")
    assert np.array_equal(decoded(saved(grey, format="PNG")), np.asarray(grey.convert("RGB")))
    assert set(np.unique(decoded(saved(photo().convert("1"), format="PNG")))) == {0, 255}


@pytest.mark.parametrize("file_format", ["PNG", "PPM", "TIFF"])
def test_16_bit_grey_keeps_its_upper_bits(file_format):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    content = saved(Image.fromarray(values), format=file_format)
    assert np.array_equal(decoded(content), np.repeat((values >> 8)[..., None], 3, axis=2))


def test_16_bit_colour_png_keeps_its_upper_bits():
    values = np.random.RandomState(0).randint(0, 65536, (5, 4, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    assert np.array_equal(decoded(png(4, 5, rows, bits=16, colour=2)), values >> 8)


@pytest.mark.parametrize(
    "values", [np.full((4, 4), 70000, np.int32), np.full((4, 4), 0.5, np.float32)]
)
def test_pixels_without_a_defined_range_are_refused(values):
    with pytest.raises(BadImageError, match="whose range is not defined"):
        decoded(saved(Image.fromarray(values), format="TIFF"))


def test_transparency_shows_the_colour_below():
    """As torchvision's loader does; for a palette with one transparent entry, and with a table of
    them.
    """
    palette = photo().quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    for transparency in (3, bytes(range(0, 256, 16))):
        assert np.array_equal(
            decoded(saved(palette, format="PNG", transparency=transparency)), expected
        )
    translucent = photo()
    translucent.putalpha(photo(seed=1).convert("L"))
    assert np.array_equal(decoded(saved(translucent, format="PNG")), np.asarray(photo()))
    grey = photo().convert("LA")
    assert np.array_equal(
        decoded(saved(grey, format="PNG")), np.asarray(photo().convert("L").convert("RGB"))
    )


@pytest.mark.parametrize(
    "orientation, turn", [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)]
)
def test_exif_orientation_is_applied(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(
        decoded(saved(photo(), format="PNG", exif=exif)), np.asarray(photo().transpose(turn))
    )


def test_damaged_exif_does_not_cost_the_image():
    content = saved(
        photo(), format="JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 20
    )
    assert close(decoded(content), photo(), 3)


def test_first_frame_counts():
    content = saved(photo(), format="GIF", save_all=True, append_images=[photo(seed=1)])
    assert close(decoded(content), photo(), 12)


def test_truncated_empty_and_foreign_files(tmp_path):
    jpeg = saved(photo((200, 200)), format="JPEG")
    for name, content, reason in (
        ("truncated.jpg", jpeg[: len(jpeg) // 2], "truncated"),
        ("stub.jpg", jpeg[:10], "Truncated File Read"),
        ("empty.jpg", b"", "the file is empty"),
        ("text.jpg", b"<html>404</html>", "not an image in a known format"),
        (
            "postscript.jpg",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "not an image in a known format",
        ),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImageError, match=reason):
            read_image(str(tmp_path / name))


def test_links_pipes_and_folders_in_place_of_files(tmp_path):
    photo().save(tmp_path / "real.png")
    (tmp_path / "link.png").symlink_to("real.png")
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "link.png"))), np.asarray(photo()))
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("dangling", "No such file"),
        ("circle", "Too many levels"),
        ("pipe", "not a regular file"),
        ("folder", "Is a directory|not a regular file"),
    ):
        with pytest.raises(BadImageError, match=reason):
            read_image(str(tmp_path / f"{name}.png"))


def png(width: int, height: int, rows: bytes, bits: int = 8, colour: int = 0) -> bytes:
    """A PNG file of filtered `rows`, written by hand: Pillow writes neither 16-bit colour nor what
    it would refuse.
    """

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    )


def test_huge_image_is_refused_by_its_header(monkeypatch):
    rows = bytes(30_000 * (1 + 30_000 // 8))
    huge = png(30_000, 30_000, rows, bits=1)
    assert len(huge) < 1_000_000

    def never(*_):
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    for content in (huge, png(10_000, 10_000, b"")):
        with pytest.raises(BadImageError, match="too large: "):
            decoded(content)
    with pytest.raises(BadImageError, match="too narrow: 1 x 5000 pixels, at most 100 to 1"):
        decoded(png(1, 5000, b""))
    assert MAX_PIXELS < 10_000**2


def test_300_random_corruptions_of_a_jpeg():
    """Each is an RGB image of bounded size or one printable line."""
    exif = Image.Exif()
    exif[0x0112] = 6
    original = saved(photo((64, 48)), format="JPEG", exif=exif)
    chance = random.Random(0)
    outcomes = {"image": 0, "refused": 0}
    for _ in range(300):
        content = bytearray(original)
        for _ in range(chance.randint(1, 8)):
            place = chance.randrange(len(content))
            kind = chance.randrange(4)
            if kind == 0:
                content[place] = chance.randrange(256)
            elif kind == 1:
                content[place : place + chance.randint(1, 40)] = b""
            elif kind == 2:
                content[place:place] = chance.randbytes(chance.randint(1, 40))
            else:
                content[place : place + 20] = bytes(20)
        try:
            assert decoded(bytes(content)).size <= 3 * MAX_PIXELS
            outcomes["image"] += 1
        except BadImageError as error:
            assert str(error) and str(error).isprintable()
            outcomes["refused"] += 1
    assert min(outcomes.values()) >= 20, outcomes
