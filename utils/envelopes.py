"""What programs write around a model's weights: envelopes, prefixes, and harmless extras.

Ours is `{"model": state_dict, "ema": ..., ...}`. Others are brought into that form where there is
only one way to read them.
"""

import argparse
import logging
import pathlib
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import printable

# Of DeiT, timm, mmcv and Lightning; the first one that is there is taken.
_WEIGHTS = ("model", "state_dict", "model_state_dict")
_AVERAGES = ("ema", "model_ema", "state_dict_ema", "ema_state_dict")
# Wrappers that leave their name inside the names of parameters.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_STEM = "patch_embed.proj.weight"  # that all models here have, under whatever prefix
_LISTED = 5

_logger = logging.getLogger(__name__)


class UnknownEnvelope(Exception):
    """Why the content of a file is not read as weights."""


def harmless_globals() -> list[Any]:
    """What a checkpoint may name beside tensors and plain values, for torch's `safe_globals`: none
    of it does anything when it is made.
    """

    def plain_dict(*_: Any) -> dict:
        return {}

    class AttributeDict:  # of Lightning; torch's unpickler fills nothing but real dicts
        def __new__(cls, *_: Any) -> dict:  # type: ignore[misc]
            return {}

    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in (*"?bBhHiIlLqQefd", "U", "S")}
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    found: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, *kinds]
    found += [(scalar, f"{module}.scalar") for module in modules]
    found += [(array, f"{module}._reconstruct") for module in modules]
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath"):
            found.append((pathlib.PurePosixPath, f"{module}.{name}"))
        for name in ("WindowsPath", "PureWindowsPath"):
            found.append((pathlib.PureWindowsPath, f"{module}.{name}"))
    found.append((plain_dict, "collections.defaultdict"))
    for module in ("builtins", "__builtin__"):  # factories of defaultdict, which are not called
        found += [(plain_dict, f"{module}.{name}") for name in ("list", "dict", "int", "float")]
    for module in (
        "lightning.fabric.utilities.data",
        "lightning_fabric.utilities.data",
        "lightning.pytorch.utilities.parsing",
        "pytorch_lightning.utilities.parsing",
    ):
        found.append((AttributeDict, f"{module}.AttributeDict"))
    return found


def plain(value: Any) -> Any:
    """NumPy's scalars and arrays, paths and dicts of other kinds as plain values, in containers."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if type(value) in (dict, OrderedDict):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if type(value) is argparse.Namespace:
        return argparse.Namespace(**{key: plain(item) for key, item in vars(value).items()})
    return value


def opened(content: Any, source: str) -> dict[str, Any]:
    """The content of a file as `{"model": state_dict, ...}`, whichever program wrote it.

    An average of the weights becomes `ema`, and class names `class_names`, a list; entries of these
    names that are something else are left out, which is logged.

    Raises UnknownEnvelope.
    """
    content = plain(content)
    if not isinstance(content, dict):
        raise UnknownEnvelope(f"it holds a {type(content).__name__} and no 'model' entry")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"model": content}
    there = [name for name in _WEIGHTS if isinstance(content.get(name), dict)]
    place = next(filter(lambda name: _is_weights(content[name]), there), next(iter(there), None))
    if place is None:
        place = _only_weights(content)
    found = {"model": _unwrapped(content[place], source)}
    taken = ("model", place, *_AVERAGES)
    found |= {name: value for name, value in content.items() if name not in taken}
    if "ema" in content:
        found["ema"] = None
    for name in _AVERAGES:
        if content.get(name) is not None:
            found["ema"] = _average(content[name], found["model"], f"{source}, '{name}'")
            break
    found = _named(found, source)
    # In the order of the file, so that what is saved again has the same bytes.
    return {name: found[name] for name in dict.fromkeys([*content, *found]) if name in found}


def _average(value: Any, model: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """An average of the model's weights, or None for something else of that name, which is told."""
    if _is_weights(value):
        with suppress(UnknownEnvelope):
            state = _unwrapped(value, source)
            if state.keys() == model.keys():
                return state
    _logger.info("%s: it holds no average of the model's weights, and is not used", source)
    return None


def _is_weights(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and sum(isinstance(item, Tensor) for item in value.values()) * 2 > len(value)
    )


def _only_weights(content: Mapping[str, Any]) -> str:
    """The name of the only entry with weights. Raises UnknownEnvelope."""
    places = [
        name for name, value in content.items() if _is_weights(value) and name not in _AVERAGES
    ]
    if len(places) == 1:
        return places[0]
    if places:
        names = ", ".join(printable(str(name)) for name in places[:_LISTED])
        raise UnknownEnvelope(
            f"it has no 'model' entry with a state dict, but weights in {names}: store the one "
            "that is meant alone"
        )
    keys = ", ".join(printable(str(key)) for key in list(content)[:_LISTED]) or "nothing"
    raise UnknownEnvelope(f"it has no 'model' entry with a state dict (it holds {keys})")


def _unwrapped(state: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Parameters without the prefix that wrappers have given the names of one whole model; what has
    none is left out, and told.

    Raises UnknownEnvelope where several models lie side by side.
    """
    names = {
        ".".join(part for part in str(key).split(".") if part not in _WRAPPERS): value
        for key, value in state.items()
    }
    if len(names) < len(state):
        return dict(state)  # told by whoever compares the names
    prefix = _prefix_of(names)
    if not prefix:
        return names
    others = [name for name in names if not name.startswith(prefix)]
    more = f"; left out: {', '.join(map(printable, others[:_LISTED]))}" if others else ""
    more += f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
    _logger.info("%s: the weights are those under %r%s", source, prefix, more)
    return {
        name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)
    }


def _prefix_of(names: Mapping[str, Any]) -> str:
    stems = [name.removesuffix(_STEM) for name in names if name.endswith(_STEM)]
    stems = [stem for stem in stems if not stem or stem.endswith(".")]
    if "" in stems:
        return ""
    if len(stems) > 1:
        raise UnknownEnvelope(
            f"it holds several models, under {', '.join(map(printable, stems[:_LISTED]))}: store "
            "the weights of the one that is meant alone"
        )
    if not stems:
        return ""
    [stem] = stems
    outside = [name for name in names if not name.startswith(stem)]
    # mmsegmentation's backbone has its decoder beside it.
    if any("decode_head" in name for name in outside):
        return stem.removesuffix("backbone.")
    return stem


def _named(content: dict[str, Any], source: str) -> dict[str, Any]:
    """With the class names of any program as a list under `class_names`."""
    meta = content.get("meta")  # of mmcv; mmsegmentation has "bed "
    if isinstance(meta, dict) and isinstance(meta.get("CLASSES"), (list, tuple)):
        content.setdefault("class_names", [str(name).strip() for name in meta["CLASSES"]])
    if "class_names" not in content and isinstance(content.get("class_to_idx"), dict):
        content["class_names"] = content["class_to_idx"]
    names = content.get("class_names")
    if names is None:
        return content
    listed = names_by_index(names)
    if listed is None:
        _logger.info("%s: its class names are in no known form and are not used", source)
        return {name: value for name, value in content.items() if name != "class_names"}
    return {**content, "class_names": listed}


def names_by_index(names: Any) -> list[str] | None:
    """A list of names, {index: name} or {name: index} as a list; None if it is none of them."""
    if isinstance(names, Mapping):
        turned = all(type(value) is int for value in names.values())
        pairs = [(value, key) if turned else (key, value) for key, value in names.items()]
        if not all(str(index).isdecimal() and isinstance(name, str) for index, name in pairs):
            return None
        by_index = {int(index): name for index, name in pairs}
        if sorted(by_index) != list(range(len(names))):
            return None
        return [by_index[index] for index in range(len(names))]
    if isinstance(names, (list, tuple)) and all(isinstance(name, (str, int)) for name in names):
        return [str(name) for name in names]
    return None
