"""A second task, all of it in this file: how bright is an image?

It is trained, interrupted, resumed, evaluated, swept, drawn and reported by the same programs as
classification. A new task is what comes before the tests: a data set, a head, a criterion, a meter
and measures.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import datasets
import main
import predict
import report
import tasks
import visualize
from datasets import DataSet, register_data_set
from loading.images import Example, ImageSet
from loading.transforms import Transforms
from models.build import build_model
from tasks import Measure, Task, exact_sum, register
from utils import preemption
from utils.arguments import ratio
from utils.errors import UsageError, UserError

SIZE = 16


class Squares(ImageSet):
    """Grey squares on black; the target is the mean brightness in [0, 1]."""

    def __init__(self, path, split: str):
        super().__init__()
        self.first, self.count = (0, 16) if split == "train" else (1000, 10)

    def __len__(self):
        return self.count

    def load(self, index):
        random = np.random.RandomState(self.first + index)
        pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
        top, left = random.randint(0, SIZE // 2, 2)
        pixels[top : top + SIZE // 2, left : left + SIZE // 2] = random.randint(256)
        return Example(Image.fromarray(pixels), pixels.mean() / 255)

    def describe(self, index):
        return f"square {self.first + index}"


def to_tensors(image: Image.Image, brightness: float) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    return pixels - 0.5, torch.tensor(brightness, dtype=torch.float32)


def brightness_terms(result, targets: Tensor) -> dict[str, Tensor]:
    return {"brightness": F.l1_loss(result.logits[:, 0].float(), targets)}


class ErrorMeter:
    """Mean absolute error, and the share of the images within the tolerance."""

    def __init__(self, tolerance: float, device: torch.device):
        self.tolerance = tolerance
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, batch, result):
        errors = (result.logits[:, 0].float() - batch.targets).abs()
        within = (errors < self.tolerance).sum().double()
        self.totals += torch.stack([within.new_tensor(len(errors)), exact_sum(errors), within])

    def compute(self, distributed):
        images, error, within = distributed.all_reduce_sum(self.totals).tolist()
        return {"mae": error / images, "within": 100 * within / images}


class Brightness(Task):
    name = "brightness"
    measures = (
        Measure("mae", "mean error", "mae", format="{:.4f}", higher_is_better=False),
        Measure("within", "within tolerance", "within", unit="%"),
    )
    recorded = ("tolerance",)

    def add_arguments(self, parser):
        group = parser.add_argument_group("brightness")
        group.add_argument("--tolerance", type=ratio, default=0.1)

    def transforms(self, args, img_size, train):
        return Transforms(to_tensors, to_tensors)

    def model(self, spec, num_classes):
        model = build_model(spec, 1)
        model.head = nn.Sequential(nn.LayerNorm(model.embed_dim), nn.Linear(model.embed_dim, 1))
        return model

    def criterion(self, args):
        return brightness_terms

    def distillation(self, result, teacher_result):
        return {"answer": F.mse_loss(result.logits.float(), teacher_result.logits.float())}

    def predict(self, model, images):
        """Mean over an image and its mirror image."""
        result, mirrored = model(images), model(images.flip(-1))
        kept = [torch.cat(both) for both in zip(result.kept, mirrored.kept, strict=True)]
        gates = torch.cat([result.gates, mirrored.gates], dim=1)
        logits = (result.logits + mirrored.logits) / 2
        return dataclasses.replace(result, logits=logits, gates=gates, kept=kept)

    def image_transform(self, args, img_size):
        return lambda image: to_tensors(image, 0.0)[0]

    def meter(self, args, data, device):
        return ErrorMeter(args.tolerance, device)


class Alone(Brightness):
    """The same without a teacher: a dynamic model that its budgets alone teach to drop tokens."""

    name = "brightness-alone"
    distils = False


@pytest.fixture(scope="module", autouse=True)
def registered():
    rows = {"SQUARES": register(Brightness()).name, "ALONE": register(Alone()).name}
    for name, task in rows.items():
        register_data_set(DataSet(name, task, Squares))
    yield
    for name, task in rows.items():
        del datasets.DATA_SETS[name], tasks.TASKS[task]


MODEL = ["--model-kwargs", "embed_dim=16", "depth=4", "--input-size", str(SIZE)]
HERE = ["--num-workers", "0", "--device", "cpu", "--throughput-seconds", "0"]
TRAINING = ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "8", "--lr", "1e-2"]
TRAINING += ["--tolerance", "0.2"]  # recorded: an evaluation need not repeat it
FLAGS = ["--data-set", "SQUARES", *MODEL, *HERE, *TRAINING, "--no-repeated-aug"]
DYNAMIC = ["--method", "dyvm", "--pruning-layers", "1", "2"]


def train(output, *flags, code=0):
    assert main.main([*FLAGS, "--output_dir", str(output), *map(str, flags)]) == code


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    output = tmp_path_factory.mktemp("dense")
    train(output)
    return output


@pytest.fixture(scope="module")
def dynamic(dense, tmp_path_factory):
    output = tmp_path_factory.mktemp("dynamic")
    train(output, *DYNAMIC, "--model-path", dense / "best_checkpoint.pth")
    return output


def logged(output):
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


def test_the_measures_are_in_the_log_and_in_the_evaluation(dense, dynamic):
    for output in (dense, dynamic):
        lines = logged(output)
        assert {"test_mae", "test_within", "test_ema_mae", "best_mae"} <= lines[0].keys()
        assert not any("acc" in name or "loss" in name for name in lines[0] if "test" in name)
        errors = [line["test_mae"] for line in lines]
        assert [line["best_mae"] for line in lines] == [errors[0], min(errors)]
    evaluated = read(dynamic / "eval.json")
    assert {"mae", "within", "ema_mae", "flops"} <= evaluated["dynamic"].keys()
    assert evaluated["dense"]["mae"] == read(dense / "eval.json")["dense"]["mae"]
    assert evaluated["dense"]["mae"] == min(line["test_mae"] for line in logged(dense))
    assert evaluated["images"] == 10 and 0 <= evaluated["dynamic"]["within"] <= 100
    assert {"train_brightness", "train_answer", "train_token_ratio"} <= logged(dynamic)[0].keys()


def test_an_interrupted_run_goes_on(dense, dynamic, tmp_path, monkeypatch):
    recipe = [*DYNAMIC, "--model-path", dense / "best_checkpoint.pth"]
    with monkeypatch.context() as patch:
        answers = iter([True])
        patch.setattr(preemption, "requested", lambda: next(answers, False))
        patch.setattr(preemption, "received", lambda: "SIGTERM")
        train(tmp_path, *recipe, code=preemption.EXIT_CODE)
    train(tmp_path, *recipe, "--resume", "auto")
    assert logged(tmp_path) == logged(dynamic)
    ends = [
        torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (tmp_path, dynamic)
    ]
    assert all(torch.equal(ends[0]["model"][key], value) for key, value in ends[1]["model"].items())
    assert ends[0]["task"] == "brightness"


def test_evaluation_sweep_pictures_and_report(dynamic, dense, tmp_path, capsys):
    checkpoint = ["--model-path", str(dynamic / "best_checkpoint.pth")]
    evaluation = ["--eval", *checkpoint, "--output_dir", str(tmp_path), *HERE]
    assert main.main(evaluation) == 0
    table = capsys.readouterr().out
    again, trained = read(tmp_path / "eval.json"), read(dynamic / "eval.json")
    assert again["dynamic"] == trained["dynamic"] and again["dense"] == trained["dense"]
    assert 0 < again["dynamic"]["within"] < 100
    assert "mean error of the EMA" in table and f"{again['dynamic']['mae']:.4f}" in table
    assert main.main([*evaluation, "--tolerance", "1"]) == 0
    assert read(tmp_path / "eval.json")["dynamic"]["within"] == 100
    assert main.main([*evaluation, "--sweep", "0.5:1:0.5"]) == 0
    assert (tmp_path / "sweep.csv").read_text().startswith("token_keep_ratio,trained,mae,within,")
    assert {"gates.csv", "sample1.png"} <= {
        path.name for path in (tmp_path / "decisions").iterdir()
    }
    assert not (tmp_path / "decisions" / "gates_per_class.csv").exists()

    report.main([str(tmp_path), str(dense), "--output", str(tmp_path / "report.html")])
    text = (tmp_path / "report.html").read_text()
    assert "within tolerance, %" in text and f"{again['dynamic']['mae']:.4f}" in text
    assert "Mean error against operations" in text and "test_mae over the epochs" in text
    assert "top-1" not in text

    picture = tmp_path / "square.png"
    Squares(None, "val").load(0).image.save(picture)
    drawn = ["--images", str(picture), "--output_dir", str(tmp_path / "drawn")]
    visualize.main([*checkpoint, *drawn, *HERE[:4]])
    assert (tmp_path / "drawn" / "square.png").exists()
    with pytest.raises(UserError, match="is a model for brightness; predict.py names the classes"):
        predict.main([*checkpoint, str(picture), *HERE[:4]])


def test_a_dynamic_model_learns_its_budgets_without_a_teacher(tmp_path):
    train(tmp_path, *DYNAMIC, "--data-set", "ALONE", "--accum-steps", 2)
    line = logged(tmp_path)[0]
    terms = ("brightness", "token_ratio", "block_ratio")
    assert line["train_loss"] == pytest.approx(sum(line[f"train_{term}"] for term in terms))
    assert not {"train_answer", "train_token_distill"} & line.keys()


def test_flags_and_checkpoints_of_another_task_are_refused(dynamic, tmp_path):
    with pytest.raises(UsageError, match="unrecognized arguments: --mixup 0"):
        train(tmp_path, "--mixup", 0)
    with pytest.raises(UsageError, match="unrecognized arguments: --tolerance 1"):
        main.main(["--tolerance", "1"])
    checkpoint = str(dynamic / "best_checkpoint.pth")
    with pytest.raises(UsageError, match="trained for brightness; the data set is of class"):
        main.main(["--eval", "--model-path", checkpoint, "--data-set", "DIGITS", *HERE])


def test_a_report_of_a_task_that_is_unknown_here(dynamic, tmp_path, monkeypatch):
    monkeypatch.delitem(tasks.TASKS, "brightness")
    report.main([str(dynamic), "--output", str(tmp_path / "report.html")])
    text = (tmp_path / "report.html").read_text()
    assert "its measures are left out" in text and "MFLOPs, exact" in text


def test_an_unknown_flag_of_another_task_is_explained():
    for flag, task, data_set in (
        ("--decoder", "segmentation", "VOC"),
        ("--num-frames", "video", "K400"),
    ):
        with pytest.raises(UsageError, match=f"{flag} is a flag of {task}, so of .*{data_set}"):
            main.main([f"{flag}=8"])
    with pytest.raises(UsageError, match=r"unrecognized arguments: --nonsense 1 \(see"):
        main.main(["--nonsense", "1"])
