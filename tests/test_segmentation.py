"""Segmentation as it is used: train, interrupt, resume, evaluate; what is said of mistakes."""

import json

import numpy as np
import pytest
import torch
from helpers.processes import launch
from PIL import Image

import main
import predict
from models.build import ModelSpec
from models.weights import load_weights
from tasks import segmentation, task_named
from tests.helpers.flags import tiny
from utils import preemption
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UsageError, UserError

CLASSES = ("ground", "box", "bar")
SIZE = 32


def draw(folder, split: str, count: int, seed: int) -> None:
    """Boxes and bars on the ground, with their masks; sizes differ from image to image."""
    random = np.random.RandomState(seed)
    for kind in ("images", "masks"):
        (folder / kind / split).mkdir(parents=True)
    for number in range(count):
        height, width = random.randint(SIZE, 2 * SIZE, 2)
        mask = np.zeros((height, width), np.uint8)
        top, left = random.randint(0, SIZE // 2, 2)
        mask[top : top + 12, left : left + 12] = 1
        mask[-6:] = 2
        mask[:, :2] = 255
        colours = np.array([[60, 60, 60], [200, 40, 40], [40, 40, 200]], np.uint8)
        pixels = colours[mask % 3] + random.randint(0, 40, (height, width, 1)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / split / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / split / f"{number}.png")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    draw(folder, "train", 24, seed=0)
    draw(folder, "val", 5, seed=1)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return folder


def flags(folder, *more: str) -> list[str]:
    settings = tiny(
        *("--throughput-seconds", "0", "--input-size", str(SIZE), "--decoder", "light"),
        *("--lr", "2e-3", "--unscale-lr", *more),
        batch_size=8,
        epochs=2,
        subset=24,
    )
    return ["--data-set", "SEG_FOLDER", "--data-path", str(folder), *settings]


def run(folder, output, *more, code=0) -> None:
    assert main.main([*flags(folder, *map(str, more)), "--output_dir", str(output)]) == code


DYNAMIC = ["--method", "dyvm", "--pruning-layers", "1", "2"]


@pytest.fixture(scope="module")
def dense(scenes, tmp_path_factory):
    output = tmp_path_factory.mktemp("dense")
    run(scenes, output)
    return output


@pytest.fixture(scope="module")
def student(scenes, dense, tmp_path_factory):
    output = tmp_path_factory.mktemp("student")
    run(scenes, output, *DYNAMIC, "--model-path", dense / "best_checkpoint.pth")
    return output


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    output = tmp_path_factory.mktemp("classifier")
    settings = tiny("--throughput-seconds", "0", "--input-size", "16", subset=32)
    assert main.main([*settings, "--output_dir", str(output)]) == 0
    return output / "best_checkpoint.pth"


def read(path):
    return json.loads(path.read_text())


def logged(output):
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


def test_a_dense_run_reports_iou_and_the_decoders_operations(dense):
    report = read(dense / "eval.json")
    column = report["dense"]
    assert {"miou", "macc", "aacc", "flops", "decoder_flops", "passes"} <= column.keys()
    assert len(column["iou_per_class"]) == len(CLASSES) and report["images"] == 5
    defined = [value for value in column["iou_per_class"] if value is not None]
    assert column["miou"] == pytest.approx(sum(defined) / len(defined))
    assert column["miou"] == max(line["test_miou"] for line in logged(dense))
    assert 0 < column["decoder_flops"] < column["flops"]["exact"]
    assert column["passes"] > 1, "images larger than a window"
    assert logged(dense)[0].keys() >= {"train_decode", "train_aux", "best_miou"}


def test_a_student_saves_in_the_backbone_alone(student):
    report = read(student / "eval.json")
    dense, dynamic, reduction = report["dense"], report["dynamic"], report["reduction"]
    assert dynamic["decoder_flops"] == dense["decoder_flops"]
    assert 0 < reduction["exact"] < reduction["backbone_exact"] < 1
    assert len(dynamic["keep"]) == 2 and len(dynamic["gates"]) == 4
    costs = (student / "decisions" / "costs.csv").read_text().split()[1:]
    assert len(costs) == report["images"] and dynamic["passes"] > 1
    mean = sum(map(int, costs)) / len(costs)
    assert mean == pytest.approx(dynamic["flops"]["exact"], rel=1e-5)
    terms = {"train_pixel_kl", "train_token_distill", "train_token_ratio", "train_block_ratio"}
    assert terms <= logged(student)[0].keys()


def test_evaluation_needs_no_repeated_flags(student, scenes, tmp_path):
    checkpoint = ["--eval", "--model-path", str(student / "best_checkpoint.pth")]
    here = ["--device", "cpu", "--num-workers", "0", "--throughput-seconds", "0"]
    assert main.main([*checkpoint, *here, "--output_dir", str(tmp_path)]) == 0
    again, trained = read(tmp_path / "eval.json"), read(student / "eval.json")
    assert again["dynamic"] == trained["dynamic"] and again["dense"] == trained["dense"]
    for mode in (["--flip-test"], ["--eval-mode", "whole"], ["--eval-short-side", "0"]):
        assert main.main([*checkpoint, *here, *mode, "--output_dir", str(tmp_path)]) == 0
        other = read(tmp_path / "eval.json")["dynamic"]
        assert 0 <= other["miou"] <= 100
        assert (other["passes"] == 1) == (mode[-1] == "whole")
        assert other["passes"] != trained["dynamic"]["passes"]
    assert (
        main.main([*checkpoint, *here, "--sweep", "0.5:1:0.5", "--output_dir", str(tmp_path)]) == 0
    )
    assert (tmp_path / "sweep.csv").read_text().startswith("token_keep_ratio,trained,miou,macc,")


def test_an_image_too_large_for_its_logits_is_labelled_in_bands(student, tmp_path, monkeypatch):
    checkpoint = ["--eval", "--model-path", str(student / "best_checkpoint.pth")]
    here = ["--device", "cpu", "--num-workers", "0", "--throughput-seconds", "0"]
    reports = []
    usual = segmentation.MOST_LOGITS
    for most in (usual, 1):
        monkeypatch.setattr(segmentation, "MOST_LOGITS", most)
        flags = [*checkpoint, *here, "--eval-short-side", "0", "--output_dir", str(tmp_path)]
        assert main.main(flags) == 0
        reports.append(read(tmp_path / "eval.json"))
    assert reports[0] == reports[1]
    for most in (1, usual):
        monkeypatch.setattr(segmentation, "MOST_LOGITS", most)
        assert main.main([*flags, "--flip-test"]) == 0
        reports.append(read(tmp_path / "eval.json"))
    assert reports[2] == reports[3] != reports[0]


def test_an_interrupted_run_ends_bit_identical(scenes, dense, student, tmp_path, monkeypatch):
    recipe = [*DYNAMIC, "--model-path", dense / "best_checkpoint.pth"]
    with monkeypatch.context() as patch:
        answers = iter([False, True])
        patch.setattr(preemption, "requested", lambda: next(answers, False))
        patch.setattr(preemption, "received", lambda: "SIGTERM")
        run(scenes, tmp_path, *recipe, code=preemption.EXIT_CODE)
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 2
    run(scenes, tmp_path, *recipe, "--resume", "auto")
    assert logged(tmp_path) == logged(student)
    ends = [load_checkpoint(folder / "checkpoint.pth")["model"] for folder in (tmp_path, student)]
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


def test_epochs_of_a_number_of_steps(scenes, tmp_path):
    run(scenes, tmp_path, "--epoch-steps", 5, "--sched", "poly", "--sched-on-updates",
        "--warmup-epochs", 0.4, "--min-lr", 0)  # fmt: skip
    lines = logged(tmp_path)
    rates = [line["train_lr"] for line in lines]
    steps = [2e-3 * (1 - t / 10) for t in range(10)]
    assert rates[1] == pytest.approx(sum(steps[5:]) / 5)
    assert load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 2


@pytest.mark.parametrize(
    "model, more",
    [
        ("videomamba_tiny", ["--amp", "bf16"]),
        ("mambareg_tiny", ["--grad-checkpointing"]),
        ("vim_tiny", ["--token-strategy", "random"]),
        ("vim_tiny", ["--token-strategy", "static", "--accum-steps", "2"]),
        ("vim_tiny", ["--token-strategy", "distilled", "--reduction", "prune+merge"]),
        ("vim_tiny", ["--selector-gradient", "inplace"]),
    ],
)
def test_other_families_and_strategies(scenes, tmp_path, model, more):
    small = ["--model", model, "--epochs", "1", "--subset", "16"]
    small += ["--model-kwargs", "embed_dim=16", "depth=4", "patch_size=8"]
    if model.startswith("mambareg"):
        small += ["num_registers=2", "register_reduction=1"]
    run(scenes, tmp_path / "dense", *small)
    teacher = tmp_path / "dense" / "best_checkpoint.pth"
    run(scenes, tmp_path / "dyvm", *small, *more, *DYNAMIC, "--model-path", teacher)
    line = logged(tmp_path / "dyvm")[0]
    assert line["train_loss"] > 0 and line["train_skipped_steps"] == 0
    assert ("train_selector" in line) == ("distilled" in more)


def test_a_segmenter_starts_from_a_classifier(scenes, classifier, tmp_path, caplog):
    run(scenes, tmp_path / "dense", "--model-path", classifier, "--epochs", 1)
    recipe = [*DYNAMIC, "--model-path", classifier, "--epochs", 1]
    run(scenes, tmp_path / "dynamic", *recipe)
    assert "train_pixel_kl" not in logged(tmp_path / "dynamic")[0], "a classifier is no teacher"
    report = read(tmp_path / "dynamic" / "eval.json")
    assert report["dense"]["passes"] == report["dynamic"]["passes"] > 1
    assert "miou" not in report["dense"] and 0 < report["reduction"]["backbone_exact"] < 1
    checkpoint = ["--eval", "--model-path", tmp_path / "dynamic" / "best_checkpoint.pth"]
    run(scenes, tmp_path / "again", *checkpoint)
    assert read(tmp_path / "again" / "eval.json")["dynamic"] == report["dynamic"]
    sweep = ["--sweep", "0.5:1:0.5", "--throughput-seconds", "0.2"]
    run(scenes, tmp_path / "again", *checkpoint, *sweep)
    swept = read(tmp_path / "again" / "sweep.json")
    assert all(point["images_per_s"] > 0 for point in [*swept["points"], swept["dense"]])
    assert swept["dense"]["flops"]["exact"] > swept["points"][0]["flops"]["exact"]
    run(scenes, tmp_path / "again", *checkpoint, *sweep, "--flip-test")
    flipped = read(tmp_path / "again" / "sweep.json")
    assert flipped["dense"]["passes"] == 2 * swept["dense"]["passes"], "not taken from before"
    source = load_checkpoint(classifier)
    rows = source["model"]["pos_embed"].clone()
    middle = (rows.shape[1] - 1) // 2
    rows[:, middle] = 1e6  # the class token's: it must not reach a patch
    source["model"]["pos_embed"] = rows
    args = main.options.parse(flags(scenes))
    task = task_named("segmentation").of_run(args)
    model = task.model(ModelSpec.from_args(args), 3)
    assert task.load_start(model, source, "classifier")
    assert model.pos_embed.shape[1] == model.num_patches and model.pos_embed.abs().max() < 1
    for name, value in source["model"].items():
        if name.startswith("layers."):
            assert torch.equal(model.state_dict()[name], value), name


def test_mmsegmentations_names_load_strictly(scenes, dense, tmp_path):
    """An envelope of mmcv with `backbone.*`, `decode_head.*`, `auxiliary_head.*`."""
    ours = load_checkpoint(dense / "best_checkpoint.pth")["model"]
    state = {}
    for name, value in ours.items():
        if name.startswith("head.pyramid."):
            name = name.replace("head.pyramid.", "backbone.")
        else:
            name = name.removeprefix("head.") if name.startswith("head.") else f"backbone.{name}"
        state[name] = value
    path = tmp_path / "official.pth"
    classes = tuple(f"{name} " for name in CLASSES)  # as mmsegmentation's "bed "
    torch.save({"meta": {"CLASSES": classes, "iter": 3}, "state_dict": state}, path)
    evaluation = ["--eval", "--model-path", path]
    run(scenes, tmp_path, *evaluation)
    assert (
        read(tmp_path / "eval.json")["dense"]["miou"] == read(dense / "eval.json")["dense"]["miou"]
    )
    picture = str(scenes / "images" / "val" / "0.png")
    with pytest.raises(UserError, match="does not record the flags of its segmentation model"):
        predict.main(["--model-path", str(path), picture, "--device", "cpu"])
    torch.save({"state_dict": {k: v for k, v in state.items() if "conv_seg.bias" not in k}}, path)
    with pytest.raises(UserError, match="2 missing: head.decode_head.conv_seg.bias"):
        run(scenes, tmp_path, *evaluation)


def test_rotary_embedding_and_residual_features(scenes, tmp_path):
    small = ["--model-kwargs", "embed_dim=16", "depth=4", "rope=True", "--features", "residual"]
    run(scenes, tmp_path, *small, "--epochs", 1)
    state = load_checkpoint(tmp_path / "best_checkpoint.pth")["model"]
    assert {"rope.freqs_cos", "rope.freqs_sin"} <= state.keys()
    checkpoint = ["--model-path", str(tmp_path / "best_checkpoint.pth")]
    here = ["--device", "cpu", "--num-workers", "0", "--throughput-seconds", "0"]
    again = ["--eval", *checkpoint, *here, "--output_dir", str(tmp_path / "again")]
    assert main.main(again) == 0
    assert read(tmp_path / "again" / "eval.json")["dense"] == read(tmp_path / "eval.json")["dense"]
    with pytest.raises(UsageError, match="rope is for dense models with class_token=False"):
        run(scenes, tmp_path / "dynamic", *small, *DYNAMIC, *checkpoint)


def test_parts_of_a_step_move_the_running_statistics_once_each(scenes, dense, tmp_path):
    recipe = [*DYNAMIC, "--model-path", dense / "best_checkpoint.pth", "--epochs", 1]
    run(scenes, tmp_path, *recipe, "--batch-size", 4, "--accum-steps", 3)
    state = load_checkpoint(tmp_path / "checkpoint.pth")["model"]
    before = load_checkpoint(dense / "best_checkpoint.pth")["model"]
    name = "head.decode_head.bottleneck.bn.num_batches_tracked"
    assert state[name] - before[name] == 6, "24 images, 4 at a time"


def test_a_prediction_keeps_nothing_that_grows_with_its_windows(scenes):
    args = main.options.parse(flags(scenes))
    task = task_named("segmentation").of_run(args)
    model = task.model(ModelSpec.from_args(args), 3).eval()
    with torch.no_grad():
        result = task.predict(model, torch.randn(1, 3, 64, 64))
    assert result.logits.shape == (1, 3, 64, 64) and result.gates.shape[1] == 9
    assert (result.tokens, result.class_tokens, result.maps) == (None, None, {})


def test_a_mambareg_classifier_starts_a_segmenter(scenes, tmp_path):
    small = ["--model-kwargs", "embed_dim=16", "depth=4", "patch_size=8", "num_registers=2"]
    model = ["--model", "mambareg_tiny", *small, "register_reduction=1"]
    digits = tiny("--throughput-seconds", "0", "--input-size", "16", *model, subset=32)
    assert main.main([*digits, "--output_dir", str(tmp_path / "digits")]) == 0
    start = ["--model-path", tmp_path / "digits" / "best_checkpoint.pth", "--epochs", 1]
    run(scenes, tmp_path / "segmenter", *model, *start)
    state = load_checkpoint(tmp_path / "segmenter" / "best_checkpoint.pth")["model"]
    assert not any(name.startswith(("neck", "norm_neck")) for name in state)


def test_two_processes_train_and_evaluate(scenes, tmp_path):
    settings = [*flags(scenes, "--epochs", "1"), "--output_dir", str(tmp_path)]
    launch(2, ["main.py", *settings])
    trained = read(tmp_path / "eval.json")["dense"]
    best = str(tmp_path / "best_checkpoint.pth")
    run(scenes, tmp_path / "one", "--eval", "--model-path", best)
    assert (
        read(tmp_path / "one" / "eval.json")["dense"]["iou_per_class"] == trained["iou_per_class"]
    )


@pytest.mark.parametrize(
    "more, kind, words",
    [
        (["--eval-stride", "64", "--eval"], UsageError, "--eval-stride 64x64 is larger than a"),
        (["--scale-range", "2", "1"], UsageError, "--scale-range 2 1: must be 0 < LOW <= HIGH"),
        (["--output-layers", "0", "1", "3", "9"], UsageError, "must ascend and end with .* 3"),
        (["--output-layers", "3", "2", "1", "0"], UsageError, "must ascend and end with .* 3"),
        (["--output-layers", "0", "0", "1", "2"], UsageError, "must ascend and end with .* 3"),
        (["--input-size", "16"], UsageError, "16 x 16 pixels is too small: .* 8 patches of 4"),
        (["--batch-size", "1", "--decoder", "upernet"], UsageError, "needs 2 images or more"),
        (["--output-layers", "1", "2"], UsageError, "a decoder reads 4 maps"),
        (["--input-size", "30"], UsageError, "image size 30 leaves 2 pixels"),
        (["--input-size", "2"], UsageError, "image size 2 is smaller than the patch size 4"),
        (["--model-kwargs", "patch_size=2"], UsageError, "patches of 16, 8 or 4, not 2"),
        (["--model-kwargs", "stride=2"], UsageError, "square patches that do not overlap"),
        (["--warmup-epochs", "0.5"], UsageError, "fractions need --sched-on-updates"),
        (["--mixup", "0.5"], UsageError, "unrecognized arguments: --mixup"),
    ],
)
def test_mistakes_are_told_in_one_line(scenes, dense, tmp_path, more, kind, words):
    if "--eval" in more:
        more = [*more, "--model-path", dense / "best_checkpoint.pth"]
    with pytest.raises(kind, match=words) as caught:
        run(scenes, tmp_path, *more)
    assert "\n" not in str(caught.value)


def test_checkpoints_of_the_other_task(scenes, dense, classifier, tmp_path):
    with pytest.raises(UsageError, match="was trained for classification; the data set is of segm"):
        run(scenes, tmp_path, "--eval", "--model-path", classifier)
    digits = ["--eval", "--data-set", "DIGITS", "--model-path", str(dense / "best_checkpoint.pth")]
    with pytest.raises(UsageError, match="was trained for segmentation; the data set is of class"):
        main.main([*digits, "--device", "cpu"])
    state = load_checkpoint(dense / "best_checkpoint.pth")
    save_checkpoint({"model": state["model"]}, tmp_path / "bare.pth")
    digits[-1] = str(tmp_path / "bare.pth")
    with pytest.raises(UsageError, match="was trained for segmentation"):
        main.main([*digits, "--device", "cpu"])


def test_more_classes_in_the_masks_than_names(scenes, dense, tmp_path):
    other = tmp_path / "two"
    draw(other, "train", 8, seed=0)
    draw(other, "val", 2, seed=1)
    (other / "classes.txt").write_text("ground\nbox\n")
    with pytest.raises(UserError, match="masks.*2"):
        run(other, tmp_path / "run", "--subset", 8)
    with pytest.raises(UserError, match="trained on 3 classes, the data set has 2"):
        run(other, tmp_path / "run", "--eval", "--model-path", dense / "best_checkpoint.pth")


def test_another_number_of_classes_gets_a_new_classifier(scenes, dense, tmp_path):
    args = main.options.parse(flags(scenes))
    model = task_named("segmentation").of_run(args).model(ModelSpec.from_args(args), 5)
    checkpoint = load_checkpoint(dense / "best_checkpoint.pth")
    load_weights(model, checkpoint, "dense", new_head=True)
    fresh = model.head.decode_head
    assert len(fresh.conv_seg.weight) == 5
    trained = checkpoint["model"]["head.decode_head.bottleneck.conv.weight"]
    assert torch.equal(fresh.bottleneck.conv.weight, trained)
