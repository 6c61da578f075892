"""Several processes: what launchers say, what the ranks agree on, and how a run ends when one of
them dies.
"""

import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.processes import (
    LAUNCHER_VARIABLES,
    Program,
    clean_environment,
    finish,
    free_port,
    torchrun,
)

from utils import preemption
from utils.distributed import Launch, first_node, init_distributed, read_launch
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
WORKER = REPOSITORY / "tests" / "helpers" / "distributed_worker.py"


class Pair:
    """Two processes of the worker; both are gone when the block ends."""

    def __init__(self, case: str, slurm: bool = False):
        port = str(free_port())
        self.processes = []
        for rank in ("0", "1"):
            env = clean_environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            if slurm:
                env |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            else:
                env |= {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
            self.processes.append(Program([WORKER, case], env))

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def ends(self) -> list[tuple[int, str, str]]:
        """(exit code, standard output, standard error) by rank."""
        return finish(self.processes)


def assert_one_line(stderr: str, *words: str) -> None:
    assert len(stderr.strip().splitlines()) == 1 and all(word in stderr for word in words), stderr


class TestLaunch:
    TORCHRUN = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
    }
    SRUN = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
    }

    def test_none(self):
        assert read_launch({}) is None

    def test_torchrun(self):
        assert read_launch(self.TORCHRUN) == Launch(3, 4, 1, "node1", 29500)

    def test_srun(self):
        assert read_launch(self.SRUN) == Launch(5, 8, 1, "gpu07", 20000 + 1234567 % 20000)
        own = {"MASTER_ADDR": "login", "MASTER_PORT": "4000"}
        assert read_launch(self.SRUN | own) == Launch(5, 8, 1, "login", 4000)

    def test_torchrun_inside_srun(self):
        assert read_launch(self.SRUN | self.TORCHRUN).world_size == 4

    def test_batch_script_without_srun_is_one_process(self):
        assert read_launch({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None

    def test_incomplete_or_senseless(self):
        with pytest.raises(UserError, match="lacks MASTER_ADDR"):
            read_launch(
                {name: value for name, value in self.TORCHRUN.items() if name != "MASTER_ADDR"}
            )
        with pytest.raises(UserError, match="not understood.*'three'"):
            read_launch(self.TORCHRUN | {"RANK": "three"})

    @pytest.mark.parametrize(
        "nodelist, node",
        [
            ("gpu1", "gpu1"),
            ("a1,a2", "a1"),
            ("gpu[07-09,12],login1", "gpu07"),
            ("n[1,3]-ib", "n1-ib"),
            ("r[1-2]n[3-4],x", "r1n3"),
        ],
    )
    def test_first_node(self, nodelist, node):
        assert first_node(nodelist) == node


def test_single_process_needs_no_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    distributed = init_distributed("cpu")
    assert (distributed.rank, distributed.world_size, distributed.is_main) == (0, 1, True)
    assert distributed.agree_any(True) and not distributed.agree_any(False)
    values = torch.tensor([1.5, 2.0], dtype=torch.float64)
    total = distributed.all_reduce_sum(values)
    assert torch.equal(total, values) and total.data_ptr() != values.data_ptr()
    assert distributed.gather_objects("a") == ["a"]
    distributed.barrier()
    distributed.shutdown()
    assert not torch.distributed.is_initialized()


def test_missing_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu"):
        init_distributed("cuda")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in TestLaunch.TORCHRUN.items():
        monkeypatch.setenv(name, "2" if name == "LOCAL_RANK" else value)
    with pytest.raises(UserError, match="local rank 2 finds only 2 GPU"):
        init_distributed("cuda")


def test_peers_that_never_come(monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(UserError, match="rank 0 of 2 .* cannot join the other processes"):
        init_distributed("cpu", join_s=1)


@pytest.mark.parametrize("slurm", [False, True])
def test_collectives(slurm):
    with Pair("collectives", slurm) as pair:
        for code, _, stderr in pair.ends():
            assert code == 0, stderr


def test_busy_peer_is_waited_for():
    with Pair("busy_peer") as pair:
        assert [(code, stderr) for code, _, stderr in pair.ends()] == [(0, "")] * 2


def test_killed_peer_ends_the_other():
    with Pair("killed_peer") as pair:
        survivor, killed = pair.ends()
    assert killed[0] == -signal.SIGKILL and survivor[0] == 1
    assert_one_line(survivor[2], "error (rank 0)", "another process has ended", "--resume auto")


def test_killed_peer_ends_a_rank_that_is_stuck_elsewhere():
    with Pair("killed_peer_unnoticed") as pair:
        pair.processes[1].wait(timeout=180)
        start = time.monotonic()
        survivor, killed = pair.ends()
    assert killed[0] == -signal.SIGKILL and survivor[0] == 1
    assert_one_line(
        survivor[2], "error (rank 0)", "rank 1 has ended or does not answer", "--resume auto"
    )
    assert time.monotonic() - start < 40  # it would have stayed 50 s


def test_error_on_one_rank_ends_both():
    with Pair("failing_peer") as pair:
        other, failed = pair.ends()
    assert failed[0] == other[0] == 1
    assert_one_line(failed[2], "error (rank 1): image 17 of rank 1 cannot be decoded")
    assert_one_line(other[2], "error (rank 0)", "another process has ended")


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_signal_to_one_rank_stops_both_after_the_same_step(number):
    with Pair("preempted") as pair:
        for process in pair.processes:
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        pair.processes[1].send_signal(number)
        (code_0, out_0, error_0), (code_1, out_1, error_1) = pair.ends()
    assert code_0 == code_1 == preemption.EXIT_CODE, error_0 + error_1
    step_0, step_1 = out_0.split()[1], out_1.split()[1]
    assert step_0 == step_1 and int(step_0) > 0
    assert out_0.split()[2] == "None" and out_1.split()[2] == number.name


def test_torchrun_restarts_after_a_killed_worker():
    run = torchrun("--max-restarts", "1", WORKER, "restarted")
    output, errors = run.communicate(timeout=180)
    assert run.returncode == 0, errors
    assert output.count("attempt 1 ended") == 2 and "attempt 0" not in output
