"""Checkpoints of small models for the tests of export.py, and what it makes of them."""

from pathlib import Path

import torch
from torch import nn

import export
import options
from evaluation.inference import load_predictor
from helpers.seeing import save_model
from models.build import ModelSpec
from tasks import task_named
from utils.checkpoint import load_checkpoint, save_checkpoint

TINY = ["--model-kwargs", "embed_dim=16", "depth=2", "d_state=4"]
STAGE = ["--pruning-layers", "1"]
TOKEN = ["--method", "token", *STAGE, *TINY]
SMALLEST = ["--method", "dense", "--model-kwargs", "embed_dim=16", "depth=1", "d_state=4"]
CLASSES = ["ant", "bee", "cat"]


def decided(path: Path) -> Path:
    """The checkpoint with predictors that tell tokens apart: no decision is nearly a tie."""
    from benchmarks.exported import decide

    checkpoint = load_checkpoint(path)
    decide(checkpoint["model"].items())
    save_checkpoint(dict(checkpoint), path)
    return path


def classifier(folder: Path, *flags: str, seed: int = 0) -> Path:
    return decided(save_model(folder / "model.pth", *flags, classes=CLASSES, seed=seed))


def segmenter(folder: Path, decoder: str) -> Path:
    """A dynamic segmenter with random weights, as a training leaves it."""
    torch.manual_seed(0)
    flags = ["--data-set", "SEG_FOLDER", "--data-path", str(folder), "--input-size", "32"]
    flags += [
        "--decoder",
        decoder,
        "--method",
        "token" if decoder == "upernet" else "dyvm",
        *STAGE,
        "--eval",
        "--model-path",
        "none",
    ]
    depth = 4 if decoder == "upernet" else 2
    layers = ["--output-layers", *("0123" if decoder == "upernet" else "1")]
    kwargs = ["--model-kwargs", "embed_dim=16", f"depth={depth}", "d_state=4", "patch_size=8"]
    args = options.parse([*flags, *layers, *kwargs], {})
    model = task_named("segmentation").of_run(args).model(ModelSpec.from_args(args), len(CLASSES))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
    recorded = vars(args) | {"model_path": None, "eval": False}
    content = {"model": model.state_dict(), "family": model.family.name, "args": recorded}
    content |= {"task": "segmentation", "class_names": CLASSES}
    save_checkpoint(content, folder / "model.pth")
    return decided(folder / "model.pth")


def exported(checkpoint: Path, *flags: str, suffix: str = ".onnx") -> Path:
    output = checkpoint.with_suffix(suffix)
    export.main(["--model-path", str(checkpoint), "--output", str(output), *flags])
    return output


def own_model(checkpoint: Path):
    return load_predictor(export.build_parser(), ["--model-path", str(checkpoint), "--output", "x"])
