"""Files of label maps: what is read from which kind, and what is none."""

import io
import struct
import zlib

import numpy as np
import pytest
from helpers.data import labels, photo
from PIL import Image

from loading.images import BadImageError
from loading.masks import decode_labels, label_table
from utils.errors import UserError


def saved(image: Image.Image, **keywords) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **keywords})
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return decode_labels(io.BytesIO(content))


def png(width: int, height: int, rows: bytes, bits: int, colour: int) -> bytes:
    """A PNG of rows as they are, each after a filter byte: Pillow writes neither few bits of grey
    nor 16 bits of colour.
    """

    def chunk(name: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_kinds_of_masks():
    values = labels(0, 0, 16)
    grey = Image.fromarray(values)
    palette = grey.copy()
    palette.putpalette(np.random.RandomState(0).randint(0, 256, 768, dtype=np.uint8).tobytes())
    wide = Image.fromarray(values.astype(np.uint16) * 100)
    with_alpha = grey.convert("LA")
    with_alpha.putalpha(Image.new("L", grey.size, 7))
    for image, keywords in (
        (grey, {}),
        (grey, {"transparency": 3}),
        (palette, {}),
        (palette, {"bits": 4}),
        (palette, {"transparency": bytes(range(16))}),
        (with_alpha, {}),
        (grey.convert("RGB"), {}),
        (grey.convert("RGBA"), {}),
    ):
        found = decoded(saved(image, **keywords))
        assert found.dtype == np.uint8 and np.array_equal(found, values), (image.mode, keywords)
    assert np.array_equal(decoded(saved(wide)), values.astype(np.int64) * 100)
    bits = Image.fromarray(values > 7)
    assert bits.mode == "1" and np.array_equal(decoded(saved(bits)), values > 7)
    assert decoded(saved(bits)).dtype == np.uint8


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_of_few_bits_is_not_stretched(bits):
    values = np.random.RandomState(0).randint(0, 2**bits, (5, 8))
    digits = [
        [(value >> shift) & 1 for value in row for shift in range(bits)[::-1]] for row in values
    ]
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in digits)
    assert np.array_equal(decoded(png(8, 5, rows, bits, 0)), values)


def test_what_is_no_label_map():
    for content, reason in (
        (saved(photo()), r"colours \(its channels differ\) where class indices must be"),
        (saved(photo().convert("RGBA")), "channels differ"),
        (saved(photo().convert("L"), format="JPEG"), "a JPEG file; a label map must be a PNG"),
        (png(4, 5, (b"\0" + bytes(24)) * 5, 16, 2), "16-bit colour or transparency"),
        (png(4, 5, (b"\0" + bytes(16)) * 5, 16, 4), "16-bit colour or transparency"),
        (b"label map", "not an image in a known format"),
        (b"\x89PNG\r\n\x1a\n", "."),
        (saved(photo().convert("L"))[:300], "truncated|broken"),
        (png(1, 5000, b"", 8, 0), "too narrow"),
    ):
        with pytest.raises(BadImageError, match=reason) as error:
            decoded(content)
        assert "\n" not in str(error.value)


def test_the_layout_of_ade20k_leaves_room_for_one_class_less():
    assert label_table("x", 254, first=1)[[0, 1, 254, 255, 256]].tolist() == [255, 0, 253, 255, -1]
    with pytest.raises(UserError, match="x: 255 classes; at most 254 are possible"):
        label_table("x", 255, first=1)
