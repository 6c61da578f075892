"""Composed scenes: complete files, all classes, the same pixels for the same seed."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from helpers.data import GARMENTS, garments, save_garments
from helpers.shell import ROOT
from PIL import Image

from loading import compositing
from scripts.seg import scenes
from utils.errors import UsageError, UserError


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    return save_garments(tmp_path_factory.mktemp("fashion"))


@pytest.fixture
def make(fashion, monkeypatch, capsys):
    def run(output, *flags):
        arguments = ["--output", output, "--data-path", fashion, "--train", 8, "--val", 4, *flags]
        monkeypatch.setattr(sys, "argv", ["scenes.py", *map(str, arguments)])
        scenes.main()
        return capsys.readouterr().out

    return run


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_files_of_ade20ks_layout(tmp_path, make):
    assert "8 training and 4 validation scenes" in make(tmp_path, "--size", 96)
    names = (tmp_path / "classes.txt").read_text().splitlines()
    assert len(names) == len(set(names)) == 12
    assert (names[0], names[1], names[-1]) == ("background", "T-shirt/top", "digit")
    values = set()
    for split, count in (("training", 8), ("validation", 4)):
        images, masks = (tmp_path / kind / split for kind in ("images", "annotations"))
        stems = sorted(file.stem for file in images.iterdir())
        assert len(stems) == count and stems == sorted(file.stem for file in masks.iterdir())
        for stem in stems:
            image, mask = (Image.open(folder / f"{stem}.png") for folder in (images, masks))
            assert (image.mode, image.size) == ("RGB", (96, 96))
            assert (mask.mode, mask.size) == ("L", (96, 96))
            present = set(np.unique(mask).tolist())
            assert {1} < present, "a background with something before it"
            assert np.asarray(image).std() > 5
            values |= present
    assert values == set(range(1, 13))


def test_the_seed_decides(tmp_path, make):
    first, again, other, more = (tmp_path / name for name in "abcd")
    make(first)
    make(again)
    make(other, "--seed", 1)
    make(more, "--train", 9)
    assert contents(first) == contents(again)
    assert not {*contents(first).values()} & {*contents(other).values()} - {
        (first / "classes.txt").read_bytes()
    }
    assert contents(first).items() < contents(more).items(), "a scene depends on its number alone"


def test_validation_has_its_own_stream(fashion):
    pieces = {2: garments(20, 0)[0]}
    training, validation = (scenes.scene(pieces, 64, [0, stream, 0])[0] for stream in (0, 1))
    assert not np.array_equal(training, validation)


def test_pixels_are_the_same_everywhere():
    """Recorded once; no machine's rounding may change them."""
    pixels, labels = garments(20, 0)
    pieces = {2 + label: pixels[labels == label] for label in range(GARMENTS)}
    pieces[12] = np.arange(64, dtype=np.uint8).reshape(1, 8, 8) * 4
    digest = hashlib.sha256()
    for number in range(3):
        for array in scenes.scene(pieces, 128, [5, 0, number]):
            digest.update(array.tobytes())
    assert digest.hexdigest()[:16] == "147a8ce77e1e7145"


def test_a_mask_covers_what_is_painted():
    """A white square on the label map and on the image, without shadow or neighbours."""
    image, opacity = np.zeros((40, 40, 3), np.int64), np.full((16, 16), 256)
    compositing.over(image, np.array([200, 100, 50]), opacity, -4, 30)
    assert (image[:12, 30:] == [200, 100, 50]).all()
    assert not image[12:].any() and not image[:, :30].any()


@pytest.mark.parametrize("size, side", [((28, 28), 16), ((28, 28), 64), ((8, 8), 63), ((3, 3), 1)])
def test_zoom_is_bilinear(size, side):
    import torch
    import torch.nn.functional as F

    picture = np.random.RandomState(0).randint(0, 256, size)
    expected = F.interpolate(
        torch.tensor(picture).double()[None, None], (side, side), mode="bilinear"
    )[0, 0].numpy()
    assert np.abs(compositing.zoom(picture, side) - expected).max() < 4


def test_mistakes(tmp_path, make):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        make(tmp_path)
    with pytest.raises(UserError, match="install Debian's dataset-fashion-mnist or give --data-p"):
        make(tmp_path / "new", "--data-path", tmp_path)
    assert not (tmp_path / "new").exists()
    for flags in (["--size", 31], ["--seed", 2**32], ["--train", 0], ["--unknown"]):
        with pytest.raises(UsageError):
            make(tmp_path / "new", *flags)


def test_as_a_program(tmp_path):
    def run(*flags):
        command = [sys.executable, ROOT / "scripts/seg/scenes.py", *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    usage = run("--help")
    assert usage.returncode == 0 and "--train N" in usage.stdout
    wrong = run("--output", "x", "--size", "8")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
