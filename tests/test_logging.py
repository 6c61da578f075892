"""Logs, averages, progress and the one-line end of a script."""

import argparse
import errno
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import program
from utils.distributed import Distributed
from utils.errors import UsageError, UserError
from utils.files import write_json
from utils.logging import (
    Averages,
    EpochLog,
    Progress,
    setup_logging,
    tensorboard_writer,
    write_args,
)
from utils.program import Lasting, run_main

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def root_logger():
    """Gives pytest its log handlers back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


class TestEpochLog:
    def test_each_epoch_once_after_a_resume(self, tmp_path):
        log = EpochLog(tmp_path)
        log.resume_at(0)
        for epoch in range(4):
            log.append({"epoch": epoch, "train_loss": 1.0 / (epoch + 1)})
        with open(log.path, "a") as file:
            file.write('{"epoch": 1, "tra')  # a kill cut it off
        log.resume_at(2)
        log.append(
            {"epoch": 2, "train_loss": float("nan"), "keep": [0.5, float("inf")], "bad": {"x": 1.5}}
        )
        lines = [
            json.loads(line, parse_constant=pytest.fail)
            for line in log.path.read_text().splitlines()
        ]
        assert [line["epoch"] for line in lines] == [0, 1, 2]
        assert lines[2] == {"epoch": 2, "train_loss": None, "keep": [0.5, None], "bad": {"x": 1.5}}

    def test_folder_that_is_gone(self, tmp_path):
        with pytest.raises(UserError, match="cannot write .*log.txt: No such file"):
            EpochLog(tmp_path / "gone").append({"epoch": 0})


def test_args_are_recorded(tmp_path):
    write_args(tmp_path, argparse.Namespace(lr=0.1, data_path=Path("a/b"), pruning_layers=(2, 4)))
    assert json.loads((tmp_path / "args.json").read_text()) == {
        "lr": 0.1,
        "data_path": "a/b",
        "pruning_layers": [2, 4],
    }


class TestAverages:
    def test_weighted_mean(self):
        averages = Averages()
        averages.update(3, loss=torch.tensor(1.0, requires_grad=True), lr=0.5)
        averages.update(1, loss=torch.tensor([3.0]), top1=100.0)
        assert averages.means() == {"loss": 1.5, "lr": 0.5, "top1": 100.0}

    def test_float64(self):
        averages = Averages()
        for _ in range(1000):
            averages.update(loss=torch.tensor(2.0**24 + 2))
        assert averages.means()["loss"] == 2.0**24 + 2

    def test_numbers_that_are_not_finite_are_left_out(self):
        averages = Averages()
        for loss in (1.0, float("nan"), 3.0, float("inf")):
            averages.update(2, loss=torch.tensor(loss), lr=0.5)
        assert averages.means() == {"loss": 2.0, "lr": 0.5}

    def test_an_interrupted_epoch_ends_with_the_same_means(self):
        values = torch.rand(20).unbind()
        straight, first, second = Averages(), Averages(), Averages()
        for value in values:
            straight.update(2, loss=value)
        for value in values[:7]:
            first.update(2, loss=value)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for value in values[7:]:
            second.update(2, loss=value)
        assert second.means() == straight.means()

    def test_updates_never_wait_for_the_device(self, monkeypatch):
        def wait(*_):
            raise AssertionError("the host waited for the device")

        averages = Averages()
        with monkeypatch.context() as patch:
            for method in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
                patch.setattr(torch.Tensor, method, wait)
            averages.update(4, loss=torch.ones(()), kl=torch.zeros(()))
        assert averages.means() == {"loss": 1.0, "kl": 0.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
    def test_bar_on_a_terminal(self):
        stream = Terminal()
        status = iter(["loss 2.5", "loss 1.5"])
        items = Progress(
            range(5), "epoch 3", status=lambda: next(status), stream=stream, refresh_s=60
        )
        assert list(items) == list(range(5))
        assert (
            "epoch 3" in stream.getvalue() and next(status) == "loss 1.5"
        )  # read once, not once a step

    def test_lines_elsewhere(self, caplog):
        caplog.set_level(logging.INFO)
        stream = io.StringIO()
        items = Progress(
            range(2),
            "epoch 3",
            initial=8,
            total=10,
            status=lambda: "loss 2",
            stream=stream,
            line_s=0,
        )
        assert list(items) == [0, 1] and stream.getvalue() == ""
        assert ["90% 9/10" in caplog.messages[0], "100% 10/10" in caplog.messages[1]] == [
            True,
            True,
        ]
        assert "epoch 3:" in caplog.text and "left" in caplog.text and "loss 2" in caplog.text

    def test_nothing_on_other_ranks(self, caplog):
        caplog.set_level(logging.INFO)
        stream = Terminal()
        assert list(Progress([1, 2], "epoch", shown=False, stream=stream, line_s=0)) == [1, 2]
        assert stream.getvalue() == caplog.text == ""


class TestConsole:
    @pytest.mark.parametrize("is_main, expected", [(True, ["one", "two"]), (False, ["two"])])
    def test_main_rank_only(self, root_logger, capsys, is_main, expected):
        setup_logging(is_main)
        logging.getLogger("a").info("one")
        logging.getLogger("b").error("two")
        assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == expected


def test_tensorboard_on_the_main_rank_only(tmp_path):
    device = torch.device("cpu")
    assert tensorboard_writer(tmp_path, Distributed(device, rank=1, world_size=2)) is None
    with tensorboard_writer(tmp_path, Distributed(device)) as writer:
        writer.add_scalar("loss", 1.0, 0)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


class TestLasting:
    def open(self, encoding="utf-8"):
        """A stream into a pipe, and the pipe's other end."""
        hear, tell = os.pipe()
        return Lasting(os.fdopen(tell, "w", encoding=encoding)), hear

    def test_a_reader_that_goes_away(self):
        stream, hear = self.open()
        stream.write("one\n")
        stream.flush()
        assert os.read(hear, 10) == b"one\n"
        os.close(hear)
        for _ in range(3):
            stream.write("two" * 10_000)
            stream.flush()
        stream.close()

    def test_other_problems_are_not_hidden(self):
        stream = Lasting(open("/dev/full", "w"))
        with pytest.raises(OSError, match="No space left"):
            stream.write("x")
            stream.flush()
        with pytest.raises(OSError, match="No space left"):
            stream.close()

    def test_what_cannot_be_encoded_is_escaped(self):
        for encoding, expected in (("ascii", rb"h\xfcnd \u732b \udce9"), ("utf-8", None)):
            stream, hear = self.open(encoding)
            stream.write("hünd 猫 \udce9")
            stream.close()
            assert os.read(hear, 99) == (expected or "hünd 猫 \\udce9".encode())
            os.close(hear)


def test_json_has_no_numbers_that_are_not_finite(tmp_path, caplog):
    content = {"dynamic": {"loss": float("nan"), "gates": [[0.5, float("inf")]]}, "top1": 3.0}
    write_json(tmp_path / "eval.json", content)
    read = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert read == {"dynamic": {"loss": None, "gates": [[0.5, None]]}, "top1": 3.0}
    assert (
        "eval.json: not finite, written as null: dynamic.loss, dynamic.gates[0][1]" in caplog.text
    )
    caplog.clear()
    write_json(tmp_path / "eval.json", read)
    assert caplog.text == ""


class TestRunMain:
    def end(self, main) -> int:
        with pytest.raises(SystemExit) as caught:
            run_main(main)
        return caught.value.code

    @pytest.mark.parametrize(
        "error, code, line",
        [
            (UserError("no such\nfile"), 1, "error: no such file"),
            (UsageError("unknown model"), 2, "error: unknown model"),
            (KeyboardInterrupt(), 130, "interrupted"),
            (
                OSError(errno.ENOSPC, "", "a/b"),
                1,
                "error: cannot write: No space left on device (a/b)",
            ),
            (
                RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nmore"),
                1,
                "error: out of memory (DefaultCPUAllocator: can't allocate memory: you tried); try "
                "a smaller --batch-size, for a training with --accum-steps or --grad-checkpointing",
            ),
        ],
    )
    def test_one_line(self, capsys, monkeypatch, error, code, line):
        monkeypatch.delenv("WORLD_SIZE", raising=False)

        def main():
            raise error

        assert self.end(main) == code
        assert capsys.readouterr().err == line + "\n"

    def test_world_size_without_rank(self, capsys, monkeypatch):
        """As some clusters set it; and a rank among several."""

        def main():
            raise UserError("no such file")

        monkeypatch.delenv("RANK", raising=False)
        for size, rank, expected in (
            ("4", None, "error: no such file\n"),
            ("four", None, "error: no such file\n"),
            ("4", "2", "error (rank 2): no such file\n"),
            ("1", "0", "error: no such file\n"),
        ):
            monkeypatch.setenv("WORLD_SIZE", size)
            if rank:
                monkeypatch.setenv("RANK", rank)
            assert self.end(main) == 1
            assert capsys.readouterr().err == expected

    @pytest.mark.parametrize(
        "local, error, waits",
        [("1", UsageError, True), ("0", UsageError, False), ("1", UserError, False)],
    )
    def test_the_first_process_of_a_machine_tells_of_flags_first(
        self, capsys, monkeypatch, local, error, waits
    ):
        def main():
            raise error("wrong")

        waited = []
        monkeypatch.setattr(program.time, "sleep", waited.append)
        for name, value in {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": local}.items():
            monkeypatch.setenv(name, value)
        assert self.end(main) == error.exit_code
        assert capsys.readouterr().err == "error (rank 5): wrong\n"
        assert waited == ([program.HEAD_START] if waits else [])

    def test_a_package_that_is_missing_is_one_line(self, capsys, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)

        def main():
            import nosuchpackage  # noqa: F401

        assert self.end(main) == 1
        assert "lacks nosuchpackage" in capsys.readouterr().err

    def test_exit_codes(self):
        assert self.end(lambda: None) == 0
        assert self.end(lambda: 75) == 75

    def test_programming_mistakes_keep_their_trace(self):
        with pytest.raises(ZeroDivisionError):
            run_main(lambda: 1 // 0)

    def test_does_not_import_torch(self):
        script = (
            "import sys; from utils.program import run_main; "
            "assert 'torch' not in sys.modules; run_main(lambda: 3)"
        )
        assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 3
