"""Named data sets, their flags, and the one line that each mistake gets."""

import json
import os
import pickle
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.data import make_folders, options, photo, write_idx
from torchvision.datasets import CIFAR10, FashionMNIST, ImageFolder

import datasets
from datasets import build_data
from loading import arrays
from loading.images import stratified_choice
from loading.transforms import train_transform
from utils.errors import UsageError, UserError
from utils.seeding import random_state


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and 20 < len(text) < 400
    return text


def test_digits_are_split_evenly_and_always_the_same():
    data = build_data(options(), 32)
    assert (len(data.train), len(data.val), data.num_val, data.num_classes) == (1437, 360, 360, 10)
    assert np.bincount(data.val.labels).min() >= 35 and np.bincount(data.val.labels).max() <= 37
    assert data.val.labels[:12].tolist() == build_data(options(seed=5), 32).val.labels[:12].tolist()
    together = {data.train.load(i).image.tobytes() for i in range(1437)} | {
        data.val.load(i).image.tobytes() for i in range(360)
    }
    assert len(together) == 1797
    images, targets, indices = next(data.val_batches())
    assert (
        images.shape == (4, 3, 32, 32)
        and images.dtype == torch.float32
        and targets.dtype == torch.int64
    )
    assert data.describe(indices, "val")[1] == "DIGITS val image 1"


@pytest.mark.parametrize("folder, ending", [("", ".gz"), ("FashionMNIST/raw", ""), ("raw", ".gz")])
def test_fashion_mnist_is_found_in_either_layout(tmp_path, folder, ending):
    target = tmp_path / folder
    target.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(0).randint(0, 256, (30, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(target / f"{prefix}-images-idx3-ubyte{ending}", pixels)
        write_idx(
            target / f"{prefix}-labels-idx1-ubyte{ending}", np.arange(30, dtype=np.uint8) % 10
        )
    data = build_data(options("--data-set", "FMNIST", "--data-path", str(tmp_path)), 32)
    assert (len(data.train), len(data.val), data.class_names) == (30, 30, FashionMNIST.classes)
    assert np.array_equal(
        np.asarray(data.train.load(7).image), np.repeat(pixels[7][..., None], 3, axis=2)
    )

    file = target / f"train-images-idx3-ubyte{ending}"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole idx file") as error:
        build_data(options("--data-set", "FMNIST", "--data-path", str(tmp_path)), 32)
    assert str(file) in one_line(error)


@pytest.mark.skipif(
    not arrays.DEBIAN_FMNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_of_debian():
    data = build_data(options("--data-set", "FMNIST"), 28)
    assert (len(data.train), len(data.val), data.num_classes) == (60_000, 10_000, 10)
    assert np.bincount(data.val.labels).tolist() == [1000] * 10


def test_an_error_without_words_is_told_by_its_type(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "__init__", mock.Mock(side_effect=EOFError()))
    with pytest.raises(
        UserError, match=r"CIFAR10: not found or damaged in .* \(EOFError\); unpack"
    ) as error:
        build_data(options("--data-set", "CIFAR10", "--data-path", str(tmp_path)), 32)
    one_line(error)


def test_cifar_is_read_but_never_fetched(tmp_path, monkeypatch):
    flags = options("--data-set", "CIFAR10", "--data-path", str(tmp_path))
    with pytest.raises(
        UserError, match="CIFAR10: not found or damaged .* cifar-10-batches-py/"
    ) as error:
        build_data(flags, 32)
    one_line(error)

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (20, 3072), dtype=np.uint8)
    names = [f"class {label}" for label in range(10)]
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(
            pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(20)]})
        )
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None}
    )
    data = build_data(flags, 32)
    assert (len(data.train), len(data.val), data.class_names) == (20, 20, names)
    assert np.array_equal(np.asarray(data.val.load(3).image)[..., 1].ravel(), pixels[3, 1024:2048])


@pytest.mark.parametrize("name", ["FOLDER", "IMNET", "IMNET_100", "INAT"])
def test_folders_agree_with_torchvision(tmp_path, name):
    make_folders(tmp_path, classes=("b", "a", "狗"), train=4, val=2)
    nested = tmp_path / "train" / "b" / "more"
    nested.mkdir()
    photo().save(nested / "deep.PNG")
    data = build_data(options("--data-set", name, "--data-path", str(tmp_path)), 32)
    for split, images in (("train", data.train), ("val", data.val)):
        expected = ImageFolder(tmp_path / split)
        assert data.class_names == expected.classes
        assert images.labels.tolist() == expected.targets
        assert [images.describe(i) for i in range(len(images))] == [
            path for path, _ in expected.samples
        ]
        assert np.array_equal(np.asarray(images.load(3).image), np.asarray(expected[3][0]))


def test_links_are_followed_and_a_circle_of_links_ends(tmp_path):
    make_folders(tmp_path / "a")
    data_folder = tmp_path / "b"
    shutil.copytree(tmp_path / "a" / "val", data_folder / "val")
    (data_folder / "train").mkdir()
    for name in ("cat", "dog"):
        (data_folder / "train" / name).symlink_to(tmp_path / "a" / "train" / name)
    for name in ("up", "again"):
        (tmp_path / "a" / "train" / "cat" / name).symlink_to(tmp_path / "a" / "train" / "cat")
    (tmp_path / "a" / "train" / "dog" / "copy.jpg").symlink_to(
        tmp_path / "a" / "train" / "cat" / "0.jpg"
    )
    data = build_data(options("--data-set", "FOLDER", "--data-path", str(data_folder)), 32)
    assert np.bincount(data.train.labels).tolist() == [8, 9]
    assert all(data.train.load(i).image.size == (40, 30) for i in range(17))


def test_names_in_any_alphabet_and_undecodable_ones(tmp_path):
    make_folders(tmp_path, classes=("кошка", "犬 🐕"))
    folder = os.fsencode(tmp_path / "train" / "кошка")
    for name in (b"\xff\xfe.jpg", "žluťoučký.jpg".encode(), b"line\nbreak.jpg"):
        shutil.copy(folder + b"/0.jpg", folder + b"/" + name)
    data = build_data(options("--data-set", "FOLDER", "--data-path", str(tmp_path)), 32)
    assert data.class_names == ["кошка", "犬 🐕"] and np.bincount(data.train.labels).tolist() == [
        11,
        8,
    ]
    names = "\n".join(data.describe(range(len(data.train)))).encode().decode()
    assert len(names.splitlines()) == 19 and "žluťoučký.jpg" in names
    assert "line\\nbreak.jpg" in names and "\\udcff\\udcfe.jpg" in names
    assert all(data.train.load(i).image for i in range(len(data.train)))


@pytest.mark.parametrize("super_category", [True, False])
def test_inaturalist_of_deit(tmp_path, super_category):
    """Classes count in the order of the training annotations, whether or not the files lie below
    super-categories.
    """
    for split, categories in (("train", [7, 3, 7, 5]), ("val", [5, 3])):
        images, annotations = [], []
        for number, category in enumerate(categories):
            name = f"train_val2018/Aves/{category}/{split}{number}.jpg"
            file = tmp_path / (name if super_category else name.replace("Aves/", ""))
            file.parent.mkdir(parents=True, exist_ok=True)
            photo(seed=number).save(file)
            images.append({"id": number, "file_name": name})
            annotations.append({"image_id": number, "category_id": category})
        categories = [{"id": category, "name": f"bird {category}"} for category in (3, 5, 7)]
        listing = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{split}2018.json").write_text(json.dumps(listing))
    data = build_data(options("--data-set", "INAT", "--data-path", str(tmp_path)), 32)
    assert data.class_names == ["bird 7", "bird 3", "bird 5"]
    assert (data.train.labels.tolist(), data.val.labels.tolist()) == ([0, 1, 0, 2], [2, 1])
    assert all(data.train.load(i).image.size == (40, 30) for i in range(4))
    with pytest.raises(UserError, match="no folder train/"):
        build_data(options("--data-set", "INAT19", "--data-path", str(tmp_path)), 32)
    for content, message in (
        ('{"images": 3', "cannot be read as JSON"),
        ("[1, 2]", "at odds with train2018.json"),
        (
            '{"images": [], "annotations": [{"image_id": 9, "category_id": 7}]}',
            r"\(KeyError\(9\)\)",
        ),
        ('{"images": [], "annotations": []}', "it lists no images"),
    ):
        (tmp_path / "val2018.json").write_text(content)
        with pytest.raises(UserError, match=f"val2018.json: .*{message}"):
            build_data(options("--data-set", "INAT", "--data-path", str(tmp_path)), 32)


def remove_val(root):
    shutil.rmtree(root / "val")


def remove_class(root):
    shutil.rmtree(root / "val" / "dog")


def add_class(root):
    shutil.copytree(root / "val" / "dog", root / "val" / "zebra")


def empty_class(root):
    for file in (root / "train" / "dog").iterdir():
        file.rename(file.with_suffix(".txt"))


def empty_split(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "--data-path .*: no such folder"),
        (remove_val, r"no folder val/ in it \(there is train/\)"),
        (remove_class, r"train \(2\) and val \(1\) differ: only train has dog"),
        (add_class, r"train \(2\) and val \(3\) differ: only val has zebra"),
        (empty_class, "train: no images in class dog"),
        (empty_split, "train: no class folders in it"),
    ],
)
def test_mistaken_folders_get_one_line(tmp_path, damage, message):
    root = make_folders(tmp_path / "data")
    damage(root)
    with pytest.raises(UserError, match=message) as error:
        build_data(options("--data-set", "FOLDER", "--data-path", str(root)), 32)
    assert error.value.exit_code == 1 and "data" in one_line(error)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--data-set", "IMAGENET"), "'IMAGENET' is unknown; known are DIGITS, FMNIST, .*wds/"),
        (("--data-set", "IMNET"), "IMNET needs --data-path: a folder with train/ and val/"),
        (("--data-set", "wds/x"), "needs --data-path: the folder of the shards"),
        (("--subset", "5000"), "--subset 5000: the training set has 1437 images only"),
        (("--aa", "rand-m9-z3"), "--aa 'rand-m9-z3' is not a policy that timm knows"),
        (("--aa", "nonsense"), "--aa 'nonsense' is not a policy that timm knows"),
    ],
)
def test_mistaken_flags_get_one_line(flags, message):
    with pytest.raises(UsageError, match=message) as error:
        build_data(options(*flags), 32)
    assert error.value.exit_code == 2
    one_line(error)


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch-size", "0"),
        ("--num-workers", "-1"),
        ("--subset", "0"),
        ("--subset", "1.5"),
        ("--eval-crop-ratio", "0"),
        ("--hflip", "two"),
        ("--bad-images", "ignore"),
        ("--reprob", "nan"),
    ],
)
def test_flag_values_are_checked(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        options(*flags)
    assert stop.value.code == 2 and f"argument {flags[0]}" in capsys.readouterr().err


def test_flags_have_deits_defaults():
    args = datasets.argparse.ArgumentParser()
    datasets.add_data_arguments(args)
    datasets.add_augmentation_arguments(args)
    args = args.parse_args([])
    assert (args.data_set, args.batch_size, args.input_size, args.subset) == (
        "DIGITS",
        64,
        None,
        None,
    )
    assert (
        args.num_workers == min(4, len(os.sched_getaffinity(0)))
        and args.pin_mem
        and args.repeated_aug
    )
    assert (args.color_jitter, args.aa, args.train_interpolation) == (
        0.3,
        "rand-m9-mstd0.5-inc1",
        "bicubic",
    )
    assert (args.reprob, args.remode, args.recount, args.eval_crop_ratio) == (
        0.25,
        "pixel",
        1,
        0.875,
    )


def test_subset_is_stratified_and_fixed():
    tenth = build_data(options("--subset", "0.1"), 32).train
    assert len(tenth) == 144 and np.bincount(tenth.labels).min() >= 14
    assert (
        tenth.indices.tolist()
        == build_data(options("--subset", "144", seed=9), 32).train.indices.tolist()
    )
    assert len(build_data(options("--subset", "1.0"), 32).train) == 1437
    targets = np.repeat([0, 1, 2], [70, 20, 10])
    chosen = stratified_choice(targets, 20)
    assert np.bincount(targets[chosen]).tolist() == [14, 4, 2] and len(set(chosen)) == 20


def test_a_set_smaller_than_a_batch_is_refused(tmp_path):
    make_folders(tmp_path, train=3)
    flags = ("--data-set", "FOLDER", "--data-path", str(tmp_path), "--no-repeated-aug")
    assert build_data(options(*flags), 32).steps_per_epoch == 1
    with pytest.raises(
        UserError, match="has 6 images, less than one batch of 8: give a smaller --batch-size"
    ):
        build_data(options(*flags, "--batch-size", "8"), 32)
    with pytest.raises(UserError, match="less than one batch of 4 on each of 2 processes"):
        build_data(options(*flags), 32, rank=1, world_size=2)


def test_evaluation_needs_no_training_images(tmp_path):
    shutil.rmtree(make_folders(tmp_path) / "train")
    data = build_data(
        options("--data-set", "FOLDER", "--data-path", str(tmp_path)), 32, train=False
    )
    assert data.train is None and data.num_classes == 2
    assert sum(len(batch.targets) for batch in data.val_batches()) == 6


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n3-mstd1-inc1", "v0", "augmix-m3-w3"]
)
def test_policies_survive_their_strongest_draws(policy):
    """Posterize with 0 bits, which Pillow 13 refuses, gives the black image that it used to be."""
    transform = train_transform(options("--aa", policy, "--reprob", "0"), 32)
    for seed in range(600):
        with random_state(seed):
            assert transform(photo()).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [32, 48])
def test_transforms_crop_as_deit_does(tmp_path, size):
    """Up to 32 pixels the whole image is seen; above, the centre of an image resized to size / crop
    ratio.
    """
    root = make_folders(tmp_path)
    data = build_data(options("--data-set", "FOLDER", "--data-path", str(root)), size)
    image = data.val.load(0).image
    if size == 32:
        expected = image.resize((32, 32), 3)
    else:
        expected = image.resize((54 * 40 // 30, 54), 3).crop((12, 3, 60, 51))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.from_numpy(np.array(expected)) / 255 - mean) / std
    torch.testing.assert_close(next(data.val_batches()).images[0], expected.permute(2, 0, 1))

    plain = (
        "--aa",
        "none",
        "--color-jitter",
        "0",
        "--reprob",
        "0",
        "--hflip",
        "0",
        "--no-repeated-aug",
    )
    padding = ("--crop-padding", "0") if size == 32 else ()
    data = build_data(
        options("--data-set", "FOLDER", "--data-path", str(root), *plain, *padding), size
    )
    first = next(data.train_batches(0))
    whole = (
        torch.from_numpy(np.array(data.train.load(first.indices[0]).image.resize((32, 32), 3)))
        / 255
    )
    assert first.images.shape == (4, 3, size, size)
    same = size == 32 and torch.allclose(
        first.images[0], ((whole - mean) / std).permute(2, 0, 1), atol=1e-6
    )
    assert same == (size == 32)
