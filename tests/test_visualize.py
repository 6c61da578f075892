"""visualize.py: what it writes for every kind of model, and what it says to bad input."""

import csv

import numpy as np
import pytest
import torch
from helpers.seeing import DYNAMIC, SMALL, planted, save_images, save_model
from PIL import Image

import visualize
from drawing.sheets import COLUMNS, ROWS
from evaluation.decisions import DecisionMeter
from evaluation.inference import build_parser, load_predictor
from evaluation.samples import PictureNames
from loading.loaders import Batch
from models.flops import count_flops
from tasks import CLASSIFICATION
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.distributed import Distributed
from utils.errors import UsageError, UserError

FLAGS = SMALL[-4:]  # no workers, on the CPU; what the model is comes from the checkpoint


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("dynamic") / "model.pth", *DYNAMIC)


def draw(model, images, output, *flags):
    visualize.main(
        [
            "--model-path",
            str(model),
            "--images",
            str(images),
            "--output_dir",
            str(output),
            *FLAGS,
            *flags,
        ]
    )
    return sorted(path.name for path in output.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        DYNAMIC,
        [*DYNAMIC, "--method", "token"],
        [*DYNAMIC, "--method", "block"],
        [*DYNAMIC, "--token-strategy", "random"],
        [*DYNAMIC, "--token-strategy", "static"],
        [*DYNAMIC, "--reduction", "prune+merge"],
        [*DYNAMIC, "--reduction", "mtr"],
        [*DYNAMIC, "--scorer-input", "B"],
        [*DYNAMIC, "--scorer-input", "delta"],
        [*DYNAMIC, "--model", "videomamba_tiny"],
        [*DYNAMIC, "--model", "mambareg_small", "--input-size", "64"],
        ["--model", "mambareg_tiny"],
        [*DYNAMIC, "--token-keep-ratio", "0.1"],
    ],
)
def test_all_families_and_variants(flags, tmp_path, caplog):
    if "--model" in flags:
        kwargs = ["--model-kwargs", "embed_dim=16", "depth=4"]
        if "mambareg" in flags[flags.index("--model") + 1]:
            kwargs += ["num_registers=4", "register_reduction=2"]
        flags = [*flags, *kwargs]
    model = save_model(tmp_path / "model.pth", *flags)
    planted((60, 40)).save(tmp_path / "image.png")
    assert draw(model, tmp_path / "image.png", tmp_path / "out") == ["image.png"]
    panels = 1 if "block" in flags or "--pruning-layers" not in flags else 4
    strip = Image.open(tmp_path / "out/image.png")
    assert strip.width // 310 == panels + 1  # panels of 300 pixels and what is written beside them


def test_a_folder_gives_strips_a_contact_sheet_and_a_table(dynamic, tmp_path, caplog):
    caplog.set_level("INFO")
    images = save_images(tmp_path / "images", 3)
    save_images(images / "more", 1)
    planted((300, 40)).save(images / "000.jpg")
    (images / "broken.jpg").write_bytes(b"no image")
    names = draw(dynamic, images, tmp_path / "out")
    assert names == [
        "000.png",
        "000_png.png",
        "001.png",
        "002.png",
        "contact_sheet.png",
        "images.csv",
        "more_000.png",
    ]
    rows = list(csv.DictReader((tmp_path / "out/images.csv").open()))
    assert [row["file"] for row in rows] == [
        "000.jpg",
        "000.png",
        "001.png",
        "002.png",
        "more/000.png",
    ]
    assert all(0 < int(row["exact_flops"]) < int(row["dense_exact_flops"]) for row in rows)
    assert "broken.jpg: not an image" in caplog.text
    assert "5 of 6 images drawn" in caplog.text


def test_contact_sheets_are_written_page_by_page(dynamic, tmp_path):
    """Thousands of images must not be held: a page leaves memory when it is full."""
    from drawing.sheets import ContactSheets

    image, said = (
        planted((30, 30)),
        visualize.ImageReport("x", [("a", 1.0)], [np.arange(5)], None, 1.0, 2.0, (1,)),
    )
    model = load_predictor(build_parser("x", "x"), ["--model-path", str(dynamic), *FLAGS]).model
    sheets = ContactSheets(tmp_path)
    for number in range(COLUMNS * ROWS + 1):
        assert (tmp_path / "contact_sheet.png").exists() == (number == COLUMNS * ROWS)
        sheets.add(image, (0, 0, 30, 30), model, said)
    sheets.close()
    full, last = (
        Image.open(tmp_path / name) for name in ("contact_sheet.png", "contact_sheet_2.png")
    )
    assert full.height > 4 * last.height


def test_a_dense_model_shows_the_rest(tmp_path, caplog):
    caplog.set_level("INFO")
    model = save_model(tmp_path / "model.pth")
    planted((40, 40)).save(tmp_path / "image.png")
    assert draw(model, tmp_path / "image.png", tmp_path / "out") == ["image.png"]
    assert "is a dense model: it drops no tokens and has no gates to show" in caplog.text
    assert "100.0 % of the dense model's operations" in caplog.text


def test_bad_input(dynamic, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in this folder"):
        draw(dynamic, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="nothing in it could be read"):
        draw(dynamic, tmp_path / "nowhere.png", tmp_path / "out")
    images = save_images(tmp_path / "images", 1)
    with pytest.raises(UsageError, match="lies in --images"):
        draw(dynamic, images, images / "out")
    with pytest.raises(UsageError, match="--model-path is needed.*visualize.py --help"):
        visualize.main(["--images", "x", "--output_dir", "y"])
    with pytest.raises(UserError, match="no average of the weights"):
        draw(dynamic, images, tmp_path / "out", "--ema")
    headless = load_checkpoint(dynamic)
    del headless["model"]["head.weight"]
    save_checkpoint(headless, tmp_path / "headless.pth")
    with pytest.raises(UserError, match="no head.weight"):
        draw(tmp_path / "headless.pth", images, tmp_path / "out")


def test_the_average_of_the_weights_can_be_shown(dynamic, tmp_path):
    other = load_checkpoint(save_model(tmp_path / "other.pth", *DYNAMIC, seed=1))["model"]
    model = save_model(tmp_path / "model.pth", *DYNAMIC, ema=other)
    predictor = load_predictor(
        build_parser("x", "x"), ["--model-path", str(model), "--ema", *FLAGS]
    )
    assert all((predictor.model.state_dict()[key] == value).all() for key, value in other.items())


def test_costs_of_images_average_to_the_cost_of_the_data_set(dynamic, tmp_path):
    """Totals over batches of several classes, and their tables, against the same from the results
    at once.
    """
    predictor = load_predictor(build_parser("x", "x"), ["--model-path", str(dynamic), *FLAGS])
    counter = DecisionMeter(predictor.model, predictor.class_names, CLASSIFICATION.labels)
    images, targets = torch.randn(11, 3, 32, 32), torch.tensor([0, 1, 2, 2, 0, 9, 9, 9, 3, 1, 0])
    results = predictor.forward(images)
    for part in (slice(0, 7), slice(7, 11)):
        counter.update(
            Batch(images[part], targets[part], torch.arange(11)[part]),
            predictor.forward(images[part]),
        )
    totals = counter.compute(Distributed(torch.device("cpu")))["decisions"]
    assert 0.05 < results.gates.mean() < 0.95
    assert len(set(totals.costs.tolist())) > 1
    assert totals.costs.mean() == pytest.approx(
        count_flops(predictor.model, results.gates.mean(dim=1)).exact
    )
    np.testing.assert_allclose(totals.gates, results.gates.mean(dim=1))
    np.testing.assert_allclose(totals.gates_per_class[9], results.gates[:, 5:8].mean(dim=1))
    assert np.isnan(totals.gates_per_class[4]).all()
    for stage, kept in zip(totals.keep, results.kept, strict=True):
        assert stage.sum() == pytest.approx(kept.shape[1])
        assert stage[7] == pytest.approx((kept == 7).any(dim=1).float().mean().item())
    totals.write(tmp_path)
    table = np.loadtxt(tmp_path / "gates.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(table[:, 1:3], totals.gates, rtol=1e-5)
    assert table[:, 3].tolist() == [0, 1, 2, 3]
    assert np.loadtxt(tmp_path / "keep_maps.csv", delimiter=",", skiprows=1).shape == (64, 4)
    assert len((tmp_path / "costs.csv").read_text().splitlines()) == 12
    assert len((tmp_path / "gates_per_class.csv").read_text().splitlines()) == 11
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".png"}


def test_names_of_pictures_fit_a_file():
    """255 bytes on most file systems, and less while a file is being written."""
    names = PictureNames()
    long = [f"{'a' * 130}/{'é' * 130}/{number}.png" for number in range(3)]
    given = [names.name(name) for name in (*long, "b/x.png", "b/x.jpg")]
    assert given[3:] == ["b_x.png", "b_x_jpg.png"]
    assert len(set(given)) == 5 and all(len(name.encode()) < 230 for name in given)
    assert given[2].endswith("é_2.png"), "the end of a path tells more than its start"
