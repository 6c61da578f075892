"""Models from flags and from checkpoints: what training, evaluation, visualize.py and predict.py share."""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch

from models import VisionMamba
from models.weights import load_weights
from utils.errors import UsageError, UserError

# What a checkpoint is, so that it can be evaluated without repeating the flags that made it.
IDENTITY = ("model", "method", "model_kwargs", "pruning_layers", "token_keep_ratio", "block_keep_ratio",
            "token_strategy", "scorer_input", "data_set", "data_path", "input_size", "eval_crop_ratio")


def build_model(args: argparse.Namespace, num_classes: int) -> VisionMamba:
    """The model that `--model` and its companions name, with fresh weights."""
    sizes: dict[str, Any] = dict(args.model_kwargs, num_classes=num_classes, drop_path_rate=args.drop_path)
    if args.input_size:
        sizes["img_size"] = args.input_size
    if args.method != "dense":
        sizes |= dict(pruning_layers=args.pruning_layers, token_keep=args.token_keep_ratio,
                      token_strategy=args.token_strategy, scorer_input=args.scorer_input,
                      prune_tokens=args.method != "block", route_blocks=args.method != "token")
    try:
        return timm.create_model(args.model, **sizes)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--model {args.model}: {error}") from None


def build_dense(args: argparse.Namespace, num_classes: int) -> VisionMamba:
    """The dense counterpart of a dynamic model, with fresh weights."""
    dense = argparse.Namespace(**vars(args) | dict(model=args.model.removeprefix("dyvm_"), method="dense",
                                                   drop_path=0.0))
    return build_model(dense, num_classes)


def restore_model(args: argparse.Namespace, checkpoint: dict[str, Any], num_classes: int,
                  ema: bool = False) -> VisionMamba:
    """The model of `args` with the weights of a checkpoint, or with the average of its weights (`ema`).

    Raises UserError when the weights do not fit, or when there is no average.
    """
    source = args.model_path
    if ema:
        if not checkpoint.get("ema"):
            raise UserError(f"{source} holds no average of the weights (EMA)")
        checkpoint, source = checkpoint | {"model": checkpoint["ema"]}, f"{source} (EMA)"
    model = build_model(args, num_classes)
    load_weights(model, checkpoint, source)
    return model


def recorded_arguments(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of ours says it is, as defaults for the flags; nothing for others."""
    recorded = checkpoint.get("args")
    if not isinstance(recorded, dict) or "method" not in recorded:
        return {}
    known = {name: recorded[name] for name in IDENTITY if name in recorded}
    known["model_kwargs"] = list(known.get("model_kwargs", {}).items())
    teacher = recorded.get("model_path")
    if teacher and Path(teacher).is_file():
        known["dense_path"] = teacher
    return known


def model_image_size(args: argparse.Namespace) -> int:
    with torch.device("meta"):
        return build_model(args, num_classes=1).patch_embed.img_size
