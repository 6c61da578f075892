"""Plots and pictures as parts of a page: SVG in its colours, data URIs."""

import base64
import html
import io
import re
import zlib
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from . import palette
from .palette import SERIES
from .plots import WIDTH, styled
from .runs import RunFolder

PICTURE_WIDTH = 1600  # pixels; wider pictures are reduced
PNG_BYTES = 300_000  # pictures that take more as PNG are photographs, and become JPEG

_VARIABLES = {
    name.lower(): value
    for name, value in vars(palette).items()
    if isinstance(value, str) and re.fullmatch("#[0-9a-f]{6}", value)
}
_VARIABLES |= {f"series{index}": value for index, value in enumerate(SERIES)}
_NAMES = {value: name for name, value in _VARIABLES.items()}


def css_variables() -> str:
    """The palette as declarations of the CSS variables that the plots of `svg` use."""
    return " ".join(f"--{name}: {value};" for name, value in _VARIABLES.items())


@styled
def svg(figure: Figure, alt: str) -> str:
    """A figure as an <svg> element with text in the page's font, colours as CSS variables."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', element, count=1
    )
    # Ids are unique within a figure only, and a page holds many.
    prefix = f"f{zlib.crc32(element.encode()):08x}"
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", element)
    element = element.replace("font-family: 'DejaVu Sans'", "font-family: inherit")
    element = re.sub(
        "#[0-9a-f]{6}",
        lambda match: f"var(--{_NAMES[match[0]]}, {match[0]})" if match[0] in _NAMES else match[0],
        element,
    )
    return element.replace('role="img">', f'role="img" aria-label="{html.escape(alt)}">', 1)


def wide_chart(figure: Figure, alt: str) -> dict[str, Any]:
    """A plot as SVG with the width in CSS pixels at which its type is still readable."""
    inches = figure.get_figwidth()
    return {
        "svg": Markup(svg(figure, alt)),
        "least": round(80 * inches) if inches > WIDTH else 0,
        "full": inches > 1.5 * WIDTH,
    }


def embedded(run: RunFolder, pictures: list[tuple[Path, str]]) -> list[dict[str, Any]]:
    """Pictures as data URIs with their alternative texts; a note for those that are damaged."""
    shown = []
    for path, alt in pictures:
        try:
            uri, size = picture_uri(path)
            shown.append({"uri": uri, "alt": alt, "size": size, "strip": size[0] > 2.5 * size[1]})
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            run.notes.append(f"{path.name} cannot be read ({error})")
    return shown


def picture_uri(path: Path) -> tuple[str, tuple[int, int]]:
    """A picture as a data URI of bounded size; its width and height."""
    with Image.open(path) as image:
        if path.suffix == ".gif":
            return _data_uri("gif", path.read_bytes()), image.size
        picture = image.convert("RGB")
    if picture.width > PICTURE_WIDTH:
        height = round(picture.height * PICTURE_WIDTH / picture.width)
        picture = picture.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    content, kind = io.BytesIO(), "png"
    picture.save(content, format="PNG", optimize=True)
    if content.tell() > PNG_BYTES:
        content, kind = io.BytesIO(), "jpeg"
        picture.save(content, format="JPEG", quality=88)
    return _data_uri(kind, content.getvalue()), picture.size


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
