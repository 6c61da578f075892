"""A model of ours in an ONNX file, run by ONNX Runtime as if it were the model itself.

B images, C classes.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from models import Result
from utils.errors import UserError, first_line
from utils.startup import require

from .program import INPUT
from .record import parse_record

SUFFIX = ".onnx"


def is_onnx(path: str | os.PathLike) -> bool:
    """By the name: ONNX files do not say what they are."""
    return Path(path).suffix.lower() == SUFFIX


def open_session(path: str | os.PathLike):
    """A file in ONNX Runtime, with as many threads as PyTorch has. Raises UserError."""
    require("onnxruntime")
    import onnxruntime

    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    # Waiting threads sleep, as those of OpenMP do (utils/startup.py).
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class of their own
        raise UserError(f"{path}: ONNX Runtime cannot load it: {first_line(error)}") from None


def run(session, images: Tensor) -> Tensor:
    """images -> logits."""
    (logits,) = session.run(None, {INPUT: images.float().cpu().numpy()})
    return torch.from_numpy(logits)


class OnnxModel:
    """Called with images [B, 3, H, W] it returns a Result that has logits and nothing else.

    Raises UserError for a file that is not one of export.py, or that ONNX Runtime refuses.
    """

    def __init__(self, path: str | os.PathLike):
        self.session = open_session(path)
        self.record = parse_record(self.session.get_modelmeta().custom_metadata_map, str(path))
        self.num_classes = len(self.record["shown_names"])
        self.patch_embed = SimpleNamespace(img_size=tuple(self.record["input_size"]))

    @property
    def checkpoint(self) -> dict[str, Any]:
        """What a checkpoint would record beside its weights."""
        return {name: self.record[name] for name in ("task", "args", "class_names")}

    def __call__(self, images: Tensor) -> Result:
        logits = run(self.session, images)
        nothing = torch.empty(0, len(images), 2)
        return Result(logits, None, None, None, gates=nothing)
