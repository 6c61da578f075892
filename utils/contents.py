"""What a file is, by its first bytes: names lie, and downloads end in other things than wanted."""

HEAD = 512  # bytes that `kind_of` looks at

_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself; run `git lfs pull`"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\0\5\x16\7", "the resource fork of a Mac's file"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"II+\0", "a BigTIFF"),
    (b"MM\0+", "a BigTIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
)
_BRANDS = {b"avif": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}
_TEXTS = (
    (b"<!doctype html", "an HTML page, where a download ended"),
    (b"<html", "an HTML page, where a download ended"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML text, such as a server's error message"),
    (b"{", "a JSON text"),
)


def kind_of(head: bytes) -> str | None:
    """What a file that begins with `head` is, with an article where it has one; None if unknown."""
    for start, kind in _KINDS:
        if head.startswith(start):
            return kind
    if head[4:8] == b"ftyp" and head[8:12] in _BRANDS:
        return _BRANDS[head[8:12]]
    if head[128:132] == b"DICM":
        return "DICOM"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((kind for start, kind in _TEXTS if text.startswith(start)), None)


def is_safetensors(head: bytes) -> bool:
    """Whether a file has the header of safetensors, its length and JSON, of 100 MB at most."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000
