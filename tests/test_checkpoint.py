"""Checkpoints: what goes in comes out, and damage is refused in one line."""

import errno
import os
import pickle
import random
import resource
import subprocess
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import small_state
from safetensors.torch import save_file

from utils import files
from utils.checkpoint import copy_to_host, is_intact, load_checkpoint, save_checkpoint
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]


def refusal(path: Path) -> str:
    """The one line that loading `path` ends in."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and "Traceback" not in message
    return message


class TestRoundTrip:
    def test_content(self, tmp_path):
        path = tmp_path / "a.pth"
        save_checkpoint(small_state(3), path)
        loaded = load_checkpoint(path)
        assert torch.equal(loaded["model"]["weight"], torch.full((40, 50), 3.0))
        assert torch.equal(loaded["model"]["bias"], torch.arange(7))
        assert loaded["best"] == small_state()["best"] and loaded["args"] == small_state()["args"]
        assert is_intact(path) and os.listdir(tmp_path) == ["a.pth"]

    def test_plain_torch_and_zip_read_it(self, tmp_path):
        path = tmp_path / "a.pth"
        save_checkpoint({"model": {"w": torch.ones(3)}, "epoch": 2}, path)
        assert torch.load(path, weights_only=True)["epoch"] == 2
        assert torch.load(path, weights_only=True, mmap=True)["model"]["w"].sum() == 3
        assert zipfile.ZipFile(path).testzip() is None

    def test_official_envelope_without_checksum(self, tmp_path):
        path = tmp_path / "official.pth"
        for old_format in (False, True):
            torch.save(small_state(), path, _use_new_zipfile_serialization=not old_format)
            assert load_checkpoint(path)["args"].model == "vim_micro"
            assert not is_intact(path)

    def test_bare_weights_become_an_envelope(self, tmp_path):
        weights = {"w": torch.randn(4, 5)}
        torch.save(weights, tmp_path / "bare.pth")
        save_file(weights, tmp_path / "bare.safetensors")
        for name in ("bare.pth", "bare.safetensors"):
            loaded = load_checkpoint(tmp_path / name)
            assert list(loaded) == ["model"] and torch.equal(loaded["model"]["w"], weights["w"])

    def test_host_copy_shares_nothing(self):
        state = {"model": {"w": torch.zeros(3, requires_grad=True)}, "list": [torch.zeros(2)]}
        copy = copy_to_host(state)
        with torch.no_grad():
            state["model"]["w"] += 1
            state["list"][0] += 1
        assert copy["model"]["w"].tolist() == [0, 0, 0] and copy["list"][0].tolist() == [0, 0]
        assert not copy["model"]["w"].requires_grad

    @pytest.mark.parametrize(
        "value", [np.float64(1), np.zeros(2), Path("a"), torch.float32, len, {1, 2}]
    )
    def test_content_that_could_not_be_loaded_is_refused_when_saving(self, tmp_path, value):
        with pytest.raises(ValueError, match=r"state\['best'\]\[1\] is a "):
            save_checkpoint({"model": {}, "best": [0, value]}, tmp_path / "a.pth")
        assert os.listdir(tmp_path) == []

    def test_sha256(self, tmp_path):
        path = tmp_path / "teacher.pth"
        path.write_bytes(b"abc" * 1_000_000)
        expected = subprocess.run(
            ["sha256sum", path], capture_output=True, text=True, check=True
        ).stdout.split()[0]
        assert files.sha256_of(path) == expected
        with pytest.raises(UserError, match="cannot read .*No such file"):
            files.sha256_of(tmp_path / "none")


class TestDamage:
    def test_truncation(self, tmp_path):
        good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
        save_checkpoint(small_state(), good)
        content = good.read_bytes()
        generator = random.Random(0)
        sizes = [0, 1, 2, 21, 22, 71, 93] + [
            len(content) - n for n in (1, 2, 64, 70, 71, 72, 73, 93, 94)
        ]
        for size in sizes + [generator.randrange(len(content)) for _ in range(60)]:
            bad.write_bytes(content[:size])
            refusal(bad)
            assert not is_intact(bad)

    def test_every_corruption_is_noticed(self, tmp_path):
        good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
        save_checkpoint(small_state(), good)
        content = good.read_bytes()
        generator = random.Random(1)
        # Everywhere, and as often at the end, where the archive's directory and the checksum stand.
        places = [generator.randrange(len(content)) for _ in range(200)]
        places += [len(content) - 1 - generator.randrange(100) for _ in range(100)]
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= generator.randrange(1, 256)
            bad.write_bytes(damaged)
            refusal(bad)

    @pytest.mark.parametrize("old_format", [False, True])
    def test_corruption_without_a_checksum_never_ends_in_a_trace(self, tmp_path, old_format):
        good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
        torch.save(small_state(), good, _use_new_zipfile_serialization=not old_format)
        content = good.read_bytes()
        generator = random.Random(2)
        refused = 0
        for _ in range(200):
            damaged = bytearray(content)
            for _ in range(5):
                damaged[generator.randrange(len(content))] ^= generator.randrange(1, 256)
            bad.write_bytes(damaged)
            try:
                assert isinstance(load_checkpoint(bad), dict)
            except UserError as error:
                assert str(bad) in str(error) and "\n" not in str(error)
                refused += 1
        assert refused > 0

    def test_safetensors_damage(self, tmp_path):
        path = tmp_path / "a.safetensors"
        save_file({"w": torch.randn(40)}, path)
        content = path.read_bytes()
        for size in (0, 5, 30, len(content) - 1):
            path.write_bytes(content[:size])
            assert "safetensors" in refusal(path)

    def test_foreign_files(self, tmp_path):
        path = tmp_path / "a.pth"
        assert "No such file" in refusal(tmp_path / "none.pth")
        assert "directory" in refusal(tmp_path)
        path.write_bytes(b"")
        assert "empty" in refusal(path)
        path.write_text("<html>404</html>")
        refusal(path)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "no checkpoint")
        refusal(path)
        for content, reason in (
            ({"state": 1, "epoch": 2}, "no 'model' entry"),
            ({"model": 5}, "no 'model' entry"),
            ({}, "it holds nothing"),
            ([1, 2], "holds a list"),
            (torch.zeros(3), "holds a Tensor"),
        ):
            torch.save(content, path)
            assert reason in refusal(path)


class Bomb:
    """Unpickling it creates the file `target`."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class TestCode:
    def test_code_is_refused_and_not_executed(self, tmp_path):
        executed, path = tmp_path / "executed", tmp_path / "a.pth"
        for old_format in (False, True):
            state = {"model": {"w": torch.zeros(1)}, "args": Bomb(executed)}
            torch.save(state, path, _use_new_zipfile_serialization=not old_format)
            assert "system" in refusal(path) and not executed.exists()
        path.write_bytes(pickle.dumps({"model": Bomb(executed)}))
        refusal(path)
        assert not executed.exists()
        pickle.loads(path.read_bytes())
        assert executed.exists(), "the bomb would not have worked"

    def test_other_classes_are_refused_by_name(self, tmp_path):
        path = tmp_path / "a.pth"
        torch.save({"model": {}, "share": Fraction(1, 2)}, path)
        assert "fractions.Fraction" in refusal(path)

    def test_namespace_stays_forbidden_elsewhere(self, tmp_path):
        save_checkpoint(small_state(), tmp_path / "a.pth")
        load_checkpoint(tmp_path / "a.pth")
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "a.pth", weights_only=True)


class TestStorage:
    """Every way in which a write fails leaves the older file whole and nothing else."""

    def check(self, path: Path, reason: str):
        with pytest.raises(UserError) as caught:
            save_checkpoint({"model": {"w": torch.randn(200_000)}}, path)
        message = str(caught.value)
        assert str(path) in message and reason in message and "\n" not in message
        assert os.listdir(path.parent) == [path.name]
        assert load_checkpoint(path)["step"] == 1

    @pytest.fixture
    def path(self, tmp_path) -> Path:
        save_checkpoint(small_state(1), tmp_path / "checkpoint.pth")
        return tmp_path / "checkpoint.pth"

    @pytest.mark.parametrize("limit", [1_000, 300_000, 800_000])
    def test_no_room(self, path, limit):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            self.check(path, os.strerror(errno.EFBIG))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def test_no_room_noticed_by_fsync(self, path, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        self.check(path, "No space left on device")

    def test_read_only_folder(self, path, monkeypatch):
        if os.geteuid() != 0:  # root may write anywhere
            path.parent.chmod(0o500)
            try:
                self.check(path, "Permission denied")
            finally:
                path.parent.chmod(0o700)

        def read_only(name, mode):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))

        monkeypatch.setattr(files, "open", read_only, raising=False)
        self.check(path, "Read-only file system")

    def test_missing_folder(self, tmp_path):
        with pytest.raises(UserError, match="No such file or directory"):
            save_checkpoint(small_state(), tmp_path / "gone" / "a.pth")

    def test_output_folder_that_cannot_be_one(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot write to the output folder .*file"):
            files.prepare_output_dir(tmp_path / "file")
        assert files.prepare_output_dir(tmp_path / "a" / "b").is_dir()
        assert list((tmp_path / "a" / "b").iterdir()) == []
