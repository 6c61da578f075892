"""Names of classes in files: texts and JSON, by index or by folder.

A text has a name on each line, in the order of the classes; or two columns: index and name, name
and index, folder and name. JSON is a list, {index: name}, {folder: name}, {index: [folder, name]},
or torchvision's class_to_idx, {name: index}.
"""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError, printable

from .walking import composed

_COLUMNS = re.compile(r"(\S+?)(?:\s*[\t:;,]\s*|\s+)(\S.*)")
_INDEX_LAST = re.compile(r"(.*\S)\s*[\t:;,]\s*(\d+)")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(file: Path) -> str:
    """A text in UTF-8, with or without byte order mark, or in UTF-16 with one. Raises UserError."""
    try:
        content = file.read_bytes()
        return content.decode("utf-16" if content.startswith(_UTF16) else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file in UTF-8"
        raise UserError(f"{printable(str(file))}: cannot be read as text ({reason})") from None


def read_names(file: Path, folders: Sequence[str] = ()) -> list[str]:
    """The names of the classes in a file, by index.

    folders: what the classes are called already, in their order; names by folder need them.

    Raises UserError for a file that is neither, for a missing or repeated index, and for the names
    `folders` in another order.
    """
    text = read_text(file)
    try:
        if text.lstrip().startswith(("[", "{")):
            names = _of_json(json.loads(text), folders)
        else:
            names = names_of_lines(text.splitlines(), folders)
    except ValueError as error:
        kind = "not JSON" if isinstance(error, json.JSONDecodeError) else "no names of classes"
        raise UserError(f"{printable(str(file))}: {kind} ({error})") from None
    if names != list(folders) and sorted(names) == sorted(folders):
        raise UserError(
            f"{printable(str(file))}: the names of the classes in another order than that of "
            f"training ({', '.join(map(printable, folders[:3]))}, ...)"
        )
    return [printable(" ".join(name.split())) for name in names]


def names_of_lines(lines: Sequence[str], folders: Sequence[str] = ()) -> list[str]:
    """The names by index in the lines of a text, see above; blank lines do not count."""
    filled = [line.strip() for line in lines if line.strip()]
    for pattern, turned in ((_COLUMNS, False), (_INDEX_LAST, True)):
        columns = [pattern.fullmatch(line) for line in filled]
        if not columns or not all(columns):
            continue
        pairs = [match.groups()[::-1] if turned else match.groups() for match in columns]
        keys, names = zip(*pairs, strict=True)
        if len({*names}) < len(names):
            continue
        if _known(folders) <= {composed(key) for key in keys} and folders:
            return _by_folder(dict(pairs), folders)
        indices = [int(key) for key in keys if key.isascii() and key.isdecimal()]
        for first in (0, 1):
            if sorted(indices) == list(range(first, first + len(keys))):
                ordered = dict(zip(indices, names, strict=True))
                return [ordered[label] for label in sorted(ordered)]
    return filled


def _of_json(content: Any, folders: Sequence[str]) -> list[str]:
    """Raises ValueError with the reason."""
    if isinstance(content, list):
        return [_name(entry) for entry in content]
    if not isinstance(content, Mapping) or not content:
        raise ValueError("neither a list nor an object")
    keys, values = [str(key) for key in content], list(content.values())
    if all(type(value) is int for value in values):  # class_to_idx
        if sorted(values) != list(range(len(values))):
            raise ValueError(f"its indices are not 0 ... {len(values) - 1}, each of them once")
        return [name for _, name in sorted(zip(values, keys, strict=True))]
    if folders and _known(folders) <= {composed(key) for key in keys}:
        return _by_folder(dict(zip(keys, map(_name, values), strict=True)), folders)
    pairs = [entry for entry in values if isinstance(entry, list) and len(entry) == 2]
    if folders and len(pairs) == len(values):  # as ImageNet's: {index: [folder, name]}
        by_folder = {str(folder): str(name) for folder, name in pairs}
        if _known(folders) <= {composed(folder) for folder in by_folder}:
            return _by_folder(by_folder, folders)
    by_index = dict(zip(keys, values, strict=True))
    missing = [label for label in range(len(keys)) if str(label) not in by_index]
    if missing:
        raise ValueError(
            f"no name for class '{missing[0]}'; give a JSON list, an object by index or by folder, "
            "or a name a line"
        )
    return [_name(by_index[str(label)]) for label in range(len(keys))]


def _known(folders: Sequence[str]) -> set[str]:
    return {composed(folder) for folder in folders}


def _by_folder(names: Mapping[str, str], folders: Sequence[str]) -> list[str]:
    names = {composed(folder): name for folder, name in names.items()}
    return [names[composed(folder)] for folder in folders]


def _name(entry: Any) -> str:
    return str(entry[-1] if isinstance(entry, list) and entry else entry)
