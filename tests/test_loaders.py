"""Batches: exactly repeatable from any step, every validation image once, bad images by rule."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import make_folders, options, photo

import datasets
from datasets import build_data
from loading.images import BadImageError, ImageSet
from loading.loaders import MAX_REPLACEMENTS, worker_died
from loading.samplers import EvalBatchSampler, TrainBatchSampler
from utils.errors import UserError


@pytest.fixture(autouse=True)
def stop_workers(monkeypatch):
    """Ends the workers of a test after it. Left to the collector of cycles, torch waits 5 s for
    each of them.
    """
    built = []

    def build_and_remember(*args, **options):
        built.append(datasets.build_data(*args, **options))
        return built[-1]

    monkeypatch.setitem(globals(), "build_data", build_and_remember)
    yield
    for data in built:
        data.train_loader.loader._iterator = data.val_loader.loader._iterator = None


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "flags", [(), ("--no-repeated-aug", "--aa", "none", "--color-jitter", "0.4")]
)
def test_an_epoch_can_start_anywhere_with_any_number_of_workers(flags):
    def data(workers):
        return build_data(
            options("--batch-size", "16", "--subset", "96", "--num-workers", workers, *flags), 32
        )

    undisturbed = data("0")
    epochs = [list(undisturbed.train_batches(epoch)) for epoch in (0, 1)]
    steps = undisturbed.steps_per_epoch
    assert len(epochs[0]) == len(epochs[1]) == steps == 6
    assert not same(epochs[0][0], epochs[1][0]) and not same(epochs[0][0], epochs[0][1])
    for workers, start in (("0", 5), ("1", 2), ("2", 0), ("2", 4)):
        resumed = data(workers)
        next(resumed.train_batches(0))  # an epoch given up half-way leaves nothing behind
        continued = list(resumed.train_batches(1, start_step=start))
        assert len(continued) == steps - start
        assert all(same(a, b) for a, b in zip(continued, epochs[1][start:], strict=True))
        assert all(
            same(a, b) for a, b in zip(resumed.train_batches(0, 3), epochs[0][3:], strict=True)
        )
    assert list(undisturbed.train_batches(0, steps)) == []
    with pytest.raises(ValueError, match="start_step 7 is outside the epoch of 6 steps"):
        undisturbed.train_batches(0, 7)


def test_another_seed_gives_another_order_and_augmentation():
    first, second = (next(build_data(options(seed=seed), 32).train_batches(0)) for seed in (0, 1))
    assert not torch.equal(first.indices, second.indices)
    repeats = torch.unique(first.indices, return_counts=True)[1]
    assert repeats.max() == 3  # repeated augmentation: three views of one image, each its own
    views = first.images[first.indices == first.indices[0]]
    assert (
        len(views) == 3
        and not torch.equal(views[0], views[1])
        and not torch.equal(views[1], views[2])
    )


@pytest.mark.parametrize("workers", ["0", "2"])
def test_loading_leaves_the_random_state_of_the_model_alone(workers):
    data = build_data(options("--num-workers", workers, "--subset", "32"), 32)
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    assert len(list(data.train_batches(0))) == 8 and len(list(data.val_batches())) == 90
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


@pytest.mark.parametrize("repeated_aug", [True, False])
def test_ranks_share_an_epoch(repeated_aug):
    """Two ranks with half the batch see what one process sees, position by position, with the same
    augmentation.
    """
    one = TrainBatchSampler(64, 8, 0, 0, 1, repeated_aug)
    two = [TrainBatchSampler(64, 4, 0, rank, 2, repeated_aug) for rank in (0, 1)]
    assert one.steps_per_epoch == two[0].steps_per_epoch == two[1].steps_per_epoch == 8
    for whole, left, right in zip(one, *two, strict=True):
        assert whole == [pair for pairs in zip(left, right, strict=True) for pair in pairs]
    seen = [index for batch in one for index, _ in batch]
    assert max(np.bincount(seen)) == (3 if repeated_aug else 1)
    assert len({seed for batch in one for _, seed in batch}) == 64


@pytest.mark.parametrize("images", [0, 1, 7, 359, 360])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_counts_every_image_once(images, world_size):
    samplers = [EvalBatchSampler(images, 16, rank, world_size) for rank in range(world_size)]
    batches = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(one) for one in batches]
    assert sorted(index for one in batches for batch in one for index, _ in batch) == list(
        range(images)
    )


def test_evaluation_on_ranks_without_images(tmp_path):
    make_folders(tmp_path, classes=("only",), val=2)
    flags = options(
        "--data-set",
        "FOLDER",
        "--data-path",
        str(tmp_path),
        "--num-workers",
        "1",
        "--batch-size",
        "1",
    )
    indices = []
    for rank in range(3):
        data = build_data(flags, 32, rank=rank, world_size=3)
        indices.append([int(index) for batch in data.val_batches() for index in batch.indices])
    assert indices == [[0], [1], []] and data.num_val == 2


def bad_folders(root: Path) -> Path:
    """Of 8 training images of cats 2 and 3 are bad, of 3 validation images 1."""
    make_folders(root)
    for name in ("train/cat/2.jpg", "val/cat/1.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:300])
    (root / "train/cat/3.jpg").write_bytes(b"")
    return root


@pytest.mark.parametrize("workers", ["0", "2"])
def test_stop_names_the_file_in_one_line(tmp_path, workers, capfd):
    bad_folders(tmp_path)
    flags = (
        "--data-set",
        "FOLDER",
        "--data-path",
        str(tmp_path),
        "--num-workers",
        workers,
        "--no-repeated-aug",
    )
    data = build_data(options(*flags), 32)
    for batches, name in (
        (data.train_batches(0), r"train/cat/[23]\.jpg"),
        (data.val_batches(), r"val/cat/1\.jpg"),
    ):
        with pytest.raises(UserError, match=f"{tmp_path}/{name}: .*--bad-images skip") as error:
            list(batches)
        assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("workers", ["0", "2"])
def test_skip_replaces_in_training_and_leaves_out_in_evaluation(tmp_path, workers):
    bad_folders(tmp_path)
    flags = (
        "--data-set",
        "FOLDER",
        "--data-path",
        str(tmp_path),
        "--num-workers",
        workers,
        "--no-repeated-aug",
    )
    data = build_data(options(*flags, "--bad-images", "skip"), 32)
    seen = torch.cat([batch.indices for batch in data.train_batches(0)])
    assert torch.bincount(seen, minlength=16).tolist() == [1, 1, 0, 0, 3] + [1] * 11
    assert torch.cat([batch.indices for batch in data.val_batches()]).tolist() == [0, 2, 3, 4, 5]
    list(data.train_batches(1))  # met again, counted once
    names = [
        f"{tmp_path}/{name}" for name in ("train/cat/2.jpg", "train/cat/3.jpg", "val/cat/1.jpg")
    ]
    assert sorted(data.bad_images.found) == names
    assert data.bad_images.found[names[1]] == "the file is empty"

    listing = tmp_path / "bad_images.txt"
    listing.write_text("from an earlier run: gone\n")
    data.bad_images.write(listing)
    assert len(data.bad_images.write(listing)) == 4
    lines = listing.read_text().splitlines()
    assert (
        len(lines) == 4
        and lines[0] == "from an earlier run: gone"
        and f"{names[1]}: the file is empty" in lines
    )
    with pytest.raises(UserError, match="cannot write .*nowhere/list.txt: No such"):
        data.bad_images.write(tmp_path / "nowhere/list.txt")


def test_a_batch_of_bad_validation_images_is_no_batch(tmp_path):
    make_folders(tmp_path)
    for file in (tmp_path / "val").rglob("*.jpg"):
        file.write_bytes(b"no image")
    flags = ("--data-set", "FOLDER", "--data-path", str(tmp_path), "--bad-images", "skip")
    data = build_data(options(*flags), 32)
    assert list(data.val_batches()) == [] and len(data.bad_images.found) == 6
    assert data.bad_images.found[f"{tmp_path}/val/dog/0.jpg"].startswith(
        "not an image in a known format"
    )


def test_skip_gives_up_when_nothing_can_be_read(tmp_path):
    make_folders(tmp_path)
    for file in (tmp_path / "train").rglob("*.jpg"):
        file.unlink()
        file.symlink_to("lost")
    flags = (
        "--data-set",
        "FOLDER",
        "--data-path",
        str(tmp_path),
        "--bad-images",
        "skip",
        "--num-workers",
        "1",
    )
    with pytest.raises(
        UserError, match="16 images in a row cannot be decoded, the last one is .*: No such file"
    ):
        list(build_data(options(*flags), 32).train_batches(0))


def test_skip_gives_up_after_a_bounded_number(monkeypatch):
    class Unreadable(ImageSet):
        def load(self, index):
            raise BadImageError("gone")

        def describe(self, index):
            return f"image {index}"

    row = datasets.DataSet("X", "classification", lambda path, split: Unreadable([0] * 999, ["a"]))
    monkeypatch.setitem(datasets.DATA_SETS, "X", row)
    data = build_data(options("--data-set", "X", "--bad-images", "skip"), 32)
    with pytest.raises(UserError, match=f"^{MAX_REPLACEMENTS} images in a row"):
        next(data.train_batches(0))


def test_200_corrupted_jpegs_in_one_epoch(tmp_path, capfd):
    make_folders(tmp_path, train=100, val=1)
    chance = random.Random(1)
    for file in sorted((tmp_path / "train").rglob("*.jpg")):
        content = bytearray(file.read_bytes())
        for _ in range(6):
            content[chance.randrange(len(content))] = chance.randrange(256)
        file.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
    flags = (
        "--data-set",
        "FOLDER",
        "--data-path",
        str(tmp_path),
        "--num-workers",
        "2",
        "--no-repeated-aug",
    )
    data = build_data(options(*flags, "--bad-images", "skip"), 32)
    batches = list(data.train_batches(0))
    assert len(batches) == 50 and all(torch.isfinite(batch.images).all() for batch in batches)
    assert 30 < len(data.bad_images.found) < 200
    assert capfd.readouterr().err == ""


def test_a_killed_worker_ends_in_one_line():
    data = build_data(options("--num-workers", "1"), 32)
    batches = data.train_batches(0)
    next(batches)
    started = time.monotonic()
    os.kill(data.train_loader.loader._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(
        UserError, match="reading the data failed: DataLoader worker .* fewer --num-workers"
    ) as error:
        list(batches)
    assert "\n" not in str(error.value) and time.monotonic() - started < 20


def test_a_mistake_in_the_program_keeps_its_trace(monkeypatch):
    data = build_data(options("--num-workers", "1"), 32)

    def broken(index):
        raise RuntimeError("a bug")

    monkeypatch.setattr(data.train, "load", broken)
    with pytest.raises(RuntimeError, match="(?s)Original Traceback.*RuntimeError: a bug"):
        next(data.train_batches(0))


def test_workers_outlive_the_signals_of_a_scheduler():
    data = build_data(options("--num-workers", "1", "--subset", "64"), 32)
    batches = data.train_batches(0)
    next(batches)
    worker = data.train_loader.loader._iterator._workers[0]
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["/bin/sh", "-c", f"kill -{name} {worker.pid}"], check=True)
    assert len(list(batches)) == data.steps_per_epoch - 1 and worker.is_alive()
    worker.terminate()  # its own parent may end it
    worker.join(10)
    assert worker.exitcode == 0


def test_a_program_that_stops_in_mid_epoch_ends_at_once():
    program = (
        "from helpers.data import options; from datasets import build_data\n"
        "data = build_data(options('--num-workers', '2'), 32)\n"
        "batches, val = data.train_batches(0), data.val_batches()\n"
        "next(batches), next(val)\n"
        "import time; print(time.monotonic(), flush=True)\n"  # one clock for all processes
    )
    tests = Path(__file__).resolve().parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert time.monotonic() - float(done.stdout) < 60


def test_files_of_a_batch_can_be_named(tmp_path):
    make_folders(tmp_path)
    data = build_data(options("--data-set", "FOLDER", "--data-path", str(tmp_path)), 32)
    batch = next(data.train_batches(0))
    for name, target in zip(data.describe(batch.indices), batch.targets, strict=True):
        assert Path(name).is_file() and Path(name).parent.name == data.class_names[target]


def test_decoding_is_the_same_through_a_batch(tmp_path):
    root = make_folders(tmp_path)
    photo((32, 32), seed=9).save(root / "val" / "cat" / "0.png")
    (root / "val" / "cat" / "0.jpg").unlink()
    data = build_data(options("--data-set", "FOLDER", "--data-path", str(root)), 32)
    batch = next(data.val_batches())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = batch.images[0].permute(1, 2, 0) * std + mean
    assert torch.equal(
        (pixels * 255).round().to(torch.uint8), torch.from_numpy(np.array(photo((32, 32), seed=9)))
    )


@pytest.mark.parametrize(
    "message",
    [
        "unable to allocate shared memory(shm) for file </torch_49_2_0>: Success (0)",
        "Caught RuntimeError in DataLoader worker process 0.\nunable to write to file </torch_4_2>",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory.",
    ],
)
def test_a_small_shared_memory_is_told_with_what_to_do(message):
    told = str(worker_died(RuntimeError(message)))
    assert "/dev/shm" in told and "--num-workers 0" in told and "--shm-size" in told
    assert "\n" not in told


def test_no_room_for_the_workers_semaphores(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("loading.loaders._start", full)
    data = build_data(options(), 32)
    with pytest.raises(UserError, match="/dev/shm, through which workers"):
        next(data.train_batches(0))


@pytest.mark.parametrize("message", ["Too many open files. Communication", "0 items of ancdata"])
def test_too_many_open_files_are_told_with_what_to_do(message):
    assert "ulimit -n" in str(worker_died(RuntimeError(f"received {message}")))


def test_other_errors_are_not_taken_for_it():
    assert worker_died(RuntimeError("CUDA error: out of memory")) is None
