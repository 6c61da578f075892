"""predict.py: classes and probabilities as text and as JSON, and what it says to bad input."""

import json

import pytest
from helpers.seeing import DYNAMIC, SMALL, planted, save_images, save_model

import predict
from evaluation.inference import build_parser, load_predictor
from loading.folders import find_images
from loading.images import FileImages
from loading.transforms import eval_transform
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UsageError, UserError

FLAGS = SMALL[-4:]
pytestmark = pytest.mark.usefixtures("as_a_process_of_its_own")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(
        tmp_path_factory.mktemp("model") / "model.pth",
        *DYNAMIC,
        classes=["ant", "bee", "cat", "dog", "eel", "fox"],
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), 5)


def test_text_in_the_order_of_the_files_with_unreadable_ones_named(model, images, capsys, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"broken")
    predict.main(
        [
            "--model-path",
            str(model),
            str(images / "004.png"),
            str(tmp_path / "broken.png"),
            str(tmp_path / "missing.png"),
            str(images / "001.png"),
            *FLAGS,
        ]
    )
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [
        str(images / "004.png"),
        str(images / "001.png"),
    ]
    assert f"{tmp_path}/broken.png: not an image in a known format" in err
    assert f"{tmp_path}/missing.png: No such file" in err


def test_json_agrees_with_the_model(model, images, capsys, tmp_path):
    (tmp_path / "empty.png").touch()
    predict.main(
        [
            "--model-path",
            str(model),
            str(images),
            str(tmp_path / "empty.png"),
            "--json",
            "--top",
            "3",
            "--batch-size",
            "2",
            *FLAGS,
        ]
    )
    entries = json.loads(capsys.readouterr().out)
    assert len(entries) == 6
    assert entries[-1] == {"file": str(tmp_path / "empty.png"), "error": "the file is empty"}
    predictor = load_predictor(build_parser("x", "x"), ["--model-path", str(model), *FLAGS])
    transform = eval_transform(predictor.args, predictor.img_size)
    probabilities = predictor.forward(transform(planted((40, 30), 2))[None]).logits.softmax(-1)[0]
    assert entries[2]["class"] == probabilities.argmax()
    assert entries[2]["name"] == predictor.class_names[entries[2]["class"]]
    assert entries[2]["probability"] == pytest.approx(probabilities.max().item(), rel=1e-4)
    assert [e["probability"] for e in entries[2]["top"]] == pytest.approx(
        probabilities.topk(3)[0].tolist(), rel=1e-4
    )


def test_thousands_of_images_are_not_held_in_memory(model, images, monkeypatch):
    """Entries come while later files are still unread."""
    read = []
    load = FileImages.load
    monkeypatch.setattr(
        FileImages, "load", lambda self, index: read.append(index) or load(self, index)
    )
    predictor = load_predictor(
        build_parser("x", "x"), ["--model-path", str(model), "--batch-size", "4", *FLAGS]
    )
    entries = predict.predictions(predictor, find_images([str(images)] * 400), top=1)
    next(entries)
    assert len(read) <= 8


def test_class_names(model, images, capsys, tmp_path, caplog):
    def names(checkpoint, *flags):
        return load_predictor(
            build_parser("x", "x"), ["--model-path", str(checkpoint), *FLAGS, *flags]
        ).class_names

    (tmp_path / "names.txt").write_text("a\nb\n\nc\nd\ne\nf\n")
    assert names(model, "--class-names", str(tmp_path / "names.txt")) == list("abcdef")
    (tmp_path / "names.json").write_text(
        '{"0": ["n1", "tench"], "1": "b", "2": "c", "3": "d", "4": "e", "5": "f"}'
    )
    assert names(model, "--class-names", str(tmp_path / "names.json"))[:2] == ["tench", "b"]
    wordnet = save_model(tmp_path / "wordnet.pth", *DYNAMIC, classes=["n01440764", "own class"])
    assert names(wordnet)[0].startswith("tench") and names(wordnet)[1] == "own class"
    nameless = save_model(tmp_path / "nameless.pth", *DYNAMIC, class_names=None)
    assert names(nameless)[3] == "class 3"
    assert "holds no class names: their numbers are shown; give --class-names" in caplog.text
    imagenet = save_model(
        tmp_path / "imagenet.pth", *DYNAMIC, classes=range(1000), class_names=None
    )
    assert names(imagenet)[0].startswith("tench")
    for content, message in (
        ("a\nb\n", "2 names, and the model has 6 classes"),
        ("[1,", "not JSON"),
        ('{"1": "x"}', "no name for class '0'"),
    ):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(UserError, match=message):
            names(model, "--class-names", str(tmp_path / "bad"))
    (tmp_path / "bad").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        names(model, "--class-names", str(tmp_path / "bad"))
    with pytest.raises(UserError, match="No such file"):
        names(model, "--class-names", str(tmp_path / "nowhere"))


def test_nothing_readable_is_an_error(model, tmp_path, capsys):
    with pytest.raises(UserError, match="the file could not be read as an image"):
        predict.main(["--model-path", str(model), str(tmp_path / "none.png"), *FLAGS])
    with pytest.raises(UserError, match="no images in this folder"):
        predict.main(["--model-path", str(model), str(tmp_path), *FLAGS])


def test_fp16_needs_a_gpu(model, images):
    with pytest.raises(UsageError, match="--amp fp16 needs a GPU"):
        predict.main(["--model-path", str(model), str(images), "--amp", "fp16", *FLAGS])


def test_answers_that_are_not_finite_are_none(tmp_path, images, capsys):
    """As of a model whose numbers grow too large: no class, and no NaN in the JSON."""
    path = save_model(tmp_path / "nan.pth")
    checkpoint = load_checkpoint(path)
    checkpoint["model"]["head.weight"][3] = 3e38
    save_checkpoint(checkpoint, path)
    with pytest.raises(UserError, match="the model's answer is not finite"):
        predict.main(["--model-path", str(path), str(images), "--json", *FLAGS])
    out, err = capsys.readouterr()
    entries = json.loads(out, parse_constant=pytest.fail)
    assert [set(entry) for entry in entries] == [{"file", "error"}] * 5
    assert err.count("the model's answer is not finite (NaN)") == 5
