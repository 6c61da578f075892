"""Models from a ModelSpec, made from flags or a checkpoint; their weights and gate thresholds."""

import argparse
import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm

from utils.errors import UsageError, UserError
from utils.files import sha256_of

from .backbone import VisionMamba
from .embedding import Size
from .options import METHODS
from .weights import load_weights

# Flags that a checkpoint records of itself, so that its evaluation need not repeat them.
IDENTITY = (
    "model",
    "method",
    "model_kwargs",
    "pruning_layers",
    "token_keep_ratio",
    "stage_keep",
    "block_keep_ratio",
    "token_strategy",
    "scorer_input",
    "reduction",
    "merge_tokens",
    "selector_gradient",
    "data_set",
    "data_path",
    "prefix",
    "part_seconds",
    "part_stride",
    "canvas",
    "train_split",
    "val_split",
    "input_size",
    "eval_crop_ratio",
    "whole_images",
    "bit_depth",
)

# The flag of each field of ModelSpec, as args and checkpoints name it.
FLAG_OF = {
    "name": "model",
    "method": "method",
    "kwargs": "model_kwargs",
    "pruning_layers": "pruning_layers",
    "token_keep_ratio": "token_keep_ratio",
    "stage_keep": "stage_keep",
    "token_strategy": "token_strategy",
    "scorer_input": "scorer_input",
    "reduction": "reduction",
    "merge_tokens": "merge_tokens",
    "selector_gradient": "selector_gradient",
    "drop_path": "drop_path",
    "img_size": "input_size",
}

# Arguments of the models that have a flag of their own.
FLAGGED = {
    "num_classes": "--data-set",
    "drop_path_rate": "--drop-path",
    "img_size": "--input-size",
    "pruning_layers": "--pruning-layers",
    "token_keep": "--token-keep-ratio or --stage-keep",
    "token_strategy": "--token-strategy",
    "scorer_input": "--scorer-input",
    "reduction": "--reduction",
    "merge_tokens": "--merge-tokens",
    "selector_gradient": "--selector-gradient",
    "prune_tokens": "--method",
    "route_blocks": "--method",
}

STORED = "gate_threshold"  # in a checkpoint: {"model": logit, "ema": logit}
TOKEN_THRESHOLDS = "token_thresholds"  # {"model": log-odds of the stages, "ema": ..., "of": budget}
# Flags for which these hold.
BUDGET = ("token_keep_ratio", "stage_keep", "pruning_layers", "input_size")
STAGE_KEEP = "stage_keep"  # in a checkpoint: what its stages learned to keep, as --stage-keep

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSpec:
    """What a model is, apart from its weights and number of classes; recorded in checkpoints.

    Args:
        name: as `timm.create_model` takes it; `dyvm_...` is dynamic.
        method: dense, or which parts a dynamic model has: dyvm (both), token, block.
        kwargs: further arguments of the model, such as embed_dim.
        pruning_layers, img_size: None for the model's own.
        token_keep_ratio: stage j keeps its j-th power of the patches.
        stage_keep: what each stage keeps of them, in place of that.
    """

    name: str
    method: str = "dense"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pruning_layers: Sequence[int] | None = None
    token_keep_ratio: float = 0.7
    stage_keep: Sequence[float] | None = None
    token_strategy: str = "learned"
    scorer_input: str = "hidden"
    reduction: str = "prune"
    merge_tokens: int | None = None
    selector_gradient: str = "paper"
    drop_path: float = 0.0
    img_size: Size | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "ModelSpec":
        """The model described by `--model` and related flags."""
        return cls._from_record(vars(args))

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any], source: str) -> "ModelSpec":
        """The model that a checkpoint of ours records. Raises UserError for a foreign one."""
        recorded = checkpoint.get("args")
        if not is_ours(recorded):
            raise UserError(f"{source} does not record which model it is of")
        return cls._from_record(recorded | _learned(checkpoint))

    @classmethod
    def _from_record(cls, record: Mapping[str, Any]) -> "ModelSpec":
        return cls(**{name: record[flag] for name, flag in FLAG_OF.items() if flag in record})

    @property
    def dynamic(self) -> bool:
        return self.method != "dense"

    def dense(self) -> "ModelSpec":
        """The dense counterpart, a teacher or a reference, and so without drop path."""
        name = self.name.removeprefix("dyvm_")
        return dataclasses.replace(self, name=name, method="dense", drop_path=0.0)


def build_model(spec: ModelSpec, num_classes: int) -> VisionMamba:
    """A model with fresh weights. Raises UsageError for arguments that it does not accept."""
    for name in FLAGGED.keys() & spec.kwargs.keys():
        raise UsageError(f"--model-kwargs {name}=...: use {FLAGGED[name]}")
    arguments: dict[str, Any] = dict(
        spec.kwargs, num_classes=num_classes, drop_path_rate=spec.drop_path
    )
    if spec.img_size:
        arguments["img_size"] = spec.img_size
    if spec.dynamic:
        arguments |= dict(
            pruning_layers=spec.pruning_layers,
            token_keep=spec.stage_keep or spec.token_keep_ratio,
            token_strategy=spec.token_strategy,
            scorer_input=spec.scorer_input,
            reduction=spec.reduction,
            merge_tokens=spec.merge_tokens,
            selector_gradient=spec.selector_gradient,
            prune_tokens=spec.method != "block",
            route_blocks=spec.method != "token",
        )
    try:
        return timm.create_model(spec.name, **arguments)
    except (TypeError, ValueError) as error:
        reason = re.sub(r".* got an unexpected keyword argument", "no model takes", str(error))
        raise UsageError(f"--model {spec.name}: {reason}") from None


def restore(
    model: VisionMamba,
    checkpoint: Mapping[str, Any],
    source: str,
    *,
    ema: bool = False,
    threshold: float | str = "calibrated",
) -> VisionMamba:
    """Load a checkpoint's weights and gate threshold into a model; -> the model.

    Args:
        source: the file, for messages.
        ema: use the averaged weights.
        threshold: a probability, or "calibrated" for the checkpoint's own.

    Raises:
        UserError: the weights do not fit, or there is no average.
    """
    if ema:
        if not checkpoint.get("ema"):
            raise UserError(f"{source} holds no average of the weights (EMA)")
        checkpoint, source = {**checkpoint, "model": checkpoint["ema"]}, f"{source} (EMA)"
    load_weights(model, checkpoint, source)
    restore_threshold(model, checkpoint, threshold, "ema" if ema else "model", source)
    return model.eval()


def is_ours(recorded: Any) -> bool:
    """Whether arguments beside the weights are of our flags; other programs have a method too."""
    return (
        isinstance(recorded, Mapping)
        and recorded.get("method") in METHODS
        and {"model", "model_kwargs"} <= recorded.keys()
    )


def recorded_arguments(
    checkpoint: Mapping[str, Any], of_task: Sequence[str] = ()
) -> dict[str, Any]:
    """The arguments that a checkpoint of ours records, as defaults for the flags; else empty.

    of_task: names of further flags, those that its task wants (`Task.recorded`).
    """
    recorded = checkpoint.get("args")
    if not is_ours(recorded):
        return {}
    defaults = {name: recorded[name] for name in (*IDENTITY, *of_task) if name in recorded}
    defaults |= _learned(checkpoint)
    defaults.setdefault("bit_depth", 16)  # earlier versions kept the upper 8 of 16 bits
    defaults["model_kwargs"] = list(defaults.get("model_kwargs", {}).items())
    defaults["dense_path"] = _recorded_teacher(
        recorded.get("model_path"), checkpoint.get("teacher_sha256")
    )
    return defaults


def _learned(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a training has learned in place of a flag."""
    return {STAGE_KEEP: checkpoint[STAGE_KEEP]} if checkpoint.get(STAGE_KEEP) else {}


def _recorded_teacher(path: str | None, sha256: str | None) -> str | None:
    """The teacher's file, if it still exists unchanged."""
    if not path or not Path(path).is_file():
        return None
    if sha256 is not None and sha256_of(path) != sha256:
        _logger.warning(
            "%s has changed and is not the teacher any more; the dense column has no accuracy "
            "(give --dense-path to compare with it anyway)",
            path,
        )
        return None
    return path


def restore_threshold(
    model: VisionMamba, checkpoint: Mapping[str, Any], wanted: float | str, name: str, source: str
) -> None:
    """Set the gate threshold `wanted`: a probability, or the checkpoint's own for `name`."""
    if not model.route_blocks:
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


def token_thresholds(
    checkpoint: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, list[float]]:
    """The log-odds of the stages that a checkpoint holds for the budget of these flags and its own
    gate threshold, by the names of its weights, "model" and "ema"; else empty.
    """
    stored = checkpoint.get(TOKEN_THRESHOLDS)
    names = ("model", "ema") if checkpoint.get("ema") else ("model",)
    if not isinstance(stored, dict) or stored.get("of") != token_budget(args):
        return {}
    if args.method != "token" and args.gate_threshold != "calibrated":
        return {}  # they were chosen with other gates
    return {name: stored[name] for name in names} if stored.keys() >= set(names) else {}


def token_budget(args: argparse.Namespace) -> dict[str, Any]:
    """What thresholds of tokens are chosen for: how many the stages keep, as the flags say it, and
    what of that is met by the mean image.
    """
    return {name: getattr(args, name) for name in BUDGET} | {"met": "cost"}


def set_threshold(model: VisionMamba, probability: float) -> None:
    """Set the threshold of a model that routes, as a probability."""
    if model.route_blocks:
        model.set_gate_threshold(math.log(probability / (1 - probability)))


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
