"""The benchmark of video: what it measures is right, or gets no number."""

import dataclasses
import json
import sys

import pytest

from benchmarks import video
from models import VisionMamba
from utils.errors import UserError


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Small frames and short videos; -> what the benchmark recorded."""
    monkeypatch.setattr(video, "IMG_SIZE", 32)
    for name, value in {"HEIGHT": 48, "WIDTH": 64, "LENGTH": 20}.items():
        monkeypatch.setattr(video, name, value)

    def run(*flags: str):
        arguments = ["--frames", "4", "--memory-frames", "4", "--seconds", "0", "--retries", "0"]
        output = tmp_path / "record.json"
        arguments += [*flags, "--device", "cpu", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["video.py", *arguments])
        video.main()
        return json.loads(output.read_text())

    return run


def test_the_record(small, capsys):
    record = small()
    [part] = record["models"]
    assert part["operations"]["dynamic"] < part["operations"]["dense"]
    assert part["times"]["dense"]["samples"] >= 5 and max(part["errors"].values()) < 1e-4
    [decoding] = record["decoding"]
    assert decoding["errors"]["this repository"] == 0, "the pixels of the plain loop"
    [memory] = record["memory"]
    assert set(memory["bytes"]) == {"dense", "dynamic"}
    assert "clips/s dense" in capsys.readouterr().out


def test_wrong_frames_get_no_number(small, monkeypatch):
    right = video.ours
    monkeypatch.setattr(video, "ours", lambda path, count: right(path, count)[::-1])
    with pytest.raises(UserError, match="no speed without correctness: this repository"):
        small("--models")


def test_a_wrong_model_gets_no_number(small, monkeypatch):
    forward, calls = VisionMamba.forward, []

    def wrong(self, *arguments, **options):
        """Another answer at each call."""
        result = forward(self, *arguments, **options)
        calls.append(1)
        return dataclasses.replace(result, logits=result.logits + len(calls))

    monkeypatch.setattr(VisionMamba, "forward", wrong)
    with pytest.raises(UserError, match="no speed without correctness: dense, dynamic"):
        small()
