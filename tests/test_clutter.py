"""CLUTTER: known objects, whole images, and what a model keeps of an object."""

import hashlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.data import garments, options, save_garments

import datasets
from datasets import build_data, settle_data
from loading import arrays, clutter
from loading.images import ArrayImages, SubsetImages
from loading.loaders import Batch
from loading.transforms import seen_region
from main import main
from tasks.meters import ObjectMeter
from utils.distributed import Distributed
from utils.errors import UsageError, UserError

ALONE = Distributed(torch.device("cpu"))


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    return save_garments(tmp_path_factory.mktemp("fashion"))


def canvases(size=56):
    pixels, labels = garments(20, 0)
    return clutter.Clutter(ArrayImages(pixels, labels, list("abcdefghij"), "x"), size, 1, "CLUTTER")


@pytest.mark.parametrize("size", [56, 96])
def test_the_object_is_where_it_is_said_to_be(size):
    images, places = canvases(size), set()
    for index in range(20):
        image = np.asarray(images.load_image(index))
        mass = images.object_mass(index)
        assert image.shape == (size, size, 3) and mass.shape == (size, size)
        assert np.array_equal(image[mass > 0], np.repeat(mass[mass > 0][:, None], 3, axis=1))
        patches = mass.reshape(size // 8, 8, size // 8, 8).sum((1, 3)) > 0
        rows, columns = (np.flatnonzero(patches.any(axis)) for axis in (1, 0))
        assert np.ptp(rows) <= 2 and np.ptp(columns) <= 2, "3 x 3 patches of 8 pixels"
        places.add((rows[0], columns[0]))
        assert (image[..., 0] > 0)[mass == 0].mean() > 0.1, "clutter around it"
    assert len(places) > 8


def test_canvases_are_the_same_on_every_machine():
    images = canvases()
    content = b"".join(images.load_image(index).tobytes() for index in (0, 19))
    assert hashlib.sha256(content).hexdigest()[:16] == "474ffcfb87737ad1"
    assert images.load(3).target == 3 and images.describe(3) == "CLUTTER image 3"
    assert not np.array_equal(images.load_image(0), images.load_image(10))


def test_it_is_shown_whole_unless_asked_otherwise(fashion):
    args = options("--data-set", "CLUTTER", "--data-path", str(fashion))
    settle_data(args)
    data = build_data(args, 56)
    assert data.val.knows_objects
    strokes = build_data(options(), 32).val
    assert strokes.knows_objects and strokes.object_mass(7).shape == (8, 8)
    seen = next(data.val_batches()).images[0]
    image = np.asarray(data.val.load_image(0)).transpose(2, 0, 1) / 255
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert np.abs(seen.numpy() * std + mean - image).max() < 1e-5
    assert len(data.train) == 40 and len(data.val) == 20 and len(data.class_names) == 10

    cropped = options("--data-set", "CLUTTER", "--data-path", str(fashion), "--no-whole-images")
    settle_data(cropped)
    assert cropped.whole_images is False
    assert seen_region((56, 56), cropped, 56) != (0, 0, 56, 56)
    larger = options("--data-set", "CLUTTER", "--data-path", str(fashion), "--canvas", "64")
    assert build_data(larger, 64).val.load_image(0).size == (64, 64)
    other = options("--whole-images")
    settle_data(other)
    assert seen_region((100, 80), other, 64) == (0, 0, 100, 80)


@pytest.mark.parametrize(
    "value, words", [("55", "55 is not from 56 to 96"), ("97", "97"), ("x", "x")]
)
def test_canvas_sizes(value, words, capsys):
    with pytest.raises(SystemExit):
        options("--canvas", value)
    assert words in capsys.readouterr().err


def test_what_cannot_be_had(tmp_path):
    args = options("--data-set", "CLUTTER", "--data-path", str(tmp_path))
    with pytest.raises(UserError, match="^CLUTTER is made of Fashion-MNIST; FMNIST: no .*install"):
        build_data(args, 56)
    with pytest.raises(UsageError, match="--canvas is for --data-set CLUTTER, not DIGITS"):
        build_data(options("--canvas", "64"), 32)
    assert [row.name for row in datasets.DATA_SETS.values() if row.whole_images] == ["CLUTTER"]


@pytest.mark.skipif(
    not arrays.DEBIAN_FMNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_the_whole_set():
    assert len(clutter.clutter(None, "train")) == 60_000
    val = clutter.clutter(None, "val")
    assert len(val) == 2_000 and (np.bincount(val.labels) == 200).all()


class Known:
    """Two objects: one in the upper left quarter alone, one spread over the left half."""

    def object_mass(self, index):
        mass = np.zeros((40, 40), np.uint8)
        mass[: 20 if index == 0 else 40, :20] = 10
        return mass


def measured(kept, region=(0, 0, 40, 40), grid=(2, 2), images=None):
    model = SimpleNamespace(patch_embed=SimpleNamespace(grid=grid), pruning_layers=(1, 3))
    meter = ObjectMeter(model, images or Known(), lambda size: region, torch.device("cpu"))
    for index, stages in enumerate(kept):
        batch = Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.tensor([index]))
        meter.update(batch, SimpleNamespace(kept=[torch.tensor([stage]) for stage in stages]))
    return meter.compute(ALONE)["object"]


def test_what_is_kept_of_an_object():
    found = measured([[[0, 1, 3], [0]], [[0, 1, 2], [1]]])
    assert found["chance"] == pytest.approx(100 * 3 / 8)
    assert found["share"] == pytest.approx([100 * 3 / 6, 100 * 1 / 2])
    assert found["mass"] == pytest.approx([100 * (1 + 1) / 2, 100 * (1 + 0) / 2])


def test_the_object_is_measured_in_what_the_model_sees():
    """A crop whose four patches all lie on the second object."""
    found = measured([[[0], [0]], [[3], [3]]], region=(0, 0, 20, 20))
    assert found["chance"] == 100 and found["mass"] == pytest.approx([25, 25])


def test_an_object_is_one_for_small_patches_too():
    """Each of them has little of its mass."""
    kept = [[[0], [0]], [[1], [1]]]
    for grid in ((4, 4), (20, 20), (40, 40)):
        assert measured(kept, grid=grid)["chance"] == pytest.approx(100 * 3 / 8)


def test_a_region_may_end_within_a_pixel():
    """8 pixels, of which 7.45 are seen: the last row and column count."""

    class Corner:
        def object_mass(self, index):
            mass = np.zeros((8, 8), np.uint8)
            mass[7, 7] = 200
            return mass

    found = measured([[[3], [3]]], (0.44, 0.44, 7.45, 7.45), images=Corner())
    assert found["mass"] == [100, 100] and found["chance"] == 25


def test_a_part_of_the_set_knows_its_objects():
    images = canvases()
    part = SubsetImages(images, np.array([4, 7]))
    assert part.knows_objects and np.array_equal(part.object_mass(1), images.object_mass(7))


def test_a_selector_is_taught_and_measured(fashion, tmp_path, capsys):
    """main.py: a teacher, a distilled student; the report, the log, and what is recorded."""
    flags = f"""--data-set CLUTTER --data-path {fashion} --model vim_micro --input-size 56
        --model-kwargs patch_size=8 depth=3 embed_dim=32 --batch-size 10 --aa none --mixup 0
        --cutmix 0 --num-workers 0 --epochs 2 --throughput-seconds 0 --no-model-ema""".split()
    teacher = tmp_path / "dense"
    assert main([*flags, "--output_dir", str(teacher)]) == 0
    student = [
        *flags, "--method", "token", "--pruning-layers", "1", "--token-keep-ratio", "0.3",
        "--model-path", str(teacher / "best_checkpoint.pth"), "--token-strategy", "distilled",
        "--importance-every", "2", "--accum-steps", "2", "--batch-size", "4",
        "--output_dir", str(tmp_path / "student"),
    ]  # fmt: skip
    capsys.readouterr()
    assert main(student) == 0
    printed = capsys.readouterr().out
    assert "of these on the object: " in printed and "(of all patches " in printed
    report = json.loads((tmp_path / "student/eval.json").read_text())
    found = report["dynamic"]["object"]
    assert 0 <= found["share"][0] <= 100 and 10 < found["chance"] < 20
    assert "object" not in report["dense"]
    lines = [json.loads(line) for line in (tmp_path / "student/log.txt").open()]
    assert all(0.01 < line["train_selector"] < 10 for line in lines), "of taught steps alone"
    assert all(line["train_keep_stage1"] == pytest.approx(14 / 49) for line in lines)
    assert lines[-1]["test_object_share"] == pytest.approx(found["share"][0])
    assert math.isfinite(lines[-1]["test_object_mass"])
    # the checkpoint records what it is
    again = ["--eval", "--model-path", str(tmp_path / "student/best_checkpoint.pth")]
    again += ["--data-path", str(fashion), "--output_dir", str(tmp_path / "again")]
    assert main([*again, "--num-workers", "0", "--throughput-seconds", "0"]) == 0
    repeated = json.loads((tmp_path / "again/eval.json").read_text())
    assert repeated["dynamic"]["object"] == found
    assert repeated["dynamic"]["top1"] == report["dynamic"]["top1"]


def test_a_distilled_selector_needs_a_teacher(monkeypatch):
    import training

    model = SimpleNamespace(
        token_keep=(0.5,), reduction=SimpleNamespace(draws=False, taught=True), route_blocks=False
    )
    args = SimpleNamespace(token_pruning_weight=1.0, block_pruning_weight=1.0, block_keep_ratio=1)
    experiment = SimpleNamespace(args=args, task=None, spec=SimpleNamespace(dynamic=True))
    with pytest.raises(UsageError, match="distilled: a teacher says .* give --model-path"):
        training.build_objective(model, None, experiment)
