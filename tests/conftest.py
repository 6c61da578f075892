"""Set before PyTorch is imported: threads that wait for each other sleep.

The tests' tensors are tiny. On a shared machine, threads that spin while they wait take the
processor from those that they wait for, and everything becomes ten times slower.
"""

import logging
import os
import sys

import pytest
from helpers.shell import program

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if os.environ.get("TRITON_INTERPRET") == "1":
    from helpers import interpreter

    interpreter.hasten()


# Tests of numbers and whole runs, whose lines other tests cover: tracing them would take a third of
# their time.
UNTRACED = (
    "test_batch_independence", "test_bf16", "test_calibration", "test_compile", "test_golden",
    "test_no_host_wait", "test_ops", "test_every_variant",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if any(f"{name}.py" in item.nodeid or f"::{name}" in item.nodeid for name in UNTRACED):
            item.add_marker("no_cover")


@pytest.fixture
def two_threads():
    """PyTorch computes with two threads, as it would by itself on two cores; scripts/test.sh gives
    each of its processes one.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def as_a_process_of_its_own(monkeypatch):
    """Without the handlers that other programs have left, which write to standard output."""
    monkeypatch.setattr(logging.root, "handlers", [])


@pytest.fixture
def poisoned():
    """Memory that nobody wrote holds NaN."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan() and torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def python(tmp_path):
    """A python that notes its arguments in calls.log; `-` runs what it is given, `-c` (the checks)
    always succeeds.
    """
    return program(
        tmp_path / "python",
        f"""
case "$1" in
  -) exec {sys.executable} "$@" ;;
  -c) exit ;;
esac
printf '%q ' "$@" >>{tmp_path}/calls.log
echo "GOLDEN_DIR=${{GOLDEN_DIR:-}}" >>{tmp_path}/calls.log
case "$*" in
  *benchmarks/model.py*) echo "a line of the benchmark"; exit 7 ;;
  *benchmarks/train.py*) sleep 20 ;;
  *"-m gpu"*) echo "3 passed in 1.00s" ;;
esac""",
    )


@pytest.fixture
def inputs(tmp_path):
    """A teacher's checkpoint and a data folder, as variables of the environment."""
    (tmp_path / "dense model.pth").touch()
    (tmp_path / "images").mkdir()
    return {"MODEL_PATH": tmp_path / "dense model.pth", "DATA_PATH": tmp_path / "images"}


@pytest.fixture(scope="session")
def video_root(tmp_path_factory):
    """train/ and val/ with two classes of videos of six frames; one is a folder of them."""
    from helpers.videos import numbered, write_video
    from PIL import Image

    folder, frames = tmp_path_factory.mktemp("videos"), numbered(6, 16, 32)
    for split in ("train", "val"):
        for name in ("left", "right"):
            (folder / split / name).mkdir(parents=True)
            write_video(folder / split / name / "b.mp4", frames)
        write_video(folder / split / "left" / "a.avi", frames, "mpeg4")
        (folder / split / "left" / "notes.txt").write_text("no video")
        (folder / split / "right" / "shots").mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / split / "right" / "shots" / f"img_{number:05}.png")
    return folder


@pytest.fixture
def few_validation_images(monkeypatch):
    """100 of the digits' 360 validation images, of all classes."""
    import datasets
    from loading.arrays import digits
    from loading.images import fixed_part

    def load(path, split):
        images = digits(path, split)
        return fixed_part(images, 100) if split == "val" else images

    monkeypatch.setitem(
        datasets.DATA_SETS, "DIGITS", datasets.DataSet("DIGITS", "classification", load)
    )
