"""What lies in folders: the files that are wanted, and what is left out, which is told once."""

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NoReturn

from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError, printable

# Those of torchvision, and others whose content `images.FORMATS` reads.
IMAGE_ENDINGS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif", ".apng", ".dib", ".pbm", ".pnm")
# Files that accompany images and videos; nobody misses them.
_COMPANIONS = (
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".ini",
    ".db", ".log", ".srt", ".vtt",
)  # fmt: skip
# Folders that systems and programs leave beside those of the user.
_SYSTEM = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found"}
_SYSTEM |= {"system volume information"}
_LISTED = 3

_logger = logging.getLogger(__name__)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or one that a system has left."""
    return name.startswith(".") or name.lower() in _SYSTEM


def by_number(name: str) -> list:
    """A key that sorts 2.jpg before 10.jpg."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def composed(name: str) -> str:
    """A name in Unicode's composed form: an e with an accent has two forms, which look the same."""
    return unicodedata.normalize("NFC", name)


class LeftOut:
    """What a walk through folders has left out."""

    def __init__(self):
        self._found: dict[str, list[str]] = {}
        self._endings: Counter[str] = Counter()

    def add(self, reason: str, path: str) -> None:
        """reason: in the plural, such as "images beside the class folders"."""
        self._found.setdefault(reason, []).append(path)

    def add_file(self, folder: str, name: str) -> None:
        """A file that is not wanted, for its ending; or it is a link that leads nowhere."""
        ending = os.path.splitext(name)[1].lower()
        if ending in _COMPANIONS:
            return
        path = os.path.join(folder, name)
        if is_dead_link(path):
            self.add("links to what is not there", path)
        else:
            self._endings[ending or "none"] += 1

    def count(self, reason: str) -> int:
        return len(self._found.get(reason, ()))

    def instead(self) -> str:
        """The end of a message that nothing wanted was found: what there is."""
        return f"; {self._told_endings()}" if self._endings else ""

    def _told_endings(self) -> str:
        common = self._endings.most_common(_LISTED)
        names = ", ".join(f"{count:,} {ending}" for ending, count in common)
        more = len(self._endings) - len(common)
        return f"files of endings that are not read: {names}" + f" and {more} more" * (more > 0)

    def tell(self, where: str) -> None:
        """Log it in one line, if there is anything; as a warning unless it is hidden only."""
        parts = [self._told_endings()] if self._endings else []
        for reason, paths in self._found.items():
            names = ", ".join(printable(os.path.relpath(path, where)) for path in paths[:_LISTED])
            more = len(paths) - _LISTED
            more = f" and {more:,} more" if more > 0 else ""
            parts.append(f"{reason}: {len(paths):,} ({names}{more})")
        if parts:
            harmless = not self._endings and set(self._found) <= {_HIDDEN}
            log = _logger.info if harmless else _logger.warning
            log("%s: left out: %s", printable(where), "; ".join(parts))


_HIDDEN = "hidden files or folders"
_BESIDE = "files beside the class folders"


def is_dead_link(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def walk(top: str | os.PathLike, left: LeftOut) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk through links, in which each folder comes once, and nothing hidden.

    Folders taken from the yielded list are not entered. Raises UserError for a folder that cannot
    be read.
    """
    seen = set()
    for root, folders, names in os.walk(top, followlinks=True, onerror=_unreadable):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden = [name for name in folders if is_hidden(name)]
        folders[:] = [name for name in folders if name not in hidden]
        dotted = [name for name in names if name[0] == "."]
        # A Mac's resource forks and .DS_Store are no images, whatever they are called.
        hidden += [
            name for name in dotted if name.lower().endswith(IMAGE_ENDINGS) and name[:2] != "._"
        ]
        for name in hidden:
            left.add(_HIDDEN, os.path.join(root, name))
        yield root, folders, [name for name in names if name[0] != "."] if dotted else names


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{printable(str(error.filename))}: cannot be read ({error.strerror})")


def list_images(top: str | os.PathLike, left: LeftOut | None = None) -> list[str]:
    """Image files below `top`, sorted. Links are followed, but each folder is visited only once."""
    left, files = LeftOut() if left is None else left, []
    for root, _, names in walk(top, left):
        for name in names:
            if name.lower().endswith(IMAGE_ENDINGS):
                files.append((root, name))
            else:
                left.add_file(root, name)
    return [os.path.join(root, name) for root, name in sorted(files)]


def class_folders(root: str, left: LeftOut) -> list[str]:
    """The names of the folders in `root`, sorted as text, as torchvision does.

    Raises UserError if there are none, for one that is a link to what is not there, and for two
    whose names differ in their Unicode form only.
    """
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        _unreadable(error)
    names = []
    for entry in entries:
        ending = os.path.splitext(entry.name)[1].lower()
        if is_hidden(entry.name):
            if entry.is_dir():
                left.add(_HIDDEN, entry.path)
        elif entry.is_dir():
            names.append(entry.name)
        elif ending and ending not in _COMPANIONS:
            left.add(_BESIDE, entry.path)
        elif is_dead_link(entry.path):
            raise UserError(
                f"{printable(entry.path)} is a link to {printable(os.readlink(entry.path))}, which "
                "is not there; mend or remove it"
            )
    if not names:
        beside = left.count(_BESIDE)
        there = f", but {beside} files, whose class nothing tells" if beside else ""
        raise UserError(f"{printable(root)}: no class folders in it{there}")
    forms: dict[str, str] = {}
    for name in names:
        other = forms.setdefault(composed(name), name)
        if other != name:
            raise UserError(
                f"{printable(root)}: {ascii(other)} and {ascii(name)} are two Unicode forms of one "
                "name; join the two folders"
            )
    if (shown := order_in_doubt(names)) is not None:
        _logger.info("%s: the classes are in the order of text, not of numbers: %s", root, shown)
    return names


def order_in_doubt(names: Sequence[str]) -> str | None:
    """The first names, where their order is not that of the numbers in them; else None."""
    numbered = sorted(names, key=by_number) if _comparable(names) else list(names)
    if list(names) == numbered:
        return None
    place = next(i for i, (a, b) in enumerate(zip(names, numbered, strict=True)) if a != b)
    return ", ".join(map(printable, names[max(0, place - 1) : place + 3])) + ", ..."


def _comparable(names: Sequence[str]) -> bool:
    """Whether numbers stand in the same places of all names that have any, so that names which
    only text can order do not count.
    """
    shapes = {re.sub(r"[0-9]+", "0", name) for name in names}
    return len(shapes) == 1 and "0" in next(iter(shapes))
