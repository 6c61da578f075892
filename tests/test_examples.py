"""Examples whose targets are no classes: masks, numbers, clips, under joint transforms."""

import numpy as np
import pytest
import torch
from helpers.data import make_folders, options, photo
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

import datasets
from datasets import DATA_SETS, DataSet, build_data, register_data_set, task_of
from loading.images import (
    BadImageError,
    Example,
    ImageSet,
    LabelledImages,
    SubsetImages,
    fixed_part,
    spread_choice,
)
from loading.options import DataOptions
from loading.transforms import Transforms, classification_transforms, eval_transform
from utils.errors import UsageError, UserError

HEIGHT, WIDTH = 16, 24


class Masks(ImageSet):
    """Images whose red channel is their own mask; no two columns of one are alike."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()):
        super().__init__()
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def load(self, index):
        if index in self.bad:
            raise BadImageError("gone")
        pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        pixels[..., 0] = index + 10 * np.arange(WIDTH)
        mask = tv_tensors.Mask(torch.from_numpy(pixels[..., 0].astype(np.int64)))
        return Example(Image.fromarray(pixels), mask)

    def describe(self, index):
        return f"image {index}"


class Numbers(ImageSet):
    """Images with a target of any kind that `target` makes of their index."""

    def __init__(self, count: int, target):
        super().__init__()
        self.count, self.target = count, target

    def __len__(self):
        return self.count

    def load(self, index):
        return Example(photo(seed=int(index)), self.target(int(index)))

    def describe(self, index):
        return f"image {index}"


@pytest.fixture
def build(monkeypatch):
    """`build_data` of a set that is not in the table yet: its flags and arguments."""

    def build(make, *flags, size=32, seed=0, **others):
        row = DataSet("OWN", "a task of its own", make)
        monkeypatch.setitem(datasets.DATA_SETS, row.name, row)
        data = build_data(options("--data-set", "OWN", *flags, seed=seed), size, **others)
        built.append(data)
        return data

    built = []
    yield build
    for data in built:  # its workers end here; left to the collector, torch waits 5 s for each
        for loader in (data.train_loader, data.val_loader):
            if loader is not None:
                loader.loader._iterator = None


TO_TENSOR = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))
JOINT = Transforms(
    v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomCrop((8, 12)), *TO_TENSOR]),
    v2.Compose(TO_TENSOR),
)


def test_a_mask_is_flipped_and_cut_with_its_image(build):
    def data(workers):
        return build(lambda path, split: Masks(12), "--num-workers", workers, transforms=JOINT)

    trained = list(data("0").train_batches(3))
    flipped = set()
    for batch in trained:
        assert type(batch.images) is type(batch.targets) is torch.Tensor
        assert batch.images.shape == (4, 3, 8, 12) and batch.targets.shape == (4, 8, 12)
        assert batch.targets.dtype == torch.int64
        assert torch.equal((batch.images[:, 0] * 255).round().long(), batch.targets)
        flipped |= set((batch.targets[:, 0, 0] > batch.targets[:, 0, -1]).tolist())
    assert flipped == {True, False}
    for workers, start in (("1", 1), ("2", 0)):
        again = list(data(workers).train_batches(3, start))
        for one, two in zip(trained[start:], again, strict=True):
            assert type(two.images) is type(two.targets) is torch.Tensor
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for batch in data("1").val_batches():
        assert batch.targets.shape[1:] == (HEIGHT, WIDTH)
        expected = batch.indices[:, None] + 10 * torch.arange(WIDTH)
        assert torch.equal(batch.targets[:, 0], expected)


def test_a_bad_image_takes_its_target_with_it(build):
    flags = ("--bad-images", "skip", "--no-repeated-aug")
    data = build(lambda path, split: Masks(8, bad=(2, 3)), *flags, transforms=JOINT)
    seen = []
    for batch in data.train_batches(0):
        seen += batch.indices.tolist()
        least = batch.targets.flatten(1).min(dim=1).values
        assert torch.equal(least % 10, batch.indices)
        assert torch.equal((batch.images[:, 0] * 255).round().long(), batch.targets)
    assert sorted(seen) == [0, 1, 4, 4, 4, 5, 6, 7]
    assert torch.cat([batch.indices for batch in data.val_batches()]).tolist() == [0, 1, 4, 5, 6, 7]
    assert data.bad_images.found == {"image 2": "gone", "image 3": "gone"}
    nothing = build(lambda path, split: Masks(8, bad=range(8)), *flags, transforms=JOINT)
    assert list(nothing.val_batches()) == []
    with pytest.raises(UserError, match="8 images in a row cannot be decoded, .* image .: gone"):
        next(nothing.train_batches(0))


def test_an_image_may_turn_out_to_be_bad_in_the_transform(build):
    """As where a clip is decoded only once its frames have been chosen."""

    def choosy(image, mask):
        if mask[0, 0] == 1:
            raise BadImageError("no such frame")
        return JOINT.eval(image, mask)

    flags = ("--bad-images", "skip", "--no-repeated-aug")
    data = build(lambda path, split: Masks(4), *flags, transforms=Transforms(choosy, choosy))
    assert sorted(next(data.train_batches(0)).indices.tolist()) == [0, 2, 2, 3]
    assert data.bad_images.found == {"image 1": "no such frame"}


@pytest.mark.parametrize(
    "target, shape, dtype",
    [
        (lambda i: i / 4, (), torch.float32),
        (lambda i: i, (), torch.int64),
        (lambda i: [i / 4, -i / 4], (2,), torch.float32),
        (lambda i: np.full((2, 3), i / 4, dtype=np.float64), (2, 3), torch.float64),
        (lambda i: torch.full((5,), i, dtype=torch.uint8), (5,), torch.uint8),
    ],
)
def test_numbers_as_targets_with_the_transforms_of_classification(build, target, shape, dtype):
    flags = ("--no-repeated-aug", "--num-workers", "1")
    data = build(lambda path, split: Numbers(8, target), *flags)
    assert data.class_names == [] and data.num_classes == 0
    for batch in [*data.train_batches(0), *data.val_batches()]:
        assert batch.images.shape == (4, 3, 32, 32)
        assert (batch.targets.shape, batch.targets.dtype) == ((4, *shape), dtype)
        for index, found in zip(batch.indices.tolist(), batch.targets, strict=True):
            assert torch.equal(found, torch.as_tensor(target(index)).to(dtype))


def test_clips(build):
    class Clips(LabelledImages):
        def load_image(self, index):
            frames = torch.arange(5)[:, None, None, None].expand(5, 3, 4, 6)
            return tv_tensors.Video(frames.to(torch.uint8))

        def describe(self, index):
            return f"clip {index}"

    def spread(clip, label):
        clip, label = v2.RandomHorizontalFlip(0.5)(clip, label)
        return clip.transpose(0, 1).float(), label

    data = build(
        lambda path, split: Clips([0, 1, 1, 0], ["a", "b"]), transforms=Transforms(spread, spread)
    )
    batch = next(data.train_batches(0))
    assert batch.images.shape == (4, 3, 5, 4, 6) and type(batch.images) is torch.Tensor
    assert batch.images[0, 0, :, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert batch.targets.tolist() == [[0, 1, 1, 0][index] for index in batch.indices]


def test_random_numbers_drawn_while_loading_are_repeatable(build):
    class Drawn(Numbers):
        def load(self, index):
            chosen = np.random.randint(1 << 30), int(torch.randint(1 << 30, ()))
            return Example(photo(), torch.tensor([int(index), *chosen]))

    def draws(workers, seed=0):
        data = build(lambda path, split: Drawn(16, None), "--num-workers", workers, seed=seed)
        return [
            torch.cat([batch.targets for batch in batches])
            for batches in (data.train_batches(1), data.val_batches())
        ]

    (train, val), (again, val_again) = draws("0"), draws("2")
    assert torch.equal(train, again) and torch.equal(val, val_again)
    assert len(train.unique(dim=0)) == 16
    assert not torch.equal(train, draws("0", seed=1)[0])


def test_images_of_different_sizes_are_evaluated_one_by_one(build):
    class Sizes(Masks):
        def load(self, index):
            image, mask = super().load(index)
            return Example(image.crop((0, 0, 4 + index, 6)), mask[:6, : 4 + index])

    for world_size in (1, 2):
        shapes = []
        for rank in range(world_size):
            data = build(
                lambda path, split: Sizes(5),
                transforms=JOINT,
                train=False,
                eval_batch_size=1,
                rank=rank,
                world_size=world_size,
            )
            for image, target, _ in data.val_batches():
                assert image.shape[-2:] == target.shape[-2:]
                shapes.append(tuple(target.shape))
        assert sorted(shapes) == [(1, 6, width) for width in range(4, 9)]


@pytest.mark.parametrize("size", [(48, 64), (64, 40), (16, 32)])
def test_sizes_that_are_not_square(tmp_path, size):
    root = make_folders(tmp_path)
    flags = options("--data-set", "FOLDER", "--data-path", str(root))
    data = build_data(flags, size)
    assert next(data.train_batches(0)).images.shape == (4, 3, *size)
    assert next(data.val_batches()).images.shape == (4, 3, *size)


@pytest.mark.parametrize("size", [32, 48])
def test_a_pair_of_equal_sides_is_the_same_as_one_number(size):
    one, two = (build_data(options(), given) for given in (size, (size, size)))
    for a, b in (
        (one.train_batches(0), two.train_batches(0)),
        (one.val_batches(), two.val_batches()),
    ):
        assert all(torch.equal(x, y) for x, y in zip(next(a), next(b), strict=True))


def test_a_part_of_a_set_without_labels_is_spread_evenly_and_fixed(build):
    def part(*flags, seed=0):
        data = build(lambda path, split: Masks(40), *flags, transforms=JOINT, seed=seed)
        assert isinstance(data.train, SubsetImages) and data.train.labels is None
        assert len(list(data.calibration_loader.batches())) == -(-len(data.train) // 4)
        return data.train.indices.tolist()

    quarter = part("--subset", "0.25")
    assert quarter == part("--subset", "10", seed=9)
    assert [index // 4 for index in quarter] == list(range(10))
    assert part("--subset", "40") == list(range(40))
    with pytest.raises(UsageError, match="--subset 41: the training set has 40 images only"):
        part("--subset", "41")


@pytest.mark.parametrize("total, count", [(7, 1), (7, 3), (7, 5), (7, 7), (1281167, 2048)])
def test_spread_indices_are_distinct_and_sorted(total, count):
    chosen = spread_choice(total, count)
    assert len(chosen) == count and chosen[0] >= 0 and chosen[-1] < total
    assert (np.diff(chosen) > 0).all()
    assert np.diff(chosen, prepend=0, append=total).max() <= 2 * -(-total // count)


def test_a_part_of_a_part_keeps_labels_and_examples():
    digits = DATA_SETS["DIGITS"].load(None, "train")
    part = fixed_part(fixed_part(digits, 200), 50)
    assert np.bincount(part.labels).tolist() == [5] * 10
    for index in range(50):
        assert part.load(index).target == part.labels[index]


def test_a_row_from_outside_is_a_data_set(monkeypatch):
    monkeypatch.setattr(datasets, "DATA_SETS", dict(DATA_SETS))
    row = DataSet("STARS", "regression", lambda path, split: Numbers(8, float), "stars.csv")
    register_data_set(row)
    assert task_of("STARS") == "regression"
    with pytest.raises(UsageError, match="STARS needs --data-path: stars.csv"):
        build_data(options("--data-set", "STARS"), 32)
    with pytest.raises(UsageError, match="known are DIGITS, .*SSV2, LVU, STARS, wds/"):
        build_data(options("--data-set", "MOONS"), 32)
    for taken in (row, DataSet("DIGITS", "x", row.load), DataSet("wds/x", "x", row.load)):
        with pytest.raises(ValueError, match="there is a data set called .* already"):
            register_data_set(taken)
    assert "STARS" not in DATA_SETS


def test_the_task_of_each_name():
    tasks = {"classification", "segmentation", "video"}
    assert {task_of(name) for name in DATA_SETS} == tasks
    assert task_of("wds/birds") == task_of("HFDS/x") == "classification"
    with pytest.raises(UsageError, match="--data-set 'MOONS' is unknown; known are DIGITS"):
        task_of("MOONS")


def test_options_are_the_flags():
    parser = datasets.argparse.ArgumentParser()
    datasets.add_data_arguments(parser)
    datasets.add_augmentation_arguments(parser)
    args = parser.parse_args([], datasets.argparse.Namespace(seed=0))
    assert DataOptions.from_args(args) == DataOptions()
    args = options("--subset", "7", "--no-pin-mem", "--bad-images", "skip", seed=5)
    made = DataOptions.from_args(args, rank=1, world_size=3)
    assert (made.subset, made.pin_mem, made.bad_images, made.seed) == (7, False, "skip", 5)
    assert (made.rank, made.world_size, made.batch_size, made.eval_batch_size) == (1, 3, 4, None)


def test_classification_leaves_the_target_alone():
    transforms = classification_transforms(options(), 32, train=False)
    assert transforms.train is None
    image, target = transforms.eval(photo(), "anything")
    assert target == "anything"
    assert torch.equal(image, eval_transform(options(), 32)(photo()))
