"""Data sets of images with label maps: layouts, and the one line per mistake."""

import shutil

import numpy as np
import pytest
import torch
from helpers.data import HEIGHT, WIDTH, labels, options, photo
from PIL import Image
from torchvision.datasets import Cityscapes
from torchvision.tv_tensors import Mask

from datasets import SEGMENTATION, build_data, task_of
from loading.images import BadImageError
from loading.joint_transforms import (
    SegmentationAugmentation,
    segmentation_eval_transform,
    segmentation_train_transform,
)
from loading.transforms import Transforms
from utils.errors import UsageError, UserError

TRANSFORMS = Transforms(
    segmentation_train_transform(SegmentationAugmentation(32)), segmentation_eval_transform()
)


def folders(root, images="images", masks="masks", splits=("train", "val"), low=0, high=3):
    """root/IMAGES/SPLIT/N.jpg and root/MASKS/SPLIT/N.png: 6 and 3 of them."""
    for split, count in zip(splits, (6, 3), strict=True):
        for folder in (images, masks):
            (root / folder / split).mkdir(parents=True)
        for number in range(count):
            photo(seed=number).save(root / images / split / f"{number}.jpg")
            mask = Image.fromarray(labels(number, low, high))
            mask.save(root / masks / split / f"{number}.png")
    return root


def ade20k_folders(root, high=5):
    splits = ("training", "validation")
    return folders(root, masks="annotations", splits=splits, high=high)


def build(root, name, *flags, **others):
    flags = options("--data-set", name, "--data-path", str(root), "--no-repeated-aug", *flags)
    return build_data(flags, 32, transforms=TRANSFORMS, eval_batch_size=1, **others)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and 20 < len(text) < 500
    return text


def test_the_names_are_of_the_task():
    for name in ("ADE20K", "CITYSCAPES", "VOC", "SEG_FOLDER"):
        assert task_of(name) == SEGMENTATION == "segmentation"
        with pytest.raises(UsageError, match=f"{name} needs --data-path: .*folder"):
            build_data(options("--data-set", name), 32)


def test_mask_folders(tmp_path):
    root = folders(tmp_path)
    (root / "classes.txt").write_text("sea\nland\nsky above\nnever seen\n")
    for split in ("train", "val"):
        nested = root / "images" / split / "more"
        nested.mkdir()
        photo(seed=9).save(nested / "deep.PNG")
        (root / "masks" / split / "more").mkdir()
        Image.fromarray(labels(9)).save(root / "masks" / split / "more" / "deep.png")
    data = build(root, "SEG_FOLDER")
    assert data.class_names == ["sea", "land", "sky above", "never seen"] and data.num_classes == 4
    assert (len(data.train), len(data.val), data.train.labels) == (7, 4, None)
    assert data.describe([6], "train") == [str(root / "images/train/more/deep.PNG")]
    for number, seed in ((0, 0), (5, 5), (6, 9)):
        image, mask = data.train.load(number)
        assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT)) and isinstance(mask, Mask)
        assert mask.dtype == torch.uint8 and np.array_equal(mask.numpy(), labels(seed))
    assert np.array_equal(np.asarray(data.train.load(6).image), np.asarray(photo(seed=9)))


def test_batches_for_any_number_of_workers(tmp_path):
    root = folders(tmp_path)
    batches = list(build(root, "SEG_FOLDER").train_batches(2))
    assert [batch.images.shape for batch in batches] == [(4, 3, 32, 32)]
    for images, targets, _ in batches:
        assert images.dtype == torch.float32 and targets.dtype == torch.int64
        assert targets.shape == (4, 32, 32) and set(targets.unique().tolist()) <= {0, 1, 2, 255}
    data = build(root, "SEG_FOLDER", "--num-workers", "2")
    for one, two in zip(batches, data.train_batches(2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    data.train_loader.loader._iterator = None  # its workers end here
    shapes = [
        (batch.images.shape, batch.targets.shape)
        for batch in build(root, "SEG_FOLDER", train=False).val_batches()
    ]
    assert shapes == [((1, 3, HEIGHT, WIDTH), (1, HEIGHT, WIDTH))] * 3


def test_a_subset_is_spread(tmp_path):
    data = build(folders(tmp_path), "SEG_FOLDER", "--subset", "4")
    assert len(data.train) == 4 and len(set(data.train.indices.tolist())) == 4


def test_classes_without_names_follow_from_the_masks_of_both_splits(tmp_path):
    root = folders(tmp_path)
    values = labels(1)
    values[0, 0], values[0, 1] = 6, 255
    Image.fromarray(values).save(root / "masks/val/1.png")
    (root / "masks/val/2.png").write_bytes(b"damaged")
    data = build(root, "SEG_FOLDER")
    assert data.class_names == [f"class {label}" for label in range(7)]
    assert data.val.load(1).target[0, :2].tolist() == [6, 255]
    Image.fromarray(np.full((HEIGHT, WIDTH), 700, np.uint16)).save(root / "masks/val/1.png")
    with pytest.raises(UserError, match="val/1.png: value 700; classes are 0 ... 254") as error:
        build(root, "SEG_FOLDER")
    one_line(error)


def test_only_ignored_pixels_make_no_classes(tmp_path):
    root = folders(tmp_path)
    for file in root.glob("masks/*/*.png"):
        Image.new("L", (WIDTH, HEIGHT), 255).save(file)
    with pytest.raises(UserError, match="masks: no label map with a class in it; name the classes"):
        build(root, "SEG_FOLDER")


def test_masks_of_0_and_255_make_no_classes(tmp_path):
    """The most likely mistake: 255 for the object would be ignored, without a word."""
    root = folders(tmp_path)
    for file in root.glob("masks/*/*.png"):
        Image.fromarray(labels(0, 0, 2) * 255).save(file)
    with pytest.raises(UserError, match="hold one class only; 255 means ignored: write 1, 2"):
        build(root, "SEG_FOLDER")


def test_ade20k(tmp_path):
    root = ade20k_folders(tmp_path)
    Image.fromarray(np.full((HEIGHT, WIDTH), 150, np.uint8)).save(
        root / "annotations/training/1.png"
    )
    Image.fromarray(np.full((HEIGHT, WIDTH), 255, np.uint8)).save(
        root / "annotations/training/2.png"
    )
    data = build(root, "ADE20K")
    assert (len(data.train), len(data.val), data.num_classes) == (6, 3, 150)
    assert data.class_names[:4] == ["wall", "building", "sky", "floor"]
    assert data.class_names[148:] == ["clock", "flag"] and len(set(data.class_names)) == 150
    assert np.array_equal(data.train.load(0).target.numpy(), labels(0, 0, 5) - np.uint8(1))
    assert (labels(0, 0, 5) == 0).any()  # 0 - 1 is 255
    assert data.train.load(1).target.unique().tolist() == [149]
    assert data.train.load(2).target.unique().tolist() == [255]
    Image.fromarray(np.full((HEIGHT, WIDTH), 151, np.uint8)).save(
        root / "annotations/training/1.png"
    )
    with pytest.raises(BadImageError, match="value 151 in row 0, column 0; known are 0 ... 150,"):
        data.train.load(1)


def test_names_of_ade20k_from_the_benchmarks_file(tmp_path):
    root = ade20k_folders(tmp_path)
    listing = root / "objectInfo150.txt"
    rows = ["1\t0.1576\t11664\t1172\twall", "2\t0.1072\t6046\t612\tbuilding, edifice"]
    rows += ["3\t0.0878\t8265\t796\tsky", "4\t0.06\t9336\t917\tchest of drawers, chest"]
    listing.write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    data = build(root, "ADE20K")
    assert data.class_names == ["wall", "building", "sky", "chest of drawers"]
    listing.write_text("\n".join([rows[0], rows[2]]))
    with pytest.raises(UserError, match="not the benchmark's list of classes 1, 2, ...") as error:
        build(root, "ADE20K")
    assert "objectInfo150.txt" in one_line(error)
    (root / "classes.txt").write_text("disc\nsquare\nring\ncross")
    data = build(root, "ADE20K")
    assert data.class_names == ["disc", "square", "ring", "cross"]
    assert np.array_equal(data.val.load(1).target.numpy(), labels(1, 0, 5) - np.uint8(1))
    (root / "classes.txt").write_text("disc\nsquare\nring")
    with pytest.raises(BadImageError, match="known are 0 ... 3, and 255 for ignored"):
        build(root, "ADE20K").val.load(1)


def test_cityscapes(tmp_path):
    ids = np.arange(34, dtype=np.uint8).repeat(2).reshape(2, 34)
    ids[0, 0] = 255
    for split, cities in (("train", ("bochum", "aachen")), ("val", ("ulm",))):
        for city in cities:
            images, masks = (tmp_path / top / split / city for top in ("leftImg8bit", "gtFine"))
            for folder in (images, masks):
                folder.mkdir(parents=True)
            photo((34, 2)).save(images / f"{city}_0_0_leftImg8bit.png")
            Image.fromarray(ids).save(masks / f"{city}_0_0_gtFine_labelIds.png")
            (images / "Thumbs.db").write_bytes(b"")
    data = build(tmp_path, "CITYSCAPES", "--batch-size", "2")
    assert (len(data.train), len(data.val), data.num_classes) == (2, 1, 19)
    assert data.class_names[:2] == ["road", "sidewalk"] and data.class_names[18] == "bicycle"
    assert "aachen" in data.describe([0])[0]
    expected = {row.id: row.train_id for row in Cityscapes.classes} | {255: 255}
    found = data.train.load(0).target.numpy()
    assert found.tolist() == [[expected[int(value)] for value in row] for row in ids]
    assert set(found.ravel().tolist()) == {*range(19), 255}
    (tmp_path / "gtFine/val/ulm/ulm_0_0_gtFine_labelIds.png").unlink()
    with pytest.raises(UserError, match="1 of 1 label maps are missing: gtFine/val/ulm") as error:
        build(tmp_path, "CITYSCAPES", "--batch-size", "2")
    one_line(error)
    shutil.rmtree(tmp_path / "gtFine")
    (tmp_path / "gtFine_trainvaltest.zip").write_bytes(b"")
    (tmp_path / "leftImg8bit_trainvaltest.zip").write_bytes(b"")
    with pytest.raises(UserError, match="no folder gtFine/train/ in it"):
        build(tmp_path, "CITYSCAPES", "--batch-size", "2")


def test_voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    values = labels(0, 0, 21)
    values[0, 0] = 255
    for number in range(5):
        photo(seed=number).save(root / "JPEGImages" / f"{number}.jpg")
        mask = Image.fromarray(values)
        mask.putpalette(np.random.RandomState(0).randint(0, 256, 768, dtype=np.uint8).tobytes())
        mask.save(root / "SegmentationClass" / f"{number}.png")
    for split, names in (("train", "3\n1\n4\n0\n"), ("val", "2\n")):
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text(names)
    data = build(tmp_path, "VOC")
    assert (len(data.train), len(data.val), data.num_classes) == (4, 1, 21)
    assert data.class_names[1] == "aeroplane" and data.class_names[20] == "tvmonitor"
    assert data.describe([0])[0].endswith("JPEGImages/3.jpg")
    assert np.array_equal(data.train.load(0).target.numpy(), values)
    (root / "SegmentationClass/4.png").unlink()
    with pytest.raises(UserError, match="1 of 4 label maps are missing: .*4.png"):
        build(tmp_path, "VOC")
    (root / "ImageSets/Segmentation/train.txt").unlink()
    with pytest.raises(UserError, match="not Pascal VOC .*train.txt") as error:
        build(tmp_path, "VOC")
    one_line(error)
    with pytest.raises(UserError, match="no folder VOCdevkit/VOC2012/ in it .there is"):
        build(root, "VOC")


@pytest.mark.parametrize("name", ["1.png", "1.jpg"])
def test_a_missing_partner_is_named(tmp_path, name):
    root = folders(tmp_path)
    kind, other = ("masks", "images") if name.endswith(".png") else ("images", "masks")
    (root / kind / "train" / name).unlink()
    noun = "images have no .png" if kind == "masks" else "label maps have no image"
    with pytest.raises(
        UserError, match=f"1 of 6 {noun} of the same name in {kind}/train/: "
    ) as error:
        build(root, "SEG_FOLDER")
    assert f"{other}/train/1." in one_line(error)


def test_only_the_first_missing_partners_are_listed(tmp_path):
    root = folders(tmp_path)
    for file in (root / "masks/train").iterdir():
        file.rename(file.with_suffix(".tif"))
    with pytest.raises(UserError, match="6 of 6 images .*: images/train/0.jpg, .* and 1 more"):
        build(root, "SEG_FOLDER")


def remove_train_images(root):
    shutil.rmtree(root / "images/train")


def remove_val_masks(root):
    shutil.rmtree(root / "masks/val")


def empty(root):
    for file in root.glob("*/train/*"):
        file.unlink()


def double(root):
    photo().save(root / "images/train/0.png")


def long_list(root):
    (root / "classes.txt").write_text("\n".join(map(str, range(256))))


def repeated_name(root):
    (root / "classes.txt").write_text("sea\nland\nsea\n")


def no_name(root):
    (root / "classes.txt").write_text("sea\n\nland\n")


def no_names(root):
    (root / "classes.txt").write_text("\n")


def not_text(root):
    (root / "classes.txt").write_bytes(b"\xff\xfe\xfd")


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "--data-path .*: no such folder"),
        (remove_train_images, r"no folder images/train/ in it \(there is images/, masks/\)"),
        (remove_val_masks, "no folder masks/val/ in it"),
        (empty, "no images in images/train/"),
        (double, "differ in their ending only: images/train/0.jpg, images/train/0.png"),
        (long_list, "classes.txt: 256 classes; at most 255 are possible"),
        (repeated_name, "classes.txt: lines 1 and 3 are both 'sea'"),
        (no_name, "classes.txt: no name in line 2; give one per line"),
        (no_names, "classes.txt: no name in line 1"),
        (not_text, "classes.txt: cannot be read as text"),
    ],
)
def test_mistaken_folders_get_one_line(tmp_path, damage, message):
    root = folders(tmp_path / "data")
    damage(root)
    with pytest.raises(UserError, match=message) as error:
        build(root, "SEG_FOLDER")
    assert error.value.exit_code == 1 and "data" in one_line(error)


def too_large(values):
    return Image.fromarray(np.where(np.arange(WIDTH) == 7, 4, values).astype(np.uint8))


@pytest.mark.parametrize(
    "mask, reason",
    [
        (too_large, "value 4 in row 0, column 7; known are 0 ... 2, and 255 for ignored"),
        (lambda v: Image.fromarray(v.astype(np.uint16) + 256), r"value 25\d in row"),
        (
            lambda v: Image.fromarray(v).crop((0, 0, 20, 30)),
            "20 x 30 pixels, but the image has 40 x 30",
        ),
        (lambda v: Image.fromarray(v).transpose(Image.Transpose.ROTATE_90), "30 x 40 pixels, but"),
        (lambda v: photo(), "colours"),
    ],
)
def test_a_bad_mask_is_a_bad_image(tmp_path, mask, reason):
    root = folders(tmp_path)
    (root / "classes.txt").write_text("a\nb\nc\n")
    mask(labels(1)).save(root / "masks/val/1.png")
    data = build(root, "SEG_FOLDER")
    with pytest.raises(
        UserError, match=f"images/val/1.jpg: its label map masks/val/1.png: {reason}"
    ) as error:
        list(data.val_batches())
    assert "--bad-images skip" in one_line(error)
    data = build(root, "SEG_FOLDER", "--bad-images", "skip")
    assert [batch.indices.tolist() for batch in data.val_batches()] == [[0], [2]]
    (found,) = data.bad_images.found.values()
    assert found.startswith("its label map masks/val/1.png: ")


def test_files_that_cannot_be_decoded(tmp_path):
    root = folders(tmp_path)
    (root / "classes.txt").write_text("a\nb\nc\n")
    (root / "masks/val/0.png").write_bytes(b"")
    (root / "images/val/1.jpg").write_bytes(b"no image")
    data = build(root, "SEG_FOLDER", "--bad-images", "skip")
    assert [batch.indices.tolist() for batch in data.val_batches()] == [[2]]
    assert list(data.bad_images.found.values()) == [
        "its label map masks/val/0.png: the file is empty",
        "not an image in a known format (JPEG, PNG, WEBP, BMP, PPM, TIFF, GIF)",
    ]


def oriented(root, orientation, size=(WIDTH, HEIGHT)):
    """A red dot in the corner of the stored pixels, and its class in the stored corner."""
    pixels = Image.new("RGB", size, "black")
    pixels.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels.save(root / "images/val/0.jpg", quality=95, exif=exif)
    mask = np.zeros(size[::-1], np.uint8)
    mask[:8, :8] = 1
    return Image.fromarray(mask), root / "masks/val/0.png"


def agree(example) -> bool:
    red = np.asarray(example.image)[..., 0] > 100
    return red.sum() == 64 and np.array_equal(red, example.target.numpy() == 1)


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (32, 32)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_of_the_stored_pixels_is_turned_with_its_image(tmp_path, orientation, size):
    root = folders(tmp_path)
    mask, file = oriented(root, orientation, size)
    mask.save(file)
    example = build(root, "SEG_FOLDER").val.load(0)
    assert example.image.size == (size[::-1] if orientation > 4 else size)
    assert agree(example)


@pytest.mark.parametrize("orientation", range(5, 9))
def test_a_mask_of_the_upright_image_stays(tmp_path, orientation):
    root = folders(tmp_path)
    mask, file = oriented(root, orientation)
    turn = {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}[orientation]
    mask.transpose(Image.Transpose[turn]).save(file)
    assert agree(build(root, "SEG_FOLDER").val.load(0))
