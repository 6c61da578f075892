"""A model of ours in an ONNX file, run by ONNX Runtime as if it were the model itself.

The file ends with a seal, a last entry of its metadata: the SHA-256 of all that stands before. ONNX
Runtime takes weights as they are, also where a disk or a network has changed them.

B images, C classes.
"""

import hashlib
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
_SEAL = b"dyvm_sha256"


def is_onnx(path: str | os.PathLike) -> bool:
    """By the name: ONNX files do not say what they are."""
    return Path(path).suffix.lower() == SUFFIX


def sealed(content: bytes) -> bytes:
    """A serialised ModelProto, with its seal."""
    return content + _seal(hashlib.sha256(content).hexdigest())


def _seal(digest: str) -> bytes:
    """An entry of `metadata_props` in Protocol Buffers' wire format, which takes further entries of
    a list at the end.
    """
    value = digest.encode()
    pair = b"\x0a%c%b\x12%c%b" % (len(_SEAL), _SEAL, len(value), value)
    return b"\x72%c%b" % (len(pair), pair)


def _check_seal(path: str | os.PathLike) -> None:
    """Raise UserError where the file is not, byte by byte, what export.py has written."""
    digest, length = hashlib.sha256(), len(_seal("0" * 64))
    left = max(os.path.getsize(path) - length, 0)
    with open(path, "rb") as file:
        while part := file.read(min(left, 1 << 24)):
            digest.update(part)
            left -= len(part)
        if file.read() != _seal(digest.hexdigest()):
            raise UserError(
                f"{path} is not as export.py has written it: damaged, or changed by another "
                "program; export it again from its checkpoint"
            )


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

    Raises UserError for a file that is not one of export.py, that was changed since, or that ONNX
    Runtime refuses.
    """

    def __init__(self, path: str | os.PathLike):
        self.session = open_session(path)
        self.record = parse_record(self.session.get_modelmeta().custom_metadata_map, str(path))
        _check_seal(path)
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
