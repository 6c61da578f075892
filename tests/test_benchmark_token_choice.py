"""The benchmark of ways to choose tokens: what it times is right, or gets no time."""

import json
import sys

import pytest

from benchmarks import token_choice
from models.reduction import selection
from utils.errors import UserError


@pytest.fixture
def small(monkeypatch, tmp_path):
    """One sample of each step of a small model; -> the record."""
    monkeypatch.setattr(token_choice, "interleaved", once)

    def run():
        output = tmp_path / "record.json"
        flags = "--model vim_micro --batch 2 --seconds 0 --retries 0 --device cpu --output"
        monkeypatch.setattr(sys, "argv", ["token_choice.py", *flags.split(), str(output)])
        token_choice.main()
        return json.loads(output.read_text())

    return run


def once(calls, device, rounds, seconds, retries):
    for call in calls.values():
        call()
    return {name: {"ms": 2.0, "cpu_ms": 4.0, "samples": 1, "disturbed": 0} for name in calls}


def test_the_record(small, capsys):
    record = small()
    assert list(record["times"]) == list(record["errors"]) == list(token_choice.WAYS)
    assert max(record["errors"].values()) < 1e-4
    assert {time["ms"] for time in record["times"].values()} == {2.0, 0.5}, "of a single step"
    assert "x paper's" in capsys.readouterr().out


def test_importance_is_taken_every_few_steps(monkeypatch):
    taken = []
    monkeypatch.setattr(
        token_choice, "with_importance", lambda teacher, *rest: taken.append(1) or teacher(rest[0])
    )
    monkeypatch.setattr(sys, "argv", ["x", "--model", "vim_micro", "--device", "cpu"])
    args = token_choice.parse_args()
    teacher = token_choice.timm.create_model("vim_micro").eval()
    images = token_choice.random_images(1, 32, "cpu")
    for name, expected in (("distilled, every 4th step", 2), ("distilled", 5), ("paper", 0)):
        taken.clear()
        step = token_choice.Steps(name, teacher, args)
        for _ in range(5):
            step._taught(images, None)
            step.done += 1
        assert len(taken) == expected


def test_a_wrong_step_gets_no_time(small, monkeypatch):
    """In place with a mask that is moved: another loss at each call."""
    right, calls = selection.mask_in_place, []

    def wrong(tokens, mixed, *rest, **into):
        calls.append(1)
        return right(tokens, mixed * (1 + len(calls)), *rest, **into)

    monkeypatch.setattr(selection, "mask_in_place", wrong)
    with pytest.raises(UserError, match="no speed without correctness: in place, distilled in"):
        small()
