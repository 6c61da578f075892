"""Data sets that timm reads: real WebDataset shards, and stand-ins for the packages that are not
installed.
"""

import io
import json
import logging
import sys
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from helpers.data import options, photo
from PIL import Image

from datasets import build_data
from loading import readers
from loading.transforms import Transforms
from utils.errors import UsageError, UserError


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    photo(seed=number).save(buffer, format="JPEG")
    return buffer.getvalue()


def make_shards(root, train: int = 24, val: int = 10, damaged=()):
    """train-0..2.tar and val-0..1.tar, images numbered from 0 in each split, of three classes in
    turn.
    """
    root.mkdir(exist_ok=True)
    for split, count, size in (("train", train, 8), ("val", val, 5)):
        with webdataset.ShardWriter(
            str(root / f"{split}-%d.tar"), maxcount=size, verbose=0
        ) as shards:
            for number in range(count):
                content = jpeg(number)[:200] if (split, number) in damaged else jpeg(number)
                shards.write({"__key__": f"{number:05d}", "jpg": content, "cls": number % 3})
    return root


def shard_options(root, *flags: str):
    splits = ("--train-split", "train-{0..2}.tar|24", "--val-split", "val-{0..1}.tar|10")
    return options(
        "--data-set", "wds/photos", "--data-path", str(root), "--num-workers", "2", *splits, *flags
    )


def fingerprint(batches) -> list[tuple[float, int]]:
    """The mean and the label of each image: enough to tell the images of these tests apart."""
    return [
        (round(float(image.mean()), 4), int(label))
        for batch in batches
        for image, label in zip(batch.images, batch.targets, strict=True)
    ]


def test_shards_give_whole_epochs_from_any_step(tmp_path):
    root = make_shards(tmp_path)
    data = build_data(shard_options(root), 32)
    assert (data.class_names, data.steps_per_epoch, data.num_val) == (["0", "1", "2"], 6, 10)
    epochs = [list(data.train_batches(epoch)) for epoch in (0, 1)]
    assert [len(epoch) for epoch in epochs] == [6, 6]
    assert all(batch.images.shape == (4, 3, 32, 32) for epoch in epochs for batch in epoch)
    assert fingerprint(epochs[0]) != fingerprint(epochs[1])
    assert data.describe(epochs[0][0].indices)[0] == "streamed image"
    resumed = build_data(shard_options(root), 32)
    continued = list(resumed.train_batches(1, start_step=4))
    assert len(continued) == 2
    assert all(
        torch.equal(a.images, b.images) for a, b in zip(continued, epochs[1][4:], strict=True)
    )
    with pytest.raises(ValueError, match="start_step 7"):
        next(data.train_batches(0, 7))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_evaluate_every_image_of_the_shards_once(tmp_path, world_size):
    root = make_shards(tmp_path)
    ranks = [
        build_data(shard_options(root), 32, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    found = [fingerprint(data.val_batches()) for data in ranks]
    assert max(len(one) for one in found) - min(len(one) for one in found) <= 2
    everything = sorted(sum(found, []))
    assert len(set(everything)) == 10
    assert everything == sorted(fingerprint(build_data(shard_options(root), 32).val_batches()))


def test_ranks_train_on_different_shards(tmp_path):
    root = make_shards(tmp_path)
    plain = (
        "--aa",
        "none",
        "--color-jitter",
        "0",
        "--reprob",
        "0",
        "--hflip",
        "0",
        "--crop-padding",
        "0",
    )
    seen = []
    for rank in range(3):
        data = build_data(shard_options(root, *plain), 32, rank=rank, world_size=3)
        assert data.steps_per_epoch == 2
        seen.append(set(fingerprint(data.train_batches(0))))
    assert len(set.union(*seen)) == sum(map(len, seen)) == 24
    with pytest.raises(UserError, match="wds/photos: 3 shards are too few for 4 processes"):
        build_data(shard_options(root), 32, rank=0, world_size=4)


def test_damaged_images_in_shards(tmp_path, capfd):
    root = make_shards(tmp_path, damaged=[("train", 3), ("val", 7)])
    data = build_data(shard_options(root), 32)
    message = r"wds/photos, worker \d, after \d+ images: OSError\('Truncated File Read'\)\. "
    for batches in (data.train_batches(0), data.val_batches()):
        with pytest.raises(UserError, match=message) as error:
            list(batches)
        assert "\n" not in str(error.value)
    data = build_data(shard_options(root, "--bad-images", "skip"), 32)
    assert len(list(data.train_batches(0))) == 6
    assert sum(len(batch.targets) for batch in data.val_batches()) == 9
    assert len(data.bad_images.found) >= 2
    assert "Traceback" not in capfd.readouterr().err
    assert not logging.getLogger("timm.data.readers.reader_wds").handlers


def test_a_damaged_shard_is_told(tmp_path):
    root = make_shards(tmp_path)
    (root / "_info.json").write_text(json.dumps({"num_classes": 3}))
    shard = root / "val-1.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    data = build_data(shard_options(root), 32)
    with pytest.raises(UserError, match="wds/photos, worker 1, after .*val-1.tar"):
        list(data.val_batches())
    for name in ("train-0.tar", "train-1.tar", "train-2.tar"):
        (root / name).write_bytes(b"")
    data = build_data(shard_options(root, "--bad-images", "skip"), 32)
    with pytest.raises(UserError, match="wds/photos: the stream ended after 0 of 6 steps"):
        list(data.train_batches(0))


def named_shard(file, ending: str, labels, content: bytes | None = None):
    """A shard of KEY.ending and KEY.cls for each label."""
    with tarfile.open(file, "w") as archive:
        for number, label in enumerate(labels):
            for name, data in ((ending, content or jpeg(number)), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{number:05d}.{name}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def one_shard_options(root, *flags: str, count: int = 8):
    splits = ("--train-split", f"t.tar|{count}", "--val-split", f"v.tar|{count}")
    return options("--data-set", "wds/x", "--data-path", str(root), *splits, *flags)


@pytest.mark.parametrize("ending", ["jpeg", "JPEG", "jfif", "webp"])
def test_images_in_shards_may_have_any_ending(tmp_path, ending):
    for name in ("t.tar", "v.tar"):
        named_shard(tmp_path / name, ending, [0, 1] * 4)
    data = build_data(one_shard_options(tmp_path), 32)
    assert sum(len(batch.images) for batch in data.val_batches()) == 8
    for name in ("t.tar", "v.tar"):
        named_shard(tmp_path / name, "avif", [0, 1] * 4)
    with pytest.raises(UserError, match=r"v.tar: no images .* end in .avif, .cls; read are"):
        build_data(one_shard_options(tmp_path), 32)


def test_labels_that_begin_at_one_are_told(tmp_path, caplog):
    for name in ("t.tar", "v.tar"):
        named_shard(tmp_path / name, "jpg", [1, 2, 3, 3])
    data = build_data(one_shard_options(tmp_path, count=4), 32)
    assert data.class_names == ["0", "1", "2", "3"]
    assert "wds/x: no training image of 1 of 4 classes: label 0 (0); do the labels" in caplog.text


def test_depth_of_images_in_shards(tmp_path):
    content = io.BytesIO()
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values).save(content, "PNG")
    for name in ("t.tar", "v.tar"):
        named_shard(tmp_path / name, "png", [0, 1] * 4, content.getvalue())
    data = build_data(one_shard_options(tmp_path, "--bit-depth", "12"), 64)
    assert next(data.val_batches()).images.max() > 2  # white, normalised
    with pytest.raises(UserError, match="up to 4095 only, .* give --bit-depth 12, or 16"):
        list(build_data(one_shard_options(tmp_path), 64).val_batches())


def test_splits_and_classes_from_the_info_file(tmp_path):
    root = make_shards(tmp_path)
    train = {
        "num_samples": 24,
        "filenames": [f"train-{i}.tar" for i in range(3)],
        "shard_lengths": [8, 8, 8],
    }
    val = {
        "num_samples": 10,
        "filenames": [f"val-{i}.tar" for i in range(2)],
        "shard_lengths": [5, 5],
    }
    splits = {"train": {"name": "train", **train}, "validation": {"name": "validation", **val}}
    (root / "_info.json").write_text(
        json.dumps({"splits": splits, "class_names": ["a", "b", "c", "d"]})
    )
    flags = ("--data-set", "wds/photos", "--data-path", str(root))
    data = build_data(options(*flags), 32)
    assert (data.class_names, data.num_val, data.steps_per_epoch) == (["a", "b", "c", "d"], 10, 6)
    assert (
        sum(
            len(batch.targets)
            for batch in build_data(options(*flags), 32, train=False).val_batches()
        )
        == 10
    )
    (root / "_info.json").write_text(json.dumps({"splits": splits, "num_classes": 2}))
    with pytest.raises(UserError, match="wds/photos: label 2 is outside the 2 classes"):
        list(build_data(options(*flags), 32).val_batches())


def test_mistakes_with_shards_get_one_line(tmp_path):
    root = make_shards(tmp_path / "shards")
    for error_type, flags, message in (
        (UsageError, ("--subset", "8"), "--subset: wds/photos is read as a stream"),
        (UserError, ("--data-path", str(tmp_path / "no")), "no: no such folder"),
        (
            UserError,
            ("--val-split", "validation"),
            "wds/photos: split 'validation' cannot be opened: .*not found",
        ),
        (
            UserError,
            ("--train-split", "train-{0..2}.tar"),
            "cannot be opened: .*num_samples not specified",
        ),
        (UserError, ("--val-split", "val-{0..9}.tar|50"), "wds/photos: no shard val-2.tar in "),
    ):
        with pytest.raises(error_type, match=message) as error:
            build_data(shard_options(root, *flags), 32)
        assert "\n" not in str(error.value)
    (root / "train-0.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(
        UserError, match="train-0.tar: cannot read the labels .* num_classes into _info.json"
    ):
        build_data(shard_options(root), 32)


def test_a_package_that_is_missing_is_named(monkeypatch):
    own = sys.modules["datasets"]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    with pytest.raises(
        UserError, match="--data-set hfds/x needs Hugging Face's package: pip install datasets"
    ):
        build_data(options("--data-set", "hfds/x"), 32)
    assert sys.modules["datasets"] is own
    with pytest.raises(
        UserError, match="--data-set tfds/x needs a package that is not installed: .*tensorflow"
    ):
        build_data(options("--data-set", "tfds/x"), 32)


def test_a_task_transforms_the_labels_of_a_stream_too(tmp_path):
    def one_hot(image, label):
        return torch.full((3, 2, 2), float(label)), torch.eye(3)[label]

    root, transforms = make_shards(tmp_path), Transforms(one_hot, one_hot)
    data = build_data(shard_options(root), 32, transforms=transforms, eval_batch_size=2)
    trained, evaluated = list(data.train_batches(0)), list(data.val_batches())
    assert {len(batch.targets) for batch in trained} == {4} and len(trained) == 6
    assert sorted(len(batch.targets) for batch in evaluated) == [1, 1, 2, 2, 2, 2]
    for batch in trained + evaluated:
        assert torch.equal(batch.targets.argmax(dim=1).float(), batch.images[:, 0, 0, 0])


def test_random_access_readers_are_used_like_folders(monkeypatch):
    """A stand-in for timm's Hugging Face reader, which needs a package that is not among the
    requirements.
    """

    class Reader:
        class_to_idx = {"cat": 1, "ant": 0}

        def __getitem__(self, index):
            return io.BytesIO(b"nothing" if index == 5 else jpeg(index)), index % 2

        def iter_targets(self):
            return iter([index % 2 for index in range(12)])

    monkeypatch.setattr(readers, "_open", lambda args, split, training: Reader())
    args = options("--data-set", "hfds/stub", "--bad-images", "skip", "--no-repeated-aug")
    data = build_data(args, 32)
    assert data.class_names == ["ant", "cat"] and np.bincount(data.train.labels).tolist() == [6, 6]
    seen = torch.cat([batch.indices for batch in data.train_batches(0)])
    assert torch.bincount(seen).tolist() == [1, 1, 1, 1, 1, 0, 2, 1, 1, 1, 1, 1]
    assert list(data.bad_images.found) == ["hfds/stub train image 5"]
