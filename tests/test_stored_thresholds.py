"""predict.py and visualize.py as a whole with the thresholds of tokens that a checkpoint holds."""

import csv
import json
from pathlib import Path

import pytest
import torch
from helpers.exports import decided
from helpers.runs import evaluated, loaded
from helpers.seeing import DYNAMIC, SMALL, save_model
from PIL import Image
from sklearn.datasets import load_digits

import predict
import visualize
from loading.transforms import eval_transform
from models.build import TOKEN_THRESHOLDS, restore
from models.flops import flops_per_image
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.run_folder import CALIBRATED

pytestmark = pytest.mark.usefixtures("as_a_process_of_its_own")

IMAGE = ["--token-budget", "image"]
HERE = SMALL[-4:]
TOLD = ["--model", "dyvm_vim_micro", *SMALL[:3], *DYNAMIC]
WEIGHTS = pytest.mark.parametrize("weights", ["model", "ema"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint with an average of its weights that decides otherwise."""
    folder = tmp_path_factory.mktemp("trained")
    other = decided(save_model(folder / "other.pth", *DYNAMIC, seed=1))
    path = decided(save_model(folder / "model.pth", *DYNAMIC))
    save_checkpoint(load_checkpoint(path) | {"ema": load_checkpoint(other)["model"]}, path)
    return path


@pytest.fixture(scope="module")
def calibrated(trained, tmp_path_factory) -> Path:
    """The same, as `--eval --calibrate` writes it."""
    output = tmp_path_factory.mktemp("calibrated")
    evaluated(trained, output, *IMAGE, "--calibrate")
    return output / CALIBRATED


@pytest.fixture(scope="module")
def bare(trained, tmp_path_factory) -> Path:
    """As `calibrated`, of weights without recorded flags or an average, such as an official one."""
    output = tmp_path_factory.mktemp("bare")
    save_checkpoint({"model": load_checkpoint(trained)["model"]}, output / "bare.pth")
    evaluated(output / "bare.pth", output, *TOLD, "--data-set", "DIGITS", *IMAGE, "--calibrate")
    return output / CALIBRATED


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Twelve digits as files, which earn different numbers of tokens."""
    folder = tmp_path_factory.mktemp("digits")
    for index, pixels in enumerate(load_digits().images[:12]):
        Image.fromarray((pixels * 15.9).astype("uint8")).save(folder / f"{index:02}.png")
    return folder


def expected(calibrated: Path, digits: Path, weights: str, stored: bool = True):
    """The model with the thresholds that the checkpoint holds, its result for the digits."""
    experiment, model = loaded(calibrated)
    checkpoint = load_checkpoint(calibrated)
    restore(model, checkpoint, "", ema=weights == "ema")
    if stored:
        model.set_token_thresholds(checkpoint[TOKEN_THRESHOLDS][weights])
    transform = eval_transform(experiment.args, model.patch_embed.img_size)
    files = sorted(digits.glob("*.png"))
    with torch.no_grad():
        images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        return model, model(images)


def flags_of(weights: str) -> list[str]:
    return [*IMAGE, *HERE, *(["--ema"] if weights == "ema" else [])]


def probabilities(capsys, path: Path, digits: Path, *flags: str) -> torch.Tensor:
    """Of each digit's likeliest class, as predict.py prints them."""
    capsys.readouterr()
    predict.main(["--model-path", str(path), "--json", str(digits), *flags])
    return torch.tensor([each["probability"] for each in json.loads(capsys.readouterr().out)])


@WEIGHTS
def test_predictions(calibrated, digits, capsys, weights):
    """Whatever images share a batch, and not those of a fixed number of tokens."""
    _, result = expected(calibrated, digits, weights)
    assert len(result.counts[0].unique()) > 1, "the test needs images that keep different numbers"
    wanted = result.logits.softmax(1).amax(1)
    for size in "1", "5", "32":
        found = probabilities(capsys, calibrated, digits, *flags_of(weights), "--batch-size", size)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    _, fixed = expected(calibrated, digits, weights, stored=False)
    assert (fixed.logits.softmax(1).amax(1) - wanted).abs().max() > 1e-3


@WEIGHTS
def test_pictures(calibrated, digits, tmp_path, weights):
    """images.csv has the cost of what each image keeps."""
    words = ["--images", str(digits), "--output_dir", str(tmp_path), "--model-path"]
    visualize.main([*words, str(calibrated), *flags_of(weights)])
    model, result = expected(calibrated, digits, weights)
    wanted = flops_per_image(model, result.gates, result.counts).exact
    rows = list(csv.DictReader((tmp_path / "images.csv").open()))
    assert [int(row["exact_flops"]) for row in rows] == wanted.long().tolist()
    assert len({*wanted.tolist()}) > 1
    assert len(list(tmp_path.glob("[01]*.png"))) == len(rows) == 12


def test_the_average_has_thresholds_of_its_own(calibrated):
    held = load_checkpoint(calibrated)[TOKEN_THRESHOLDS]
    assert held["model"] != held["ema"] and len(held["model"]) == len(held["ema"]) == 3


def test_a_checkpoint_that_records_no_flags(bare, digits, tmp_path, capsys):
    """The flags say what it is, and the thresholds hold for these alone."""
    assert "args" not in load_checkpoint(bare)
    told = [*TOLD, *HERE]
    found = probabilities(capsys, bare, digits, *told, *IMAGE)
    alone = probabilities(capsys, bare, digits, *told, *IMAGE, "--batch-size", "1")
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
    assert (found - probabilities(capsys, bare, digits, *told)).abs().max() > 1e-3
    words = ["--images", str(digits), "--output_dir", str(tmp_path), "--model-path", str(bare)]
    visualize.main([*words, *told, *IMAGE])
    rows = list(csv.DictReader((tmp_path / "images.csv").open()))
    assert len({row["exact_flops"] for row in rows}) > 1
    with pytest.raises(UserError, match="holds no thresholds of tokens for these flags"):
        probabilities(capsys, bare, digits, *told, *IMAGE, "--token-keep-ratio", "0.6")
