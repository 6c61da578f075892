"""The ablation: real small trainings, their table, going on after an interruption, and what it says
to bad input.
"""

import contextlib
import csv
import json
import statistics
import subprocess
import sys
import time

import pytest
from helpers.processes import ROOT, clean_environment, wait_until

import ablation
import main
from evaluation import ablation_table, runs, summary
from tests.helpers.flags import tiny
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UsageError, UserError
from utils.run_folder import locked

SMALL = tiny("--lr", "2e-2", "--unscale-lr", "--no-model-ema")
COMMON = ["--", *SMALL, "--pruning-layers", "1", "2"]
HALF = ["--variant", "half", "--token-keep-ratio 0.5"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    output = tmp_path_factory.mktemp("dense")
    assert main.main([*SMALL, "--output_dir", str(output), "--throughput-seconds", "0"]) == 0
    return output / "best_checkpoint.pth"


def run(output, teacher, *flags, common=COMMON):
    return ablation.main(
        [
            "--dense-path",
            str(teacher),
            "--output_dir",
            str(output),
            "--throughput-seconds",
            "0.01",
            *map(str, flags),
            *common,
        ]
    )


@pytest.fixture(scope="module")
def done(teacher, tmp_path_factory):
    """Output folder of two variants x two seeds, two runs at a time."""
    output = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert (
            run(output, teacher, "--variants", "block-only", *HALF, "--seeds", 0, 7, "--jobs", 2)
            == 0
        )
    return output


def reports(output, variant):
    return [
        json.loads((output / variant / f"seed{seed}" / "eval.json").read_text()) for seed in (0, 7)
    ]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def modified(output):
    return {path: path.stat().st_mtime_ns for path in output.glob("*/seed*/**/*")}


def test_each_run_has_its_flags(done):
    for variant, method, ratio in (("block-only", "block", 0.7), ("half", "dyvm", 0.5)):
        for seed in (0, 7):
            args = json.loads((done / variant / f"seed{seed}" / "args.json").read_text())
            assert (args["method"], args["token_keep_ratio"], args["seed"]) == (method, ratio, seed)
            assert args["epochs"] == 1 and args["lr"] == 2e-2


def test_the_table_is_what_the_runs_say(done):
    dense, *variants = rows_of(done / "ablation.csv")
    of_teacher = reports(done, "half")[0]["dense"]
    assert dense["variant"] == "dense" and float(dense["top1_mean"]) == of_teacher["top1"]
    assert [row["variant"] for row in variants] == ["block-only", "half"]
    text = (done / "ablation.md").read_text()
    for row in variants:
        found = [report["dynamic"] for report in reports(done, row["variant"])]
        top1, flops = (
            [column["top1"] for column in found],
            [column["flops"]["exact"] for column in found],
        )
        mean, sd = sum(top1) / 2, abs(top1[0] - top1[1]) / 2**0.5
        assert float(row["top1_mean"]) == pytest.approx(mean) and float(
            row["top1_sd"]
        ) == pytest.approx(sd)
        assert float(row["exact_flops"]) == pytest.approx(sum(flops) / 2)
        assert float(row["patches_kept"]) == {"block-only": 1.0, "half": 0.25}[row["variant"]]
        gates = [gate for column in found for layer in column["gates"] for gate in layer]
        assert float(row["scans_kept"]) == pytest.approx(statistics.fmean(gates))
        assert row["runs"] == "2" and float(row["images_per_s"]) > 0
        speed = float(row["images_per_s"]) / float(dense["images_per_s"])
        change = 100 * (sum(flops) / 2 / of_teacher["flops"]["exact"] - 1)
        [line] = [
            line
            for line in text.splitlines()
            if line.startswith(f"| {row['variant']} ") and "±" in line
        ]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == [
            f"{mean:.2f} ± {sd:.2f}",
            f"{mean - of_teacher['top1']:+.2f}",
            f"{sum(flops) / 2e6:.2f}",
            f"{change:+.1f} %",
            f"x {speed:.2f}",
            {"block-only": "100.0 %", "half": "25.0 %"}[row["variant"]],
            f"{100 * statistics.fmean(gates):.1f} %",
            "2",
        ]


def test_the_runs_differ_by_seed_and_stand_in_a_file_of_their_own(done):
    rows = rows_of(done / "ablation_runs.csv")
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("block-only", "0"),
        ("half", "0"),
        ("block-only", "7"),
        ("half", "7"),
    ]
    for row in rows:
        report = json.loads(
            (done / row["variant"] / f"seed{row['seed']}" / "eval.json").read_text()
        )
        assert (
            float(row["top1"]) == report["dynamic"]["top1"]
            and float(row["loss"]) == report["dynamic"]["loss"]
        )
        assert report["dynamic"]["images_per_s"] is None
    assert len({row["loss"] for row in rows}) == 4


def test_the_document_tells_what_was_done(done):
    text = (done / "ablation.md").read_text()
    for told in (
        "DIGITS, 64 of the training images",
        "epochs from the dense teacher: 1",
        "seeds: 0, 7",
        "torch 2",
        "| half | `--token-keep-ratio 0.5` |",
        "python ablation.py --dense-path ",
        "on one batch of 16, cpu",
    ):
        assert told in text
    assert "Missing" not in text
    assert all(
        (done / name).stat().st_size > 5000 for name in ("ablation_flops.png", "ablation_speed.png")
    )


def test_the_same_command_again_trains_and_measures_nothing(done, teacher, monkeypatch):
    before, table = modified(done), (done / "ablation.md").read_text()
    monkeypatch.setattr(summary, "interleaved", lambda *args: pytest.fail("measured again"))
    assert run(done, teacher, "--variants", "block-only", *HALF, "--seeds", 0, 7, "--jobs", 2) == 0
    assert modified(done) == before
    assert (done / "ablation.md").read_text() == table


def test_what_is_missing_is_done_and_the_rest_left_alone(done, teacher):
    lost = done / "half" / "seed7"
    before, report, log = (
        modified(done),
        (lost / "eval.json").read_text(),
        (lost / "log.txt").read_text(),
    )
    (lost / "eval.json").unlink()
    # the same share of the cores as before, for eval.json says how many threads there were
    assert run(done, teacher, "--variants", "block-only", *HALF, "--seeds", 0, 7, "--jobs", 2) == 0
    assert (lost / "eval.json").read_text() == report
    assert (lost / "log.txt").read_text() == log, "it went on after its last epoch"
    changed = {path for path, when in modified(done).items() if before.get(path) != when}
    assert changed and all(lost in path.parents for path in changed)


def test_a_failing_run_is_named_and_the_others_go_on(done, teacher, capsys):
    """--accum-steps 9 is found to be wrong only once the training is built."""
    wrong = ["--variant", "wrong", "--accum-steps 9"]
    assert run(done, teacher, "--variants", "block-only", *HALF, *wrong, "--seeds", 0) == 1
    reason = "error: --accum-steps 9: an epoch has only 4 batches"
    out = capsys.readouterr().out
    assert f"wrong/seed0 failed: {reason}" in out and f"missing: wrong/seed0: {reason}" in out
    text = (done / "ablation.md").read_text()
    assert f"* wrong/seed0: {reason}" in text
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:-1]
        for line in text.split("\n\n")[1].splitlines()
    }
    assert [cell.strip() for cell in rows["wrong"]] == ["-"] * 7 + ["0"]
    assert "±" not in rows["half"][0] and rows["half"][-1].strip() == "1", "one seed has no spread"


def test_when_all_fail_there_is_no_table(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ablation, "train_missing", lambda runs, *_: {str(run): "error: no luck" for run in runs}
    )
    with pytest.raises(UserError, match="all 2 runs failed; static/seed4: error: no luck"):
        run(tmp_path, teacher, "--variants", "static", "random", "--seeds", 4)
    assert not list(tmp_path.glob("ablation*"))


def test_sigterm_lets_the_runs_save(teacher, tmp_path):
    command = [
        sys.executable,
        ROOT / "ablation.py",
        "--dense-path",
        teacher,
        "--output_dir",
        tmp_path,
        "--seeds",
        "0",
        "--variants",
        "token-only",
        "static",
        *COMMON,
        "--epochs",
        "500",
    ]
    runner = subprocess.Popen(
        list(map(str, command)),
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "token-only" / "seed0"
    try:
        wait_until((folder / "log.txt").exists)
    finally:
        runner.terminate()
    out, err = runner.communicate(timeout=30)
    assert runner.returncode == 75 and err == ""
    assert (
        "told to leave by SIGTERM; the runs have saved, the same command goes on" in out
        and "failed" not in out
    )
    assert (
        "saved, continue with --resume auto" in (folder / "output.txt").read_text().splitlines()[-1]
    )
    assert (folder / "checkpoint.pth").exists() and not (folder / "eval.json").exists()
    assert not (tmp_path / "static").exists(), "told to leave, it starts nothing more"
    with locked(tmp_path):  # nothing is left running that would hold it
        pass


def planned(folder):
    return ablation.PlannedRun("main", 0, folder, [], main.options.parse(["--device", "cpu"]))


def test_ctrl_c_waits_until_the_runs_have_saved(tmp_path, monkeypatch):
    def start(run, place, jobs, lock):
        return subprocess.Popen(
            [
                "bash",
                "-c",
                'trap "sleep 0.3; touch saved; exit 75" TERM; touch started\n'
                "while :; do sleep 0.05; done",
            ],
            cwd=tmp_path,
            start_new_session=True,
        )

    def interrupt(seconds):
        wait_until((tmp_path / "started").exists)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_start", start)
    with (
        monkeypatch.context() as patch,
        contextlib.closing(runs.train_all([planned(tmp_path)], 1, 0)) as ended,
    ):
        sleep = time.sleep
        patch.setattr(
            runs.time, "sleep", lambda s: interrupt(s) if s == runs.POLL_SECONDS else sleep(s)
        )
        with pytest.raises(KeyboardInterrupt):
            next(ended)
    assert (tmp_path / "saved").exists()


def test_gpus_in_turn_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(runs.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [runs._resources("auto", place, 3)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == [
        "3",
        "5",
        "3",
    ]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert runs._resources("auto", 1, 2) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setattr(runs.os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert runs._resources("cpu", 0, 3) == {"OMP_NUM_THREADS": "2"}
    assert runs._resources("cpu", 0, 20) == {"OMP_NUM_THREADS": "1"}


def test_why_a_run_failed(tmp_path):
    run = planned(tmp_path)
    (tmp_path / "output.txt").write_text("12:00:00 I fine\nerror: no such folder\n\n")
    assert runs.why_it_failed(run, 1) == "error: no such folder"
    assert runs.why_it_failed(run, -9) == "ended by SIGKILL"
    (tmp_path / "output.txt").write_text("")
    assert runs.why_it_failed(run, 3) == "exit code 3"


# Bad input


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--variants", "main", "nonsense"],
            ["nonsense", "known are main, token-only, block-only, scorer-B"],
        ),
        (["--variants", "main", "main"], ["--variants: main is given twice"]),
        (["--variant", "a", "", "--variant", "a", "--lr 1"], ["a is given twice"]),
        (["--variant", "main", "--lr 1"], ["'main' is built in"]),
        (["--variant", "dense", "--lr 1"], ["not 'dense'"]),
        (["--variant", "../x", "--lr 1"], ["'../x'", "letters"]),
        (["--variant", "a", "--lr '1"], ["variant a", "--lr '1", "quotation"]),
        (["--variant", "a", "--scorer-inptu B"], ["variant a", "--scorer-inptu"]),
        (["--variant", "a", "--scorer-input=C"], ["variant a", "--scorer-input", "'C'"]),
        (["--variant", "a", "--method dense"], ["variant a", "dense"]),
        (["--variant", "a", "--seed 3"], ["variant a: --seed is set by ablation.py", "--seeds"]),
        (["--variant", "a", "--data-set FMNIST"], ["variant a", "--data-set must be the same"]),
        (["--seeds", "1", "2", "1"], ["--seeds: 1 is given twice"]),
        (["--seeds", "one"], ["--seeds", "'one'"]),
        (["--jobs", "0"], ["--jobs", "'0'"]),
        (["--", "--epochs", "no"], ["after --", "--epochs"]),
        (
            ["--", "--method", "token"],
            ["after --: --method is set by ablation.py", "--variant NAME"],
        ),
        (["--", "--output_dir=x"], ["after --: --output_dir", "before the --"]),
        (["--", "--model-path", "x"], ["--model-path", "--dense-path"]),
        (["--", "--eval"], ["--eval", "every run is evaluated"]),
        (["--", "--scorer-input", "B"], ["variant block-only", "no meaning with --method block"]),
        (["--variant", "a", "--pruning-layers 9"], ["variant a", "[9] must ascend within"]),
    ],
)
def test_mistakes_in_the_command(teacher, tmp_path, flags, words):
    own, common = (flags, COMMON) if "--" not in flags else ([], [*COMMON, *flags[1:]])
    with pytest.raises(UsageError) as error:
        run(tmp_path / "out", teacher, *own, common=common)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists(), "refused before anything was written"


def test_other_mistakes(done, teacher, tmp_path):
    def refused(match, output, dense, *flags, common=COMMON):
        with pytest.raises(UserError, match=match) as error:
            run(output, dense, "--variants", "block-only", *flags, common=common)
        assert error.value.exit_code == 1

    refused("none.pth", tmp_path / "out", tmp_path / "none.pth")
    refused(
        "does not fit this vim model",
        tmp_path / "out",
        teacher,
        common=[*COMMON, "--model-kwargs", "depth=4"],
    )
    refused(
        "nowhere: no such folder",
        tmp_path / "out",
        teacher,
        common=[*COMMON, "--data-set", "FOLDER", "--data-path", "nowhere"],
    )
    assert not (tmp_path / "out").exists()
    before = modified(done)
    refused(
        r"best_checkpoint.pth is of a run with other settings \(--lr: 0.02 -> 0.5\)",
        done,
        teacher,
        "--seeds",
        0,
        common=[*COMMON, "--lr", "0.5"],
    )
    other = load_checkpoint(teacher)
    other["model"]["norm_f.weight"] += 1
    changed_teacher = tmp_path / "other.pth"
    save_checkpoint(other, changed_teacher)
    refused("another dense teacher", done, changed_teacher, "--seeds", 0)
    assert modified(done) == before


def test_a_run_is_complete_under_its_own_conditions(done, teacher, monkeypatch):
    flags = ["--dense-path", str(teacher), "--output_dir", str(done), "--seeds", "0"]
    [run] = ablation.plan(ablation.parse([*flags, "--variants", "block-only", *COMMON]))
    best = load_checkpoint(run.folder / "best_checkpoint.pth")
    own = best["teacher_sha256"], best["images"]
    assert runs.is_complete(run, *own)
    for split in ("train", "val"):
        with pytest.raises(UserError, match="other settings .other images: None -> None"):
            runs.is_complete(run, own[0], own[1] | {split: "of others"})
    monkeypatch.setattr(run.args, "gate_threshold", 0.5)
    with pytest.raises(UserError, match="--gate-threshold: 'calibrated' -> 0.5"):
        runs.is_complete(run, *own)


def test_a_report_of_another_checkpoint_does_not_complete_a_run(done, tmp_path):
    (tmp_path / "best_checkpoint.pth").write_bytes(
        (done / "half" / "seed0" / "best_checkpoint.pth").read_bytes()
    )
    for folder, complete in (("half", True), ("block-only", False)):
        report = (done / folder / "seed0" / "eval.json").read_text()
        (tmp_path / "eval.json").write_text(report)
        assert runs.is_evaluated(tmp_path) is complete


def test_a_damaged_report_is_named(done, tmp_path):
    (tmp_path / "eval.json").write_text("{cut")
    with pytest.raises(UserError, match="eval.json cannot be read .* remove it"):
        ablation_table.Outcome.read(planned(tmp_path))
