"""Models from flags and from checkpoints."""

import argparse
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from utils.errors import UsageError, UserError
from utils.files import sha256_of

from .backbone import VisionMamba
from .weights import load_weights

# What a checkpoint is, so that it can be evaluated without repeating the flags that made it.
IDENTITY = (
    "model",
    "method",
    "model_kwargs",
    "pruning_layers",
    "token_keep_ratio",
    "block_keep_ratio",
    "token_strategy",
    "scorer_input",
    "data_set",
    "data_path",
    "train_split",
    "val_split",
    "input_size",
    "eval_crop_ratio",
)

# Arguments of the models that have a flag of their own.
FLAGGED = {
    "num_classes": "--data-set",
    "drop_path_rate": "--drop-path",
    "img_size": "--input-size",
    "pruning_layers": "--pruning-layers",
    "token_keep": "--token-keep-ratio",
    "token_strategy": "--token-strategy",
    "scorer_input": "--scorer-input",
    "prune_tokens": "--method",
    "route_blocks": "--method",
}

STORED = "gate_threshold"  # in a checkpoint: {"model": logit, "ema": logit}

_logger = logging.getLogger(__name__)


def build_model(args: argparse.Namespace, num_classes: int) -> VisionMamba:
    """The model that `--model` and its companions name, with fresh weights."""
    for name in FLAGGED.keys() & args.model_kwargs.keys():
        raise UsageError(f"--model-kwargs {name}=...: use {FLAGGED[name]}")
    sizes: dict[str, Any] = dict(
        args.model_kwargs, num_classes=num_classes, drop_path_rate=args.drop_path
    )
    if args.input_size:
        sizes["img_size"] = args.input_size
    if args.method != "dense":
        sizes |= dict(
            pruning_layers=args.pruning_layers,
            token_keep=args.token_keep_ratio,
            token_strategy=args.token_strategy,
            scorer_input=args.scorer_input,
            prune_tokens=args.method != "block",
            route_blocks=args.method != "token",
        )
    try:
        return timm.create_model(args.model, **sizes)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--model {args.model}: {error}") from None


def build_dense(args: argparse.Namespace, num_classes: int) -> VisionMamba:
    """The dense counterpart of a dynamic model, with fresh weights."""
    dense = argparse.Namespace(
        **vars(args) | dict(model=args.model.removeprefix("dyvm_"), method="dense", drop_path=0.0)
    )
    return build_model(dense, num_classes)


def restore_model(
    args: argparse.Namespace, checkpoint: dict[str, Any], num_classes: int, ema: bool = False
) -> VisionMamba:
    """The model of `args` with weights and gate threshold of a checkpoint, or with the average of
    them (`ema`).

    Raises UserError when the weights do not fit, or when there is no average.
    """
    source = args.model_path
    if ema:
        if not checkpoint.get("ema"):
            raise UserError(f"{source} holds no average of the weights (EMA)")
        checkpoint, source = checkpoint | {"model": checkpoint["ema"]}, f"{source} (EMA)"
    model = build_model(args, num_classes)
    load_weights(model, checkpoint, source)
    restore_threshold(model, checkpoint, args.gate_threshold, "ema" if ema else "model", source)
    return model


def recorded_arguments(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of ours says it is, as defaults for the flags; nothing for others."""
    recorded = checkpoint.get("args")
    if not isinstance(recorded, dict) or "method" not in recorded:
        return {}
    known = {name: recorded[name] for name in IDENTITY if name in recorded}
    known["model_kwargs"] = list(known.get("model_kwargs", {}).items())
    known["dense_path"] = _recorded_teacher(
        recorded.get("model_path"), checkpoint.get("teacher_sha256")
    )
    return known


def _recorded_teacher(path: str | None, sha256: str | None) -> str | None:
    """The teacher's file if it is still there and still the same."""
    if not path or not Path(path).is_file():
        return None
    if sha256 is not None and sha256_of(path) != sha256:
        _logger.warning(
            "%s is not the teacher any more that the checkpoint was trained with; the dense "
            "column has no "
            "accuracy (give --dense-path to compare with it all the same)",
            path,
        )
        return None
    return path


def check_classes(checkpoint: dict[str, Any], class_names: list[str], source: str) -> None:
    """Raise UserError when a checkpoint of ours was trained on other classes than those of the data
    set.
    """
    recorded = checkpoint.get("class_names")
    if recorded is None or list(recorded) == list(class_names):
        return
    if len(recorded) != len(class_names):
        difference = f"{len(recorded)} classes, the data set has {len(class_names)}"
    else:
        i = next(
            i
            for i, pair in enumerate(zip(recorded, class_names, strict=True))
            if pair[0] != pair[1]
        )
        difference = f"other classes than the data set's: class {i} was {recorded[i]!r}, here it is {class_names[i]!r}"
    raise UserError(
        f"{source} was trained on {difference}; evaluate on the --data-set of its training, or "
        "fine-tune "
        "it first with --method dense --model-path"
    )


def model_image_size(args: argparse.Namespace) -> int:
    with torch.device("meta"):
        return build_model(args, num_classes=1).patch_embed.img_size[0]


def restore_threshold(
    model: VisionMamba, checkpoint: Mapping[str, Any], wanted: float | str, name: str, source: str
) -> None:
    """Set the threshold that `--gate-threshold` asks for: a probability, or the checkpoint's own
    for `name`.
    """
    if not getattr(model, "route_blocks", False):
        return
    if wanted != "calibrated":
        set_threshold(model, wanted)
        return
    stored = checkpoint.get(STORED)
    if isinstance(stored, dict) and isinstance(stored.get(name), float):
        model.set_gate_threshold(stored[name])
    else:
        _logger.info(
            "%s holds no calibrated gate threshold: 0.5 is used; --eval --calibrate finds one",
            source,
        )


def set_threshold(model: VisionMamba | None, probability: float) -> None:
    """Set the threshold of a model that routes, as a probability."""
    if getattr(model, "route_blocks", False):
        model.set_gate_threshold(math.log(probability / (1 - probability)))


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
