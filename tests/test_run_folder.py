"""A run's output folder: nothing is overwritten unasked, one run at a time, nothing of another."""

import argparse
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import main
from tests.helpers.flags import tiny
from utils import resume, run_folder
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.distributed import Distributed
from utils.errors import UsageError, UserError

SMALL = tiny("--throughput-seconds", "0", "--no-model-ema", depth=2)
ALONE = Distributed(torch.device("cpu"))


def train(output: Path, *flags: str) -> int:
    return main.main([*SMALL, "--output_dir", str(output), *flags])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    assert train(output) == 0
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def arguments(output: Path, wanted: str | None = None, overwrite: bool = False):
    return argparse.Namespace(
        output_dir=str(output), resume=wanted, overwrite=overwrite, resume_override=False
    )


class Training:
    """What `start_or_resume` asks of a training."""

    epoch = step = 0

    def load_state_dict(self, state):
        self.epoch, self.step = state["epoch"], state["step"]


RECORD = {
    "args": {},
    "world_size": 1,
    "class_names": ["a"],
    "steps_per_epoch": 4,
    "family": "vim",
    "teacher_sha256": None,
}


def saved(path: Path, best: float | None, epoch: int = 3) -> Path:
    """A small checkpoint as of a run."""
    path.parent.mkdir(exist_ok=True)
    state = {"model": {}, "optimizer": {}, "step": 0, "averages": [{}], "images": None}
    save_checkpoint({**RECORD, **state, "epoch": epoch, "best": best}, path)
    return path


def start(args) -> Training:
    training = Training()
    resume.start_or_resume(training, RECORD, args, ALONE)
    return training


class TestAnEarlierRun:
    def test_is_not_overwritten(self, run, monkeypatch):
        before = contents(run)
        monkeypatch.setattr(main.Experiment, "prepare", lambda *_: pytest.fail("read the data"))
        with pytest.raises(UsageError) as refused:
            train(run)
        for words in (
            f"{run} already holds an earlier run's checkpoint.pth",
            "best_checkpoint.pth, log.txt of 1 epoch, eval.json, which would be overwritten",
            "--resume auto continues it",
            "--overwrite",
        ):
            assert words in str(refused.value)
        assert refused.value.exit_code == 2 and contents(run) == before

    def test_makes_way_when_asked_to(self, tmp_path):
        """Its lists, decisions and pictures go too, but not what no run writes."""
        assert train(tmp_path, "--epochs", "2") == 0
        own, others = tmp_path / "decisions" / "gates.csv", tmp_path / "decisions" / "mine.txt"
        own.parent.mkdir()
        bad, sweep = tmp_path / "bad_images_rank7.txt", tmp_path / "sweep.json"
        for path in (own, others, bad, sweep):
            path.write_text("{}")
        assert train(tmp_path, "--overwrite") == 0
        assert (tmp_path / "log.txt").read_text().count("\n") == 1
        assert [path.exists() for path in (own, others, bad, sweep)] == [False, True, False, False]
        assert len(list(tmp_path.glob("events.*"))) == 1

    @pytest.mark.parametrize("name", ["eval.json", "sweep.json", "calibrated_checkpoint.pth"])
    def test_an_evaluation_counts_too(self, tmp_path, name):
        (tmp_path / name).touch()
        for wanted in (None, "auto"):
            with pytest.raises(UsageError, match=f"already holds an earlier run's {name}"):
                run_folder.check(arguments(tmp_path, wanted), ALONE)

    def test_that_saved_nothing_is_no_obstacle(self, tmp_path):
        for name in ("args.json", "output.txt", "nonfinite.pth", "log.txt"):
            (tmp_path / name).touch()
        run_folder.check(arguments(tmp_path), ALONE)

    def test_is_not_mixed_with_one_that_comes_from_elsewhere(self, tmp_path, run):
        other = saved(tmp_path / "other" / "checkpoint.pth", 50.0)
        with pytest.raises(
            UsageError, match="--resume .*other/checkpoint.pth is of another folder"
        ):
            run_folder.check(arguments(run, str(other)), ALONE)
        run_folder.check(arguments(run, str(run / "checkpoint_prev.pth")), ALONE)
        with pytest.raises(UsageError, match="--overwrite would remove .*checkpoint_prev.pth"):
            run_folder.check(arguments(run, str(run / "checkpoint_prev.pth"), True), ALONE)


class TestResumeAuto:
    def test_says_that_there_is_nothing(self, tmp_path, caplog):
        caplog.set_level("INFO")
        assert start(arguments(tmp_path, "auto")).epoch == 0
        assert f"no checkpoint in {tmp_path}; starting anew at epoch 1" in caplog.text

    def test_does_not_start_over_the_best_checkpoint(self, tmp_path):
        best = saved(tmp_path / "best_checkpoint.pth", 50.0)
        with pytest.raises(UsageError, match=f"no checkpoint.pth to resume.*--resume {best},"):
            run_folder.check(arguments(tmp_path, "auto"), ALONE)
        run_folder.check(arguments(tmp_path, str(best)), ALONE)
        run_folder.check(arguments(tmp_path, "auto", overwrite=True), ALONE)

    def test_goes_on_after_a_kill_before_the_first_checkpoint(self, tmp_path):
        (tmp_path / "log.txt").write_text('{"epoch": 0}\n')
        run_folder.check(arguments(tmp_path, "auto"), ALONE)

    @pytest.mark.parametrize("variable", run_folder.RESTARTS)
    def test_is_what_a_restart_does(self, tmp_path, monkeypatch, variable):
        """--overwrite and --resume FILE are for the first start."""
        args = arguments(tmp_path, "elsewhere.pth", overwrite=True)
        monkeypatch.setenv(variable, "1")
        assert run_folder.wanted_checkpoint(args) == "elsewhere.pth"
        saved(tmp_path / "checkpoint.pth", 50.0)
        assert run_folder.wanted_checkpoint(args) == "auto"
        assert start(args).epoch == 3 and (tmp_path / "checkpoint.pth").exists()
        monkeypatch.setenv(variable, "0")
        assert run_folder.wanted_checkpoint(args) == "elsewhere.pth"


class TestResumeFile:
    def test_takes_its_best_checkpoint_along(self, tmp_path):
        source = saved(tmp_path / "one" / "checkpoint.pth", 60.0)
        saved(tmp_path / "one" / "best_checkpoint.pth", 60.0)
        there = tmp_path / "two"
        there.mkdir()
        assert start(arguments(there, str(source))).epoch == 3
        assert load_checkpoint(there / "best_checkpoint.pth")["best"] == 60.0

    def test_says_that_the_best_one_is_missing(self, tmp_path, caplog):
        source = saved(tmp_path / "one" / "checkpoint.pth", 60.0)
        saved(tmp_path / "one" / "best_checkpoint.pth", 99.0)  # of another run
        there = tmp_path / "two"
        there.mkdir()
        start(arguments(there, str(source)))
        assert not (there / "best_checkpoint.pth").exists()
        assert "the best epoch so far (60) is not among the files" in caplog.text

    def test_sets_aside_a_best_one_of_later_epochs(self, tmp_path):
        source = saved(tmp_path / "checkpoint_prev.pth", 60.0)
        saved(tmp_path / "best_checkpoint.pth", 70.0, epoch=5)
        start(arguments(tmp_path, str(source)))
        assert not (tmp_path / "best_checkpoint.pth").exists()
        assert load_checkpoint(tmp_path / "replaced_best_checkpoint.pth")["best"] == 70.0


class TestBestCheckpoint:
    """Beside the newest one, under --resume auto."""

    @pytest.mark.parametrize(
        "flags, kept",
        [({}, True), ({"lr": 0.5}, False)],
        ids=["of a run killed between the two saves", "of another run"],
    )
    def test_of_another_score(self, tmp_path, flags, kept):
        saved(tmp_path / "checkpoint.pth", 60.0)
        best = saved(tmp_path / "best_checkpoint.pth", 70.0)
        save_checkpoint(load_checkpoint(best) | {"args": flags}, best)
        start(arguments(tmp_path, "auto"))
        assert best.exists() == kept
        assert (tmp_path / "replaced_best_checkpoint.pth").exists() != kept


class TestLock:
    def test_one_at_a_time(self, tmp_path):
        with run_folder.locked(tmp_path):
            with pytest.raises(UserError, match=f"{tmp_path} is in use by another run; wait"):
                train(tmp_path)
            assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        with run_folder.locked(tmp_path):
            pass

    def test_what_a_killed_run_leaves_is_waited_for(self, tmp_path):
        hear, tell = os.pipe()
        child = os.fork()
        if not child:
            with run_folder.locked(tmp_path):
                os.write(tell, b"x")
                time.sleep(0.7)
                os._exit(0)
        assert os.read(hear, 1) == b"x"
        begin = time.monotonic()
        with run_folder.locked(tmp_path):
            assert 0.3 < time.monotonic() - begin < run_folder.GRACE
        os.waitpid(child, 0)

    def test_a_killed_run_leaves_none_though_its_workers_live(self, tmp_path):
        hear, tell = os.pipe()
        child = os.fork()
        if not child:
            with run_folder.locked(tmp_path):
                worker = os.fork()
                if worker:
                    os.write(tell, f"{worker}\n".encode())
                time.sleep(60)
        os.close(tell)
        worker = int(os.read(hear, 20))
        try:
            with pytest.raises(UserError), run_folder.locked(tmp_path):
                pass
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with run_folder.locked(tmp_path):
                os.kill(worker, 0)  # it lives
        finally:
            os.kill(worker, signal.SIGKILL)
            os.close(hear)


def test_an_evaluation_leaves_the_folder_of_trainings_alone(run, tmp_path, monkeypatch):
    """Neither flag names a folder: what --eval writes does not stand in a training's way."""
    monkeypatch.chdir(tmp_path)
    flags = ["--device", "cpu", "--num-workers", "0", "--throughput-seconds", "0"]
    assert main.main(["--eval", "--model-path", str(run / "best_checkpoint.pth"), *flags]) == 0
    assert [path.name for path in Path("output").iterdir()] == ["eval"]
    assert Path("output/eval/eval.json").exists()
    assert main.main(SMALL) == 0
    assert Path("output/best_checkpoint.pth").exists()


def test_an_evaluation_keeps_a_list_of_bad_images_of_its_own(run, tmp_path):
    """And begins it anew: images that were bad in an earlier evaluation are not listed again."""
    (tmp_path / "bad_images_rank0.txt").write_text("3.jpg: of the training\n")
    (tmp_path / "eval_bad_images_rank1.txt").write_text("4.jpg: of an earlier evaluation\n")
    (tmp_path / "kept_patches.png").touch()
    best = str(run / "best_checkpoint.pth")
    flags = ["--output_dir", str(tmp_path), "--device", "cpu", "--num-workers", "0"]
    assert main.main(["--eval", "--model-path", best, *flags, "--throughput-seconds", "0"]) == 0
    assert (tmp_path / "bad_images_rank0.txt").read_text() == "3.jpg: of the training\n"
    assert not list(tmp_path.glob("eval_bad_images_rank*.txt"))
    assert not (tmp_path / "kept_patches.png").exists(), "a dense model keeps every patch"
    assert json.loads((tmp_path / "eval.json").read_text())["batch_size"] is None
