"""Names of the models: `NAME` is dense, `dyvm_NAME` dynamic; `timm.create_model` takes both."""

import sys
from functools import partial
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import nn

from utils.images import CROP_RATIO, MEAN, SMALL_IMAGE, STD

from .backbone import VisionMamba
from .dynamic import DynamicVisionMamba
from .family import Family

_ALIASES: dict[str, str] = {}
_NAMES: list[str] = []


def register(family: Family, sizes: dict[str, dict[str, Any]], aliases: dict[str, str]) -> None:
    """Register each size of a family, dense and dynamic; `aliases` are the release's spellings."""
    module = sys.modules[sys._getframe(1).f_globals["__name__"]]
    entries = {name: (VisionMamba, size) for name, size in sizes.items()}
    entries |= {f"dyvm_{name}": (DynamicVisionMamba, size) for name, size in sizes.items()}
    module.default_cfgs = generate_default_cfgs(
        {name: _config(size.get("img_size", 224)) for name, (_, size) in entries.items()}
    )
    for name, (model, size) in entries.items():
        if model is VisionMamba:
            size = {key: value for key, value in size.items() if key != "pruning_layers"}
        _entry_point(module.__name__, name, partial(model, family), size)
    _ALIASES.update(aliases)


def _config(img_size: int | tuple[int, int], in_chans: int = 3) -> dict[str, Any]:
    """What timm's `resolve_model_data_config` and similar functions read about a model."""
    sides = to_2tuple(img_size)[:2]  # the model rejects anything but a pair
    small = max(sides) <= SMALL_IMAGE
    return dict(
        input_size=(in_chans, *sides),
        fixed_input_size=True,
        interpolation="bicubic",
        crop_pct=1.0 if small else CROP_RATIO,
        crop_mode="squash" if small else "center",
        mean=MEAN,
        std=STD,
        num_classes=1000,
        first_conv="patch_embed.proj",
        classifier="head",
    )


def _entry_point(module: str, name: str, model: partial, size: dict[str, Any]) -> None:
    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        if pretrained:
            raise ValueError(
                f"{name}: no weights can be downloaded; give a checkpoint with --model-path"
            )
        arguments = size | kwargs
        if kwargs.get("reduction") == "merge" and "pruning_layers" not in kwargs:
            arguments.pop("pruning_layers", None)  # it merges a few tokens before many layers
        truth = _config(arguments.get("img_size", 224), arguments.get("in_chans", 3))
        truth["num_classes"] = arguments.get("num_classes", 1000)
        arguments["pretrained_cfg_overlay"] = truth | (
            arguments.get("pretrained_cfg_overlay") or {}
        )
        return build_model_with_cfg(
            model, name, False, feature_cfg=dict(out_indices=4, feature_cls="getter"), **arguments
        )

    create.__name__, create.__module__ = name, module
    setattr(sys.modules[module], name, create)
    timm.models.register_model(create)
    _NAMES.append(name)


def canonical_name(name: str) -> str:
    """The name in timm: the release's spelling (Vim-Small) becomes ours (vim_small)."""
    return _ALIASES.get(name, name)


def model_names() -> list[str]:
    """All names that `--model` takes, aliases excluded."""
    return list(_NAMES)
