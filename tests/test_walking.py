"""What lies in folders beside the images and videos that are wanted: used, or named."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from helpers.data import make_folders, options, photo

from datasets import build_data
from loading.folders import find_images, image_folders
from loading.segmentation import mask_folders
from loading.video_sets import find_videos, list_videos, video_folders
from loading.walking import LeftOut, list_images, order_in_doubt
from tasks import CLASSIFICATION
from utils.distributed import Distributed
from utils.errors import UserError


@pytest.fixture
def root(tmp_path):
    return make_folders(tmp_path / "data", train=4, val=2)


def folder_data(root, *flags):
    return build_data(options("--data-set", "FOLDER", "--data-path", str(root), *flags), 32)


def test_hidden_files_and_folders_are_no_images(root, caplog):
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        shutil.copytree(root / "train" / "cat", root / "train" / name)
        shutil.copytree(root / "train" / "dog", root / "train" / "cat" / name)
    for name in ("._0.jpg", ".DS_Store", "Thumbs.db", "notes.txt"):
        (root / "val" / "cat" / name).write_bytes(b"\0\5\x16\7")
    with caplog.at_level("INFO"):
        data = folder_data(root)
    assert data.class_names == ["cat", "dog"] and np.bincount(data.train.labels).tolist() == [4, 4]
    assert len(data.val) == 4
    [record] = [record for record in caplog.records if "left out" in record.message]
    assert "train: left out: hidden files or folders: 6 (.ipynb_checkpoints, " in record.message
    assert record.levelname == "INFO"


def test_images_of_any_ending_are_read_or_counted(root, caplog):
    cat = root / "train" / "cat"
    (cat / "0.jpg").rename(cat / "0.JFIF")
    photo().save(cat / "still.gif")
    for number, name in enumerate(("1.avif", "2.heic", "3", "4.heic")):
        photo(seed=number).save(cat / name, "JPEG")
    photo().save(root / "train" / "stray.png")
    data = folder_data(root)
    assert np.bincount(data.train.labels).tolist() == [5, 4]
    assert "endings that are not read: 2 .heic, 1 " in caplog.text
    assert "files beside the class folders: 1 (stray.png)" in caplog.text
    for file in cat.iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(UserError, match="no images in class cat; files of .* not read: .* .heic"):
        folder_data(root)
    with pytest.raises(UserError, match="no images in this folder .*not read: .* .heic"):
        find_images([str(cat)])


def test_links_to_what_is_not_there(root, caplog):
    (root / "train" / "cat" / "more").symlink_to("/nowhere/more")
    assert len(folder_data(root).train) == 8
    assert "links to what is not there: 1 (cat/more)" in caplog.text
    shutil.rmtree(root / "val" / "dog")
    (root / "val" / "dog").symlink_to("/nowhere/dog")
    with pytest.raises(UserError, match="val/dog is a link to /nowhere/dog, which is not there"):
        folder_data(root)
    shutil.rmtree(root / "val")
    (root / "val").symlink_to("/nowhere/val")
    with pytest.raises(UserError, match="val is a link to /nowhere/val"):
        folder_data(root)


def test_a_folder_that_cannot_be_read_is_no_empty_one(root, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    (root / "train" / "cat" / "more").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    for closed in ("train/cat/more", "train"):
        with pytest.raises(UserError, match=f"{closed}: cannot be read .Permission denied"):
            folder_data(root)


def test_folders_at_another_level_than_the_classes(tmp_path, root, caplog):
    for split in ("train", "val"):
        (tmp_path / "deep" / split).mkdir(parents=True)
        shutil.copytree(root / split, tmp_path / "deep" / split / "images")
        for part in ("one", "two"):
            shutil.copytree(root / split, tmp_path / "parts" / split / part)
    args = options("--data-set", "FOLDER", "--data-path", str(tmp_path / "deep"))
    for train in (True, False):
        with pytest.raises(UserError, match=r"one class only, 'images', .* folders in it .cat, d"):
            CLASSIFICATION.data(args, 32, Distributed(torch.device("cpu")), train)
    assert folder_data(tmp_path / "parts").class_names == ["one", "two"]
    assert "train: each of the 2 class folders holds folders called cat, dog" in caplog.text
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    photo().save(root / "train" / "1.jpg")
    with pytest.raises(UserError, match="no class folders in it, but 1 files"):
        folder_data(root)


def test_the_order_of_numbers_is_told(tmp_path, caplog):
    make_folders(tmp_path, [str(number) for number in range(1, 12)], train=1, val=1)
    with caplog.at_level("INFO"):
        assert image_folders(tmp_path, "train").classes[:3] == ["1", "10", "11"]
    assert "in the order of text, not of numbers: 1, 10, 11, 2, ..." in caplog.text
    assert order_in_doubt(["class 1", "class 10", "class 2"]).startswith("class 1, class 10")
    for names in (["01", "02", "10"], ["cat", "dog"], ["0", "1", "2"], ["a1", "b0"], []):
        assert order_in_doubt(names) is None


def test_two_unicode_forms_of_a_name_are_one(tmp_path):
    composed, split = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    root = make_folders(tmp_path, (composed, "dog"))
    (root / "val" / composed).rename(root / "val" / split)
    assert folder_data(root).num_classes == 2
    shutil.copytree(root / "val" / split, root / "val" / composed)
    with pytest.raises(UserError, match=r"'cafe\\u0301' and 'caf\\xe9' are two Unicode forms"):
        folder_data(root)
    shutil.rmtree(root / "val" / composed)
    (root / "val" / split).rename(root / "val" / "ca\uff46\u00e9")  # a full-width f
    with pytest.raises(UserError, match=r"only val has 'ca\\uff46\\xe9'; two Unicode forms"):
        folder_data(root)
    for folder in ("images", "masks"):
        (tmp_path / "seg" / folder / "train").mkdir(parents=True)
    photo().save(tmp_path / "seg" / "images" / "train" / f"{composed}.png")
    mask = photo().convert("L").point(lambda value: value % 2)
    mask.save(tmp_path / "seg" / "masks" / "train" / f"{split}.png")
    assert len(mask_folders(tmp_path / "seg", "train")) == 1


@pytest.mark.parametrize("subset, empty", [("2", "1 of 3 classes: label 2 .owl"), ("3", None)])
def test_a_subset_that_empties_a_class_is_told(tmp_path, caplog, subset, empty):
    make_folders(tmp_path, ("cat", "dog", "owl"))
    flags = ["--subset", subset, "--batch-size", "2", "--no-repeated-aug"]
    folder_data(tmp_path, *flags)
    assert ("no training image of" in caplog.text) == (empty is not None)
    if empty:
        assert "--subset 2 leaves 2 images: no training image of 1 of 3 classes" in caplog.text


def test_videos_are_found_as_images_are(video_root, tmp_path, caplog):
    for split in ("train", "val"):
        shutil.copytree(video_root / split, tmp_path / split)
    left = tmp_path / "train" / "left"
    shutil.copytree(left, tmp_path / "train" / ".trash")
    (left / "more").mkdir()
    (left / "b.mp4").rename(left / "more" / "b.mp4")
    photo().save(left / "more" / "thumbnail.jpg")
    photo().save(tmp_path / "train" / "right" / "shots" / "._img_00000.png")
    (left / "c.rmvb").touch()
    (left / "gone").symlink_to("/nowhere")
    videos = video_folders(tmp_path, "train")
    names = [videos.describe(index).split("train/")[1] for index in range(len(videos))]
    assert names == ["left/a.avi", "left/more/b.mp4", "right/b.mp4", "right/shots"]
    assert len(videos.load(3).image) == 6
    for part in ("hidden files or folders: 1 (.trash)", "1 .rmvb", "1 .jpg", "1 (left/gone)"):
        assert part in caplog.text
    assert len(find_videos([str(left)])) == 2
    (tmp_path / "val" / "left" / "a.avi").unlink()
    (tmp_path / "val" / "left" / "b.mp4").rename(tmp_path / "val" / "left" / "b.rmvb")
    with pytest.raises(UserError, match="no videos in class left; .* not read: 1 .rmvb"):
        video_folders(tmp_path, "val")


def test_each_folder_comes_once(root):
    (root / "train" / "cat" / "again").symlink_to(root / "train" / "cat")
    assert len(list_images(root / "train", LeftOut())) == 8
    assert list_videos(root / "train") == [str(root / "train" / name) for name in ("cat", "dog")]
