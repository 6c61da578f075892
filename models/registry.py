"""Names: `NAME` is the dense model, `dyvm_NAME` the dynamic one; both are entry points of
timm.create_model.
"""

import sys
from typing import Any

import timm

from .backbone import DynamicVisionMamba, Family, VisionMamba

# What timm.create_model hands to every entry point and these models have no use for.
_TIMM_ARGUMENTS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_ALIASES: dict[str, str] = {}
_NAMES: list[str] = []


def register(family: Family, sizes: dict[str, dict[str, Any]], aliases: dict[str, str]) -> None:
    """Register each size of a family, dense and dynamic; `aliases` are the release's spellings."""
    module = sys._getframe(1).f_globals["__name__"]
    for name, size in sizes.items():
        dense = {key: value for key, value in size.items() if key != "pruning_layers"}
        _entry_point(module, name, VisionMamba, family, dense)
        _entry_point(module, f"dyvm_{name}", DynamicVisionMamba, family, size)
    _ALIASES.update(aliases)


def _entry_point(
    module: str, name: str, model: type[VisionMamba], family: Family, size: dict[str, Any]
) -> None:
    def create(pretrained: bool = False, **kwargs) -> VisionMamba:
        if pretrained:
            raise ValueError(
                f"{name}: no weights can be downloaded; give a checkpoint with --model-path"
            )
        for argument in _TIMM_ARGUMENTS:
            kwargs.pop(argument, None)
        return model(family, **(size | kwargs))

    create.__name__, create.__module__ = name, module
    setattr(sys.modules[module], name, create)
    timm.models.register_model(create)
    _NAMES.append(name)


def canonical_name(name: str) -> str:
    """The name as timm knows it: the release's spelling (Vim-Small) becomes ours (vim_small)."""
    return _ALIASES.get(name, name)


def model_names() -> list[str]:
    """All names that `--model` takes, aliases excluded."""
    return list(_NAMES)
