"""main.py as it is used: train, resume, evaluate."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import main
from models.build import ModelSpec, build_model, recorded_arguments
from report import main as write_report
from tasks import CLASSIFICATION, task_of_checkpoint
from tests.helpers.runs import SMALL, run
from utils import preemption, resume
from utils.errors import UserError
from utils.files import sha256_of

DYNAMIC = ["--method", "dyvm", "--pruning-layers", "1", "2", "3"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """Output folder of a dense training."""
    output = tmp_path_factory.mktemp("dense")
    run(output)
    return output


@pytest.fixture(scope="module")
def student(dense, tmp_path_factory) -> Path:
    """Output folder of a DyVM training from it."""
    output = tmp_path_factory.mktemp("dyvm")
    run(output, *DYNAMIC, "--model-path", dense / "best_checkpoint.pth")
    return output


def log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


def test_a_dense_run_leaves_its_files(dense):
    names = {path.name for path in dense.iterdir()}
    assert {"args.json", "log.txt", "checkpoint.pth", "best_checkpoint.pth", "eval.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert [line["epoch"] for line in log(dense)] == [0, 1]
    assert {
        "train_lr",
        "train_loss",
        "train_cls",
        "test_loss",
        "test_acc1",
        "test_acc5",
        "test_ema_acc1",
        "n_parameters",
    } <= log(dense)[0].keys()
    report = json.loads((dense / "eval.json").read_text())
    assert report["dynamic"] is None and report["reduction"] is None
    assert report["dense"].keys() == {
        "top1",
        "top5",
        "loss",
        "flops",
        "images_per_s",
        "parameters",
        "ema_top1",
    }


def test_a_dyvm_run_reports_dense_and_dynamic(student):
    report = json.loads((student / "eval.json").read_text())
    assert report.keys() == {
        "dense",
        "dynamic",
        "reduction",
        "speedup",
        "model",
        "data_set",
        "images",
        "batch_size",
        "backend",
        "device",
        "precision",
        "checkpoint_sha256",
    }
    assert report["batch_size"] == 16
    assert report["checkpoint_sha256"] == sha256_of(student / "best_checkpoint.pth")
    assert report["dynamic"].keys() == {
        "top1",
        "top5",
        "loss",
        "flops",
        "images_per_s",
        "parameters",
        "ema_top1",
        "keep",
        "gates",
        "gate_threshold",
        "object",
    }
    seen = report["dynamic"]["object"]
    assert 0 < seen["mass"][-1] < 100 and 0 < seen["chance"] < 100
    assert report["dynamic"]["keep"] == [int(16 * 0.7**j) / 16 for j in (1, 2, 3)]
    assert (
        len(report["dynamic"]["gates"]) == 4
        and report["images"] == 360
        and report["precision"] == "float32"
    )
    for kind in ("paper", "exact"):
        flops = report["dynamic"]["flops"][kind], report["dense"]["flops"][kind]
        assert report["reduction"][kind] == pytest.approx(1 - flops[0] / flops[1])
    line = log(student)[0]
    assert {
        "train_token_ratio",
        "train_block_ratio",
        "train_cls_kl",
        "train_token_distill",
        "train_keep_stage1",
        "train_gate_forward",
    } <= line.keys()
    terms = ("cls", "token_ratio", "block_ratio", "cls_kl", "token_distill")
    assert line["train_loss"] == pytest.approx(
        sum(line[f"train_{term}"] for term in terms), rel=1e-5
    )
    assert (student / "kept_patches.png").stat().st_size > 1000


def test_tensorboard_has_the_names_of_the_log_and_the_picture(student):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(student))
    events.Reload()
    assert set(events.Tags()["scalars"]) == log(student)[0].keys() - {
        "epoch",
        "n_parameters",
        "best_epoch",
    }
    assert events.Tags()["images"] == ["kept_patches"]
    assert [event.value for event in events.Scalars("test_acc1")] == pytest.approx(
        [line["test_acc1"] for line in log(student)]
    )


def test_the_first_epoch_uses_the_schedules_first_value(dense, tmp_path, few_validation_images):
    assert log(dense)[0]["train_lr"] == pytest.approx(2e-3)
    run(tmp_path, "--warmup-epochs", "1", "--warmup-lr", "1e-4")
    assert log(tmp_path)[0]["train_lr"] == pytest.approx(1e-4)


def test_evaluation_needs_no_repeated_flags(student, dense, tmp_path):
    trained = json.loads((student / "eval.json").read_text())
    arguments = [
        "--eval",
        "--model-path",
        str(student / "best_checkpoint.pth"),
        "--output_dir",
        str(tmp_path),
        "--throughput-seconds",
        "0",
        "--device",
        "cpu",
    ]
    assert main.main(arguments) == 0
    report = json.loads((tmp_path / "eval.json").read_text())
    for column in ("dense", "dynamic"):
        for key in ("top1", "top5", "flops", "parameters"):
            assert report[column][key] == trained[column][key]
    assert report["dynamic"]["ema_top1"] == trained["dynamic"]["ema_top1"]
    assert report["dynamic"]["images_per_s"] is None and report["speedup"] is None
    assert main.main([*arguments, "--token-keep-ratio", "0.5"]) == 0
    half = json.loads((tmp_path / "eval.json").read_text())
    assert half["dynamic"]["keep"] == [0.5, 0.25, 0.125]
    assert half["dynamic"]["flops"]["exact"] < report["dynamic"]["flops"]["exact"]


def test_a_student_starts_from_its_teacher(dense, tmp_path):
    """Before the first step, a student that keeps everything is its teacher."""
    from models.weights import load_weights
    from utils.checkpoint import load_checkpoint

    args = main.options.parse(
        [
            *SMALL,
            *DYNAMIC,
            "--model-path",
            str(dense / "best_checkpoint.pth"),
            "--token-keep-ratio",
            "1",
        ]
    )
    checkpoint = load_checkpoint(args.model_path)
    spec = ModelSpec.from_args(args)
    model, teacher = build_model(spec, 10).eval(), build_model(spec.dense(), 10).eval()
    load_weights(model, checkpoint, args.model_path, from_dense=True)
    load_weights(teacher, checkpoint, args.model_path)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images).logits, teacher(images).logits, atol=1e-5, rtol=1e-5)


def test_bf16_trains(dense, tmp_path, few_validation_images):
    report = run(
        tmp_path,
        *DYNAMIC,
        "--model-path",
        dense / "best_checkpoint.pth",
        "--amp",
        "bf16",
        "--epochs",
        "1",
    )
    assert report["precision"] == "bf16"
    assert log(tmp_path)[0]["train_skipped_steps"] == 0 and log(tmp_path)[0]["train_loss"] > 0


STAGES, GATES = ["--pruning-layers", "1", "2"], ["--block-keep-ratio", "0.5"]
READ = {"dyvm": [*STAGES, *GATES], "token": STAGES, "block": GATES}  # flags that a method reads


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "block"],
        *(
            ["--method", method, *choice]
            for method in ("dyvm", "token")
            for choice in (
                ["--scorer-input", "hidden"],
                ["--scorer-input", "B"],
                ["--scorer-input", "delta"],
                ["--token-strategy", "random"],
                ["--token-strategy", "static"],
            )
        ),
        ["--method", "dyvm", "--token-strategy", "distilled", "--reduction", "prune+merge"],
        ["--method", "token", "--token-strategy", "norm"],
        ["--method", "token", "--token-strategy", "top"],
        ["--method", "token", "--reduction", "merge", "--merge-tokens", "4"],
        ["--method", "token", "--reduction", "mtr"],
    ],
    ids="_".join,
)
def test_every_variant_trains_saves_and_evaluates_from_its_checkpoint(
    dense, tmp_path, flags, few_validation_images, monkeypatch
):
    trained = run(
        tmp_path,
        *flags,
        *READ[flags[1]],
        "--model-path",
        dense / "best_checkpoint.pth",
        "--epochs",
        "1",
        "--subset",
        "32",
    )
    assert (
        main.main(
            [
                "--eval",
                "--model-path",
                str(tmp_path / "best_checkpoint.pth"),
                "--output_dir",
                str(tmp_path / "again"),
                "--throughput-seconds",
                "0",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    again = json.loads((tmp_path / "again" / "eval.json").read_text())
    for key in ("top1", "loss", "flops"):
        assert again["dynamic"][key] == trained["dynamic"][key]
    assert (again["dynamic"]["keep"] == []) == ("block" in flags)
    monkeypatch.setattr("report.time_charts", lambda runs: {})  # slow, the same for all variants
    write_report([str(tmp_path)])
    text = (tmp_path / "report.html").read_text()
    assert f"{trained['dynamic']['top1']:.2f}" in text and flags[1] in text


def same_weights(one: Path, other: Path) -> bool:
    states = [torch.load(path, weights_only=True) for path in (one, other)]
    return all(
        torch.equal(states[0][part][key], states[1][part][key])
        for part in ("model", "ema")
        for key in states[0][part]
    )


def test_an_interrupted_run_ends_bit_identical(dense, tmp_path, monkeypatch, two_threads):
    """Told to leave after a step, amid an epoch and amid evaluations; resumed each time."""
    recipe = [
        *DYNAMIC,
        "--model-path",
        dense / "best_checkpoint.pth",
        "--repeated-aug",
        "--num-workers",
        "2",
    ]
    run(tmp_path / "whole", *recipe)
    asked = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "requested", lambda: next(asked) in (0, 3, 10, 25, 60, 63))
        patch.setattr(preemption, "received", lambda: "SIGTERM")
        arguments = [
            *SMALL,
            "--output_dir",
            str(tmp_path / "parts"),
            *map(str, recipe),
            "--resume",
            "auto",
        ]
        codes = []
        while not codes or codes[-1] != 0:
            codes.append(main.main(arguments))
    assert codes == [preemption.EXIT_CODE] * 6 + [0]
    assert same_weights(
        tmp_path / "whole" / "checkpoint.pth", tmp_path / "parts" / "checkpoint.pth"
    )
    assert same_weights(
        tmp_path / "whole" / "best_checkpoint.pth", tmp_path / "parts" / "best_checkpoint.pth"
    )
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


def test_resume_refuses_what_would_alter_the_run(student, dense, tmp_path):
    arguments = [
        *SMALL,
        *DYNAMIC,
        "--model-path",
        str(dense / "best_checkpoint.pth"),
        "--output_dir",
        str(tmp_path),
    ]
    resume = ["--resume", str(student / "checkpoint.pth")]
    with pytest.raises(UserError, match=r"--lr: 0.002 -> 0.5.*--resume-override"):
        main.main([*arguments, *resume, "--lr", "0.5"])
    with pytest.raises(UserError, match="the file's content is another one"):
        main.main([*arguments, *resume, "--model-path", str(dense / "checkpoint_prev.pth")])
    with pytest.raises(UserError, match="cannot be resumed: it holds no optimizer"):
        torch.save({"model": {}}, tmp_path / "foreign.pth")
        main.main([*arguments, "--resume", str(tmp_path / "foreign.pth")])
    assert main.main([*arguments, *resume, "--lr", "0.5", "--resume-override"]) == 0, (
        "it was finished: evaluated again"
    )


def test_checkpoints_of_earlier_versions_name_no_task(student):
    path = student / "checkpoint.pth"
    checkpoint = main.load_checkpoint(path)
    keys = ("args", "world_size", "class_names", "steps_per_epoch", "teacher_sha256", "task")
    record = {key: checkpoint[key] for key in keys}
    assert checkpoint.pop("task") == "classification"
    assert task_of_checkpoint(checkpoint) is CLASSIFICATION
    assert resume.check_agreement(checkpoint, path, record, override=False)
    recorded = dict(checkpoint["args"])
    del recorded["poly_power"]  # a flag that came later, and its default
    assert resume.flag_differences(recorded, checkpoint["args"]) == []
    assert resume.flag_differences(recorded, {**recorded, "poly_power": 2.0}) == [
        "--poly-power: None -> 2.0"
    ]
    recorded["sched"] = "poly"  # it ran with timm's power
    assert resume.flag_differences(recorded, {**recorded, "poly_power": 0.1}) == []
    assert resume.flag_differences(recorded, {**recorded, "poly_power": 1.0}) == [
        "--poly-power: None -> 1.0"
    ]


def test_a_teacher_that_has_changed_is_noticed(dense, tmp_path, capsys, few_validation_images):
    teacher = tmp_path / "teacher.pth"
    teacher.write_bytes((dense / "best_checkpoint.pth").read_bytes())
    run(tmp_path / "run", *DYNAMIC, "--model-path", teacher, "--epochs", "1")
    checkpoint = main.load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert recorded_arguments(checkpoint)["dense_path"] == str(teacher)
    teacher.write_bytes((dense / "checkpoint_prev.pth").read_bytes())
    assert recorded_arguments(checkpoint)["dense_path"] is None
    assert "is not the teacher any more" in capsys.readouterr().out
