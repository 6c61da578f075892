"""Writing checkpoints beside the training: which files are there, and no kill loses a finished
save.
"""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import small_state

from utils import checkpoint
from utils.checkpoint import CheckpointWriter, load_checkpoint, load_newest, save_checkpoint
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]


class TestWriter:
    def test_keeps_newest_previous_and_best(self, tmp_path):
        with CheckpointWriter(tmp_path) as writer:
            for step in range(4):
                writer.save(small_state(step), best=step == 1)
        steps = {path.name: load_checkpoint(path)["step"] for path in tmp_path.iterdir()}
        assert steps == {"checkpoint.pth": 3, "checkpoint_prev.pth": 2, "best_checkpoint.pth": 1}
        content, path = load_newest(tmp_path)
        assert content["step"] == 3 and path == tmp_path / "checkpoint.pth"

    def test_training_goes_on_during_the_write(self, tmp_path, monkeypatch):
        may_write = threading.Event()
        write = checkpoint._write
        monkeypatch.setattr(
            checkpoint, "_write", lambda *a, **k: (may_write.wait(10), write(*a, **k))
        )
        weights = torch.zeros(5)
        with CheckpointWriter(tmp_path) as writer:
            writer.save({"model": {"w": weights}})
            weights += 1  # nothing is written yet; what will be is the state at the call
            writer.check()
            assert list(tmp_path.iterdir()) == [] and writer.writing()
            may_write.set()
            writer.wait()
            assert not writer.writing()
            assert load_checkpoint(tmp_path / "checkpoint.pth")["model"]["w"].tolist() == [0] * 5

    def test_error_of_the_thread_reaches_the_main_thread(self, tmp_path, monkeypatch):
        writer = CheckpointWriter(tmp_path)
        writer.save(small_state(1))
        writer.wait()

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            writer.save(small_state(2))
            with pytest.raises(UserError, match="checkpoint.pth: No space left on device"):
                writer.save(small_state(3))
        assert load_newest(tmp_path)[0]["step"] == 1
        writer.save(small_state(4))
        writer.close()
        assert load_newest(tmp_path)[0]["step"] == 4

    def test_error_at_the_end_of_the_block(self, tmp_path, caplog):
        gone = tmp_path / "gone"
        with (
            pytest.raises(UserError, match="checkpoint.pth: No such file"),
            CheckpointWriter(gone) as writer,
        ):
            writer.save(small_state())
        # An error that is under way already is the one to tell; that of the save is logged.
        with pytest.raises(ZeroDivisionError), CheckpointWriter(gone) as writer:
            writer.save(small_state())
            raise ZeroDivisionError
        assert "checkpoint.pth: No such file" in caplog.text

    def test_damaged_newest_falls_back_with_a_warning(self, tmp_path, caplog):
        with CheckpointWriter(tmp_path) as writer:
            writer.save(small_state(1))
            writer.save(small_state(2))
        newest = tmp_path / "checkpoint.pth"
        newest.write_bytes(newest.read_bytes()[:-500])
        content, path = load_newest(tmp_path)
        assert content["step"] == 1 and path.name == "checkpoint_prev.pth"
        assert str(newest) in caplog.text and caplog.records[0].levelname == "WARNING"
        with CheckpointWriter(
            tmp_path
        ) as writer:  # and the damaged file does not push the good one out
            writer.save(small_state(3))
        assert load_checkpoint(tmp_path / "checkpoint_prev.pth")["step"] == 1

    def test_nothing_to_resume_from(self, tmp_path):
        assert load_newest(tmp_path) is None
        for name in ("checkpoint.pth", "checkpoint_prev.pth"):
            (tmp_path / name).write_bytes(b"PK rubbish")
        with pytest.raises(
            UserError,
            match=r"no checkpoint to resume from: .*checkpoint.pth: .*checkpoint_prev.pth: ",
        ):
            load_newest(tmp_path)

    def test_only_the_previous_one_is_there(self, tmp_path):
        save_checkpoint(small_state(5), tmp_path / "checkpoint_prev.pth")
        assert load_newest(tmp_path)[0]["step"] == 5

    def test_leftovers_of_kills_are_removed(self, tmp_path):
        (tmp_path / ".checkpoint.pth.0123abcd.tmp").touch()
        (tmp_path / ".other.tmp").touch()
        CheckpointWriter(tmp_path).close()
        assert [path.name for path in tmp_path.iterdir()] == [".other.tmp"]


# Forks so that torch is imported once for all kills. A child saves as fast as it can and tells each
# save that is done.
KILLS = """
import os, random, signal, sys, time
import torch
from utils.checkpoint import CheckpointWriter, load_newest

torch.set_num_threads(1)
folder, kills, generator = sys.argv[1], 15, random.Random(7)

def save_for_ever(step, tell):
    writer = CheckpointWriter(folder)
    while True:
        step += 1
        weights = {"w": torch.full((500_000,), step)}
        writer.save({"model": weights, "step": step}, best=step % 3 == 0)
        writer.wait()
        os.write(tell, step.to_bytes(8, "little"))

step, amid_save = 0, 0
for _ in range(kills):
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(step, tell)
    os.close(tell)
    done = int.from_bytes(os.read(hear, 8), "little")  # the first save
    time.sleep(generator.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while told := os.read(hear, 8):
        done = int.from_bytes(told, "little")
    os.close(hear)
    amid_save += any(name.endswith(".tmp") for name in os.listdir(folder))
    state, path = load_newest(folder)
    assert state["step"] in (done, done + 1), (state["step"], done)
    assert bool((state["model"]["w"] == state["step"]).all())
    step = state["step"]
print(step, amid_save)
"""


def test_sigkill_while_saving_loses_no_finished_save(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    steps, amid_save = map(int, result.stdout.split())
    assert steps >= 15 and amid_save > 0, "no kill hit a save"
