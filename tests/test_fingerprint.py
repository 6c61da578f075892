"""Fingerprints of data sets: the same for a copy, another one for anything that alters a result."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.data import make_folders, photo

from loading.arrays import digits
from loading.fingerprint import fingerprints
from loading.folders import image_folders
from loading.images import ImageSet, LabelledImages, fixed_part
from loading.segmentation import mask_folders


def of(train: ImageSet | None, val: ImageSet | None, path=None) -> dict[str, str]:
    loaders = {"train_loader": object(), "val_loader": object()}
    return fingerprints(SimpleNamespace(train=train, val=val, **loaders), path)


def of_folders(root):
    return of(image_folders(root, "train"), image_folders(root, "val"))


def test_a_copy_is_the_same_and_a_changed_image_is_not(tmp_path):
    one = make_folders(tmp_path / "one")
    before = of_folders(one)
    two = shutil.copytree(one, tmp_path / "two")
    assert of_folders(two) == before and before["train"] != before["val"]
    photo(seed=77).save(two / "val" / "cat" / "1.jpg")
    after = of_folders(two)
    assert after["train"] == before["train"] and after["val"] != before["val"]
    shutil.copy(one / "val" / "cat" / "1.jpg", two / "val" / "cat")
    assert of_folders(two) == before
    (two / "val" / "cat" / "1.jpg").rename(two / "val" / "dog" / "9.jpg")
    assert of_folders(two)["val"] != before["val"]


def test_an_image_of_many_is_noticed_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr("loading.fingerprint.READ", 2)
    root = make_folders(tmp_path)
    before = of_folders(root)
    for number in range(8):
        path = root / "train" / "cat" / f"{number}.jpg"
        content = path.read_bytes()
        path.write_bytes(content + b"0")
        assert of_folders(root)["train"] != before["train"]
        path.write_bytes(content)


def test_images_in_memory():
    train, val = digits(None, "train"), digits(None, "val")
    before = of(train, val)
    assert of(fixed_part(train, 50), val)["train"] != before["train"]
    val.pixels = val.pixels.copy()
    val.pixels[100, 3, 3] ^= 1
    after = of(train, val)
    assert after["train"] == before["train"] and after["val"] != before["val"]


def test_label_maps(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for kind, picture in (("images", photo()), ("masks", Image.new("L", (40, 30), 1))):
            (tmp_path / kind / split).mkdir(parents=True)
            picture.save(tmp_path / kind / split / "0.png")
    (tmp_path / "classes.txt").write_text("sky\nearth\nsea\n")

    def found():
        return of(mask_folders(tmp_path, "train"), mask_folders(tmp_path, "val"))

    before = found()
    Image.new("L", (40, 30), 2).save(tmp_path / "masks" / "val" / "0.png")
    assert found()["train"] == before["train"] and found()["val"] != before["val"]


def test_streams_and_readers(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"one")
    before = of(None, None, str(tmp_path))
    (tmp_path / "a.tar").write_bytes(b"two")
    assert of(None, None, str(tmp_path))["val"] != before["val"]

    class Behind(LabelledImages):
        def load_image(self, index):
            return np.full((2, 2, 3), index + self.first)

    one, other = Behind([0, 1], ["a", "b"]), Behind([0, 1], ["a", "b"])
    one.first, other.first = 0, 1
    assert of(one, one)["val"] != of(other, other)["val"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_that_was_not_read_is_left_out(split):
    loaders = {"train_loader": object(), "val_loader": object(), f"{split}_loader": None}
    data = SimpleNamespace(train=None, val=None, **loaders)
    assert fingerprints(data, None).keys() == {"train", "val"} - {split}
