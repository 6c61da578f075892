"""Small runs of benchmarks."""

import json
import sys

from benchmarks import model
from utils.errors import UserError


def tiny_table(monkeypatch, tmp_path, *flags):
    """benchmarks/model.py at 64 pixels; -> its record and the complaint it ends with."""
    output = tmp_path / "model.json"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "model.py",
            "--device",
            "cpu",
            "--models",
            "T",
            "--img-size",
            "64",
            "--batch",
            "3",
            "--seconds",
            "0",
            "--retries",
            "0",
            "--output",
            str(output),
            *flags,
        ],
    )
    complaint = None
    try:
        model.main()
    except UserError as error:
        complaint = (error.exit_code, str(error))
    (part,) = json.loads(output.read_text())["parts"]
    return part, complaint
