"""Checkpoints of small models with random weights, and images, for the tests of everything that
shows decisions.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import options
from models.build import ModelSpec, build_model
from utils.checkpoint import save_checkpoint

SMALL = ["--model-kwargs", "embed_dim=16", "depth=4", "--num-workers", "0", "--device", "cpu"]
DYNAMIC = ["--method", "dyvm", "--pruning-layers", "1", "2", "3"]
DIGITS = [str(digit) for digit in range(10)]


def save_model(path: Path, *flags: str, classes=DIGITS, seed: int = 0, **more) -> Path:
    """A checkpoint as a training leaves it: random weights, gates that differ between images,
    recorded arguments.
    """
    torch.manual_seed(seed)
    # The teacher is no part of what is recorded: --eval demands none.
    args = options.parse(["--eval", "--model-path", "none", *SMALL, *flags], {})
    model = build_model(ModelSpec.from_args(args), len(classes))
    for name, module in model.named_modules():
        if name.endswith("block_head"):
            nn.init.normal_(module.weight, std=3)
            nn.init.zeros_(module.bias)
        if name.endswith(
            "out_proj"
        ):  # strong layers: what a class token reads depends on the image
            nn.init.normal_(module.weight, std=2)
    recorded = vars(args) | {"model_path": None, "eval": False}
    save_checkpoint(
        {
            "model": model.state_dict(),
            "family": model.family.name,
            "args": recorded,
            "class_names": list(classes),
        }
        | more,
        path,
    )
    return path


def planted(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A bright image (width, height) whose pixels all change when they are dimmed."""
    pixels = np.random.RandomState(seed).randint(170, 256, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def save_images(folder: Path, count: int, size: tuple[int, int] = (40, 30)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        planted(size, number).save(folder / f"{number:03d}.png")
    return folder
