"""A run that is killed at any moment ends as if it had not been; what else belongs to a long run,
in one process.
"""

import json
import subprocess
import sys

import pytest
import torch
from helpers.data import make_folders
from helpers.processes import ROOT, clean_environment
from torch import nn

import main
from tests.helpers.flags import tiny
from utils import resume
from utils.checkpoint import load_checkpoint
from utils.distributed import Distributed
from utils.errors import UserError
from utils.nonfinite import MOST_IN_A_ROW, NonFiniteError, NonFiniteSteps

SMALL = tiny("--throughput-seconds", "0", depth=2)


def test_thirty_kills_at_random_moments_change_nothing(tmp_path):
    """Workers, repeated augmentation, mixup and EMA are on; the run saves after every step."""
    flags = [
        *SMALL,
        "--subset",
        "128",
        "--epochs",
        "8",
        "--num-workers",
        "2",
        "--repeated-aug",
        "--save-minutes",
        "1e-6",
        "--model-ema-decay",
        "0.9",
        "--lr",
        "2e-3",
        "--unscale-lr",
        "--resume",
        "auto",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "kill_driver.py", whole, parts, "30", *flags],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    hit = dict(word.split("=") for word in result.stdout.split())
    assert int(hit["save"]) > 0 and int(hit["start-up"]) > 0, f"the kills were not spread: {hit}"
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        one, other = load_checkpoint(whole / name), load_checkpoint(parts / name)
        for volatile in ("output_dir", "resume"):
            one["args"].pop(volatile), other["args"].pop(volatile)
        assert equal(one, other), name
    assert (whole / "log.txt").read_bytes() == (parts / "log.txt").read_bytes()
    assert (whole / "log.txt").read_text().count("\n") == 8
    assert not list(parts.glob(".*checkpoint*.tmp")), "what killed saves left is cleared away"


def equal(one, other) -> bool:
    """Whether two nested states are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("minutes, saves", [("0", 2), ("1e-6", 4 + 2), ("60", 2)])
def test_save_minutes_saves_within_an_epoch(tmp_path, monkeypatch, minutes, saves):
    """Besides the saves before and after the epoch's evaluation."""
    steps, save = [], resume.Saver.save
    monkeypatch.setattr(
        resume.Saver,
        "save",
        lambda self, *a, **k: (steps.append(self.training.step), save(self, *a, **k)),
    )
    assert main.main([*SMALL, "--save-minutes", minutes, "--output_dir", str(tmp_path)]) == 0
    assert len(steps) == saves and steps[-2:] == [4, 0]


def test_bad_images_are_counted_and_listed(tmp_path):
    folder = make_folders(tmp_path / "images", train=16, val=3)
    (folder / "train" / "cat" / "3.jpg").write_bytes(b"")
    (folder / "val" / "dog" / "1.jpg").write_bytes(b"GIF89a, not at all")
    flags = [
        *SMALL,
        "--data-set",
        "FOLDER",
        "--data-path",
        str(folder),
        "--subset",
        "1.0",
        "--batch-size",
        "8",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    with pytest.raises(UserError, match=r"3\.jpg: the file is empty.*--bad-images skip"):
        main.main(flags)
    assert main.main([*flags, "--bad-images", "skip", "--epochs", "2"]) == 0
    listed = (tmp_path / "run" / "bad_images_rank0.txt").read_text().splitlines()
    assert len(listed) == 2 and any(line.endswith("3.jpg: the file is empty") for line in listed)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [line["bad_images"] for line in lines] == [2, 2]


class TestNonFiniteSteps:
    def steps(self, optimizer: str, stop: bool = False):
        weight = nn.Parameter(torch.ones(3))
        options = dict(fused=True) if optimizer == "fused" else dict(foreach=False)
        adam = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1, **options)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        alone = Distributed(torch.device("cpu"))
        return weight, NonFiniteSteps(
            adam, scaler, alone, lambda indices: [f"image {int(i)}" for i in indices], stop
        )

    @staticmethod
    def take(weight: nn.Parameter, guard: NonFiniteSteps, value: float, index: int = 0) -> float:
        weight.grad = torch.full_like(weight, value)
        return guard.step(weight.grad.norm(), weight.grad.sum(), torch.tensor([index])).item()

    @pytest.mark.parametrize("optimizer", ["fused", "plain"])
    def test_a_step_that_is_left_out_changes_nothing(self, optimizer):
        (weight, guard), (other, undisturbed) = self.steps(optimizer), self.steps(optimizer)
        for value in (1.0, 0.5, -2.0):
            self.take(other, undisturbed, value)
        skipped = [
            self.take(weight, guard, value)
            for value in (1.0, float("nan"), 0.5, float("inf"), -2.0)
        ]
        assert skipped == [0, 1, 0, 1, 0] and torch.equal(weight, other)

    def test_ten_in_a_row_end_the_run_across_epochs(self):
        weight, guard = self.steps("fused")
        for _ in range(MOST_IN_A_ROW - 1):
            self.take(weight, guard, float("nan"))
            guard.look()  # as at the end of an epoch of one step
        with pytest.raises(
            NonFiniteError,
            match="10 steps in a row.*the loss is not finite on the batch of image 7",
        ):
            self.take(weight, guard, float("nan"), index=7)
            guard.look()

    def test_a_good_step_ends_the_row(self):
        weight, guard = self.steps("fused")
        for number in range(40):
            self.take(weight, guard, 1.0 if number % MOST_IN_A_ROW == 9 else float("nan"))


def test_a_loss_that_is_not_finite_stops_the_step_though_its_gradient_is(tmp_path, monkeypatch):
    class Infinite(nn.Module):
        def forward(self, logits, targets):
            return nn.functional.cross_entropy(logits, targets) + torch.inf

    monkeypatch.setattr("tasks.classification.nn.CrossEntropyLoss", Infinite)
    with pytest.raises(
        UserError, match="the loss is not finite on the batch of DIGITS train image .*nonfinite.pth"
    ):
        main.main(
            [
                *SMALL,
                "--mixup",
                "0",
                "--cutmix",
                "0",
                "--smoothing",
                "0",
                "--nonfinite",
                "stop",
                "--output_dir",
                str(tmp_path),
            ]
        )
    saved = load_checkpoint(tmp_path / "nonfinite.pth")
    assert (saved["epoch"], saved["step"]) == (0, 0) and len(saved["images"][0]) == 16
    assert all(value.isfinite().all() for value in saved["model"].values())
