"""What people see of segmenters: colours, overlays, comparisons, charts, predict.py, the report."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.scenes import CLASSES, IGNORED, save_scenes
from helpers.seeing import DYNAMIC, SMALL, save_images, save_model
from PIL import Image

import main
import predict
import report
import visualize
from drawing import plots
from drawing.class_colours import appearances, class_colours, label_colours
from drawing.class_plots import confusion_of_worst, iou_bars, worst_classes
from drawing.page import svg
from drawing.palette import ACCENT, rgb
from drawing.segmentation import (
    OPACITY,
    PALE,
    WRONG,
    borders,
    draw_comparison,
    draw_overlay,
    error_share,
    errors,
    label_map,
    legend_rows,
    overlay,
)
from drawing.strips import strip_layout
from evaluation.inference import build_parser, load_predictor
from models import Result
from tasks.segmentation import SEGMENTATION
from tasks.segmentation_pictures import frozen_text, labels_at, read_class_scores
from tasks.sliding_window import labels_of
from utils.errors import UsageError, UserError

HERE = SMALL[-4:]
MODEL = [*SMALL[:3], "patch_size=8", "--input-size", "32", "--decoder", "light"]
TRAINING = ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "8", "--lr", "1e-2"]
pytestmark = pytest.mark.usefixtures("as_a_process_of_its_own")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return save_scenes(tmp_path_factory.mktemp("scenes") / "data")


@pytest.fixture(scope="module")
def dense(scenes, tmp_path_factory):
    return train(scenes, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def dynamic(scenes, dense, tmp_path_factory):
    teacher = ["--model-path", str(dense / "best_checkpoint.pth")]
    return train(scenes, tmp_path_factory.mktemp("dynamic"), *DYNAMIC, *teacher)


def train(scenes, output, *flags):
    data = ["--data-set", "SEG_FOLDER", "--data-path", str(scenes), "--unscale-lr"]
    flags = [*data, *MODEL, *HERE, *TRAINING, "--throughput-seconds", "0", *flags]
    assert main.main([*flags, "--output_dir", str(output)]) == 0
    return output


def test_colours_are_distinct_with_and_without_colour_vision():
    colours = class_colours()
    assert colours.shape == (255, 3) and len(np.unique(label_colours(), axis=0)) == 256
    places = appearances(colours)
    distances = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1)
    distances[:, np.arange(255), np.arange(255)] = np.inf
    # Of Oklab's distances: black and white are 1 apart, 0.02 is just seen.
    full, deficient = distances[0], distances[1:].min(axis=0)
    for count, least in ((21, 0.12), (150, 0.04), (255, 0.025)):
        assert full[:count, :count].min() > least
        assert deficient[:count, :count].min() > 0.45 * least
    # The same for ever: label maps of different runs are compared.
    assert colours[:3].tolist() == [[47, 111, 179], [170, 255, 0], [255, 34, 0]]


def test_an_overlay_blends_labels_and_shows_their_borders():
    image = np.full((8, 9, 3), 100, np.uint8)
    labels = np.zeros((8, 9), np.uint8)
    labels[:, 4:] = 3
    picture = overlay(image, labels)
    colours = class_colours()
    assert (picture[:, [3, 4]] == colours[[0, 3]]).all()
    blend = np.round(100 * (1 - OPACITY) + OPACITY * colours[3])
    assert (picture[:, 5:] == blend).all()
    wide = borders(labels, 2)
    assert wide[:, 2:6].all() and wide.sum() == 8 * 4
    assert borders(labels.T, 2).T.tolist() == wide.tolist()
    assert not borders(np.zeros((1, 1), np.uint8), 3).any()
    labels[:] = IGNORED
    hatch = overlay(image, labels)
    assert len(np.unique(hatch.reshape(-1, 3), axis=0)) == 2  # lines, and what is between them


def test_errors_of_a_hand_made_example():
    image = np.full((2, 4, 3), 55, np.uint8)
    truth = np.array([[0, 1, 2, IGNORED], [0, 1, 2, IGNORED]], np.uint8)
    prediction = np.array([[0, 1, 1, 0], [3, 1, 2, 0]], np.uint8)
    picture = errors(image, truth, prediction)
    pale = 255 - PALE * 200
    wrong = np.round((1 - WRONG) * pale + WRONG * np.array(rgb(ACCENT)))
    assert (picture[[0, 1], [2, 0]] == wrong).all()
    right = picture[[0, 0, 1, 1], [0, 1, 1, 2]]
    assert (right == round(pale)).all()
    assert (np.ptp(picture[:, 3], axis=-1) == 0).all()  # grey, though the prediction differs
    assert error_share(truth, prediction) == 2 / 6
    assert error_share(np.full_like(truth, IGNORED), prediction) is None


def test_a_legend_has_the_classes_that_occur():
    names = [f"class {label}" for label in range(20)]
    labels = np.repeat(np.arange(15), 10).astype(np.uint8)
    labels[labels == 4] = 7
    labels[:2] = IGNORED
    rows, more = legend_rows([labels], names, limit=3)
    assert [row.name for row in rows] == ["class 7", "class 1", "class 2", "no class"]
    assert rows[0].shares == (20 / 150,) and rows[-1].shares == (2 / 150,)
    assert more == 11
    other = np.full_like(labels, 19)
    rows, more = legend_rows([labels, other], names, limit=30)
    assert rows[-2] == (19, "class 19", (0.0, 1.0)) and more == 0
    assert len(rows) == 16


@pytest.mark.parametrize(
    ("size", "panel"),
    [((64, 48), (256, 192)), ((128, 128), (256, 256)), ((2000, 1500), (512, 384))],
)
def test_sizes_of_comparisons(size, panel):
    image = Image.new("RGB", size, (10, 200, 30))
    truth = np.zeros(size[::-1], np.uint8)
    truth[: size[1] // 2] = 2
    picture = draw_comparison(image, truth, truth * 0, CLASSES, "name")
    u = strip_layout(panel).unit
    step, margin = panel[0] + round(12 * u), round(12 * u)
    assert picture.width == 4 * step + round(250 * u) + 3 * margin
    pixels = np.asarray(picture)
    assert (pixels[margin : margin + panel[1], margin : margin + panel[0]] == (10, 200, 30)).all()
    panels = [
        pixels[margin : margin + panel[1], margin + i * step :][:, : panel[0]] for i in range(4)
    ]
    assert (panels[1][-1] != panels[1][0]).any() and (panels[2][-1] == panels[2][0]).all()
    assert (np.ptp(panels[3][0].astype(int), axis=-1) > 50).all()  # wrong above
    assert (np.ptp(panels[3][-1].astype(int), axis=-1) == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (3, 200), (900, 300), (3000, 2000)])
def test_any_size_can_be_drawn(size):
    labels = np.arange(size[0] * size[1]).reshape(size[::-1]) % 5
    labels[0, 0] = IGNORED
    labels = labels.astype(np.uint8)
    image = Image.new("RGB", size)
    drawn = draw_overlay(image, labels, CLASSES, "a name " * 20)
    assert 256 <= max(drawn.size) <= 2.5 * 2048
    draw_comparison(image, labels, labels, CLASSES, "")
    with pytest.raises(ValueError, match="labels of"):
        draw_overlay(image, labels.repeat(2, axis=0), CLASSES, "")


def test_a_label_map_holds_the_labels(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    label_map(labels).save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.mode == "P" and (np.asarray(image) == labels).all()
        assert (np.asarray(image.convert("RGB")) == label_colours()[labels]).all()


def test_labels_at_a_size_are_those_that_are_scored():
    torch.manual_seed(0)
    logits = torch.randn(2, 37, 6, 9)
    result = Result(logits, tokens=None, origin=None, alive=None, gates=None)
    for size in ((6, 9), (31, 20)):
        whole = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)
        for index in (0, 1):
            assert (labels_at(result, index, size) == whole[index].numpy()).all()
        assert torch.equal(labels_of(logits, size), whole)
    banded = replace(result, logits=None, labels=whole.to(torch.uint8))
    assert (labels_at(banded, 1, size) == whole[1].numpy()).all()


def confusion(count):
    random = np.random.RandomState(count)
    matrix = random.randint(0, 50, (count, count))
    matrix[np.arange(count), np.arange(count)] += random.randint(0, 40 * count, count)
    matrix[0], matrix[:, 0] = 0, 0
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    with np.errstate(invalid="ignore"):
        return matrix, 100 * np.diag(matrix) / union


@pytest.mark.parametrize("count", [1, 2, 12, 60, 150, 255])
def test_plots_of_any_number_of_classes(count, tmp_path):
    matrix, iou = confusion(count)
    names = [f"$a_ class^ $ with a long name {label}" for label in range(count)]
    figure = iou_bars(iou, names)
    values = [bar.get_width() for axes in figure.axes for bar in axes.patches]
    assert len(values) == count - 1 and values == sorted(values, reverse=True)
    assert all(len(axes.patches) <= 64 for axes in figure.axes)
    plots.save(figure, tmp_path / "iou.png")
    with Image.open(tmp_path / "iou.png") as picture:
        assert max(picture.size) < 2200
    worst = worst_classes(matrix, iou)
    assert len(worst) == min(8, count - 1) and 0 not in worst
    text = svg(confusion_of_worst(matrix, iou, names), "alt")
    shown = re.findall(r">([^<>]*)</text>", text)
    if worst:
        share = matrix[worst[0], worst[0]] / matrix[worst[0]].sum()
        assert f"{100 * share:.0f} %" in shown


def test_an_evaluation_leaves_tables_plots_and_comparisons(dense, dynamic):
    for output in (dense, dynamic):
        folder = output / "segmentation"
        tables = {"iou_per_class.csv", "iou_per_class.png", "confusion.csv", "confusion.png"}
        samples = {f"sample{number}.png" for number in (1, 2, 3, 4)}
        assert {path.name for path in folder.iterdir()} == tables | samples
        with open(folder / "iou_per_class.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["name"] for row in rows] == CLASSES
        iou = [float(row["iou"]) for row in rows if row["iou"]]
        evaluated = json.loads((output / "eval.json").read_text())
        scores = evaluated["dynamic"] or evaluated["dense"]
        assert np.mean(iou) == pytest.approx(scores["miou"], abs=1e-3)
        with open(folder / "confusion.csv", newline="") as file:
            matrix = np.array([row[1:] for row in csv.reader(file)][1:], dtype=int)
        right = np.diag(matrix).sum() / matrix.sum()
        assert 100 * right == pytest.approx(scores["aacc"])


def test_what_dropped_patches_show_is_told_beside_its_share_of_all_pixels():
    values = {
        "confusion": [[60, 12, 0], [4, 14, 0], [5, 5, 0]],
        "frozen_per_class": [0.9, 0.0, 0.1],
    }
    assert frozen_text(values, ["wall", "cat", "dog"]) == (
        "wall 90.0 % (of all pixels: 72.0 %), dog 10.0 % (of all pixels: 10.0 %)"
    )


def test_strips_say_what_is_frozen(dynamic, scenes, tmp_path, monkeypatch):
    assert (dynamic / "decisions" / "sample1.png").exists()
    with Image.open(dynamic / "kept_patches.png") as picture:
        width = 6 * (3 * 32 + 2) - 2  # all six images, in the model's size
        assert width < picture.width < width + 150  # beside the names of the rows
    texts = []
    draw = visualize.draw_strip.__globals__["ImageDraw"].ImageDraw
    write = draw.text
    monkeypatch.setattr(
        draw,
        "text",
        lambda self, at, text, *rest, **more: (
            texts.append(text),
            write(self, at, text, *rest, **more),
        ),
    )
    model = ["--model-path", str(dynamic / "best_checkpoint.pth")]
    images = ["--images", str(scenes / "images" / "val")]
    visualize.main([*model, *images, "--output_dir", str(tmp_path), *HERE])
    assert len(list(tmp_path.glob("0*.png"))) == 6 and (tmp_path / "images.csv").exists()
    assert any(text.endswith(" frozen") and "of 16" in text for text in texts)
    assert not {"dropped", "class tokens"} & set(texts) and "frozen" in texts


def predicted(capsys, model, *flags):
    predict.main(["--model-path", str(model / "best_checkpoint.pth"), *map(str, flags), *HERE])
    return capsys.readouterr()


def test_predictions_of_images_of_several_sizes(dense, scenes, capsys, tmp_path):
    folder = scenes / "images" / "val"
    (tmp_path / "bad.png").touch()
    files = [folder, tmp_path / "bad.png"]
    shown = predicted(capsys, dense, *files, "--overlay", tmp_path / "out")
    lines = shown.out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        str(file) for file in sorted(folder.iterdir())
    ]
    assert all(re.search(r"\t\w.* \d+\.\d %", line) for line in lines)
    assert f"{tmp_path}/bad.png: the file is empty" in shown.err

    entries = json.loads(predicted(capsys, dense, *files, "--json", "--top", 9).out)
    assert entries[-1] == {"file": str(tmp_path / "bad.png"), "error": "the file is empty"}
    predictor = load_predictor(
        build_parser("x", "x"), ["--model-path", str(dense / "best_checkpoint.pth"), *HERE]
    )
    transform = SEGMENTATION.of_run(predictor.args).transforms(predictor.args, 32, False).eval
    roots = {
        path.name: path
        for path in (tmp_path / "out").rglob("*.png")
        if path.parent.name == "predictions"
    }
    assert len(roots) == len(lines) == len(entries) - 1
    for entry in entries[:-1]:
        image = Image.open(entry["file"]).convert("RGB")
        [name] = [name for name in roots if name.endswith(entry["file"][-6:])]
        with Image.open(roots[name]) as map_:
            assert map_.mode == "P" and map_.size == image.size
            labels = np.asarray(map_)
        logits = predictor.forward(transform(image)[None]).logits
        assert (labels == labels_of(logits, labels.shape)[0].numpy()).all()
        shares = {part["class"]: part["share"] for part in entry["classes"]}
        counts = np.bincount(labels.reshape(-1)) / labels.size
        assert shares == {label: share for label, share in enumerate(counts) if share}
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert all(part["name"] == CLASSES[part["class"]] for part in entry["classes"])
        with Image.open(tmp_path / "out" / "overlays" / name) as drawn:
            scale = -(-256 // max(image.size))
            assert drawn.width > scale * image.width and drawn.height > scale * image.height


def test_mistakes_get_one_line(dense, scenes, tmp_path, capsys):
    folder = scenes / "images" / "val"
    with pytest.raises(UsageError, match="--overlay .* lies in .*; choose another folder"):
        predicted(capsys, dense, folder, "--overlay", folder / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to the output folder"):
        predicted(capsys, dense, folder, "--overlay", tmp_path / "file")
    classifier = save_model(tmp_path / "model.pth")
    images = save_images(tmp_path / "images", 1)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="--overlay needs a model for segmentation; .* is one for"):
        predict.main(["--model-path", str(classifier), str(images), "--overlay", str(out), *HERE])
    assert not out.exists()


def test_the_report_shows_them_in_a_section_of_their_own(dense, dynamic, tmp_path):
    report.main([str(dense), str(dynamic), "--output", str(tmp_path / "report.html")])
    text = (tmp_path / "report.html").read_text()
    assert '<h2 id="classes">By class</h2>' in text and 'href="#classes"' in text
    assert len(re.findall(r"IoU of [45] classes, from ", text)) == 2
    assert text.count("What the pixels of the classes with the lowest IoU were predicted as") == 2
    assert text.count("image, true labels, predicted labels, wrong pixels") == 8
    assert "red, box" in text


def test_a_damaged_table_is_noted(dense, tmp_path, capsys):
    folder = tmp_path / "segmentation"
    folder.mkdir()
    assert read_class_scores(folder) == []
    (tmp_path / "eval.json").write_bytes((dense / "eval.json").read_bytes())
    (tmp_path / "args.json").write_bytes((dense / "args.json").read_bytes())
    for content in ("", "class,name,iou,accuracy\n0,floor\n", "class,name,iou,accuracy\n0,a,x,1\n"):
        (folder / "iou_per_class.csv").write_text(content)
        report.main([str(tmp_path)])
        assert "segmentation: a table cannot be read" in capsys.readouterr().out
    (folder / "iou_per_class.csv").write_bytes(
        (dense / "segmentation" / "iou_per_class.csv").read_bytes()
    )
    report.main([str(tmp_path)])
    assert "confusion.csv" in capsys.readouterr().out


def test_classification_reports_have_no_such_section(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0, "test_acc1": 50.0, "best_acc1": 50.0}\n')
    (tmp_path / "args.json").write_text('{"data_set": "DIGITS"}')
    report.main([str(tmp_path)])
    assert 'id="classes"' not in (tmp_path / "report.html").read_text()
    assert "By class" not in (tmp_path / "report.html").read_text()
