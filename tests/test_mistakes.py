"""What ends main.py: mistakes of the user and bad numbers, each told in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import main
from tasks.classification import check_classes
from tests.helpers.runs import run
from utils.errors import UsageError, UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """Output folder of a dense training."""
    output = tmp_path_factory.mktemp("dense")
    run(output)
    return output


@pytest.mark.parametrize(
    "arguments, kind, words",
    [
        (["--data-set", "MNIST3"], UsageError, ["MNIST3", "DIGITS"]),
        (["--data-set", "IMNET"], UsageError, ["--data-path"]),
        (["--data-set", "FOLDER", "--data-path", "nowhere"], UserError, ["nowhere"]),
        (["--input-size", "2"], UsageError, ["image size 2", "patch size 4"]),
        (["--input-size", "17"], UsageError, ["image size 17", "16 and 20 fit"]),
        (["--model-kwargs", "num_classes=3"], UsageError, ["num_classes", "--data-set"]),
        (["--amp", "fp16"], UsageError, ["fp16", "bf16"]),
        (["--model-kwargs", "colour=1"], UsageError, ["colour"]),
        (["--model-kwargs", "in_chans=1"], UsageError, ["in_chans=1", "three equal channels"]),
        (
            ["--model-kwargs", "checkpoint_path='x'"],
            UsageError,
            ["checkpoint_path", "--model-path"],
        ),
        (["--opt", "adafactorbv"], UsageError, ["adafactorbv", "dtype"]),
        (["--opt", "adan", "--opt-betas", ".9", ".8"], UsageError, ["0.9 0.8", "has 3 of them"]),
        (["--model-path", "missing.pth"], UserError, ["missing.pth"]),
        (["--method", "dyvm", "--model-path", "missing.pth"], UserError, ["missing.pth"]),
        (["--eval", "--model-path", "missing.pth"], UserError, ["missing.pth"]),
        (["--eval", "--model-path", "missing.pth", "--amp", "fp16"], UsageError, ["fp16", "bf16"]),
        (["--output_dir", "/proc/nowhere"], UserError, ["/proc/nowhere"]),
        (["--aa", "nonsense"], UsageError, ["nonsense"]),
        (["--opt", "nonsense"], UsageError, ["nonsense"]),
        (["--batch-size", "4096"], UserError, ["4096"]),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, arguments, kind, words):
    with pytest.raises(UserError) as error:
        main.main(["--output_dir", str(tmp_path), "--device", "cpu", *arguments])
    assert type(error.value) is kind
    assert all(word in str(error.value) for word in words), error.value


def test_pruning_layers_beyond_the_depth(dense, tmp_path):
    with pytest.raises(UsageError, match=r"pruning_layers \[2, 9\] must ascend within 1 ... 3"):
        run(
            tmp_path,
            "--method",
            "dyvm",
            "--model-path",
            dense / "checkpoint.pth",
            "--pruning-layers",
            "2",
            "9",
        )


def test_other_classes_are_refused(dense):
    checkpoint = main.load_checkpoint(dense / "checkpoint.pth")
    names = checkpoint["class_names"]
    check_classes(checkpoint, names, "x.pth")
    check_classes({"model": {}}, ["anything"], "official.pth")
    with pytest.raises(UserError, match="class 3 was '3', here it is 'three'"):
        check_classes(checkpoint, [*names[:3], "three", *names[4:]], "x.pth")
    with pytest.raises(UserError, match="10 classes, the data set has 2"):
        check_classes(checkpoint, names[:2], "x.pth")


def test_a_damaged_checkpoint_is_refused(dense, tmp_path):
    whole = (dense / "checkpoint.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut.pth"):
        main.main(["--eval", "--model-path", str(tmp_path / "cut.pth"), "--device", "cpu"])


def test_a_wrong_backend_is_a_mistake_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("DYVM_BACKEND", "fastest")
    with pytest.raises(UserError, match="DYVM_BACKEND=fastest: no such backend; choose one of cpu"):
        run(tmp_path)


def test_a_run_on_gradients_that_are_not_finite_ends_in_one_line(tmp_path):
    with pytest.raises(UserError, match="not finite on the batch of DIGITS train image"):
        run(tmp_path, "--lr", "1e30", "--nonfinite", "stop", "--epochs", "3")


def test_the_program_itself_prints_one_line_and_its_exit_code(tmp_path):
    """In a process of its own: usage mistakes end with 2, others with 1; no trace."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    for arguments, code in (
        (["--epochs", "no"], 2),
        (["--eval", "--model-path", "missing.pth"], 1),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "main.py", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=120,
        )
        assert done.returncode == code
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert not list(tmp_path.iterdir()), "nothing half-written"
