"""scripts/slurm.sh with a stand-in for srun: rendezvous, requeues, how a failure is passed on."""

import os
import signal
import subprocess

import pytest
from helpers.recipes import flags_of
from helpers.shell import ROOT, environment, one_line, program, run, wait_for


@pytest.fixture
def cluster(tmp_path, inputs):
    """Variables of a job on two nodes, with stand-ins for SLURM's programs; scontrol's calls go to
    a file.
    """
    program(
        tmp_path / "bin/scontrol",
        f"""
if [[ $1 == show ]]; then
    printf "node7\\nnode8\\n"
else
    echo "$@" >>{tmp_path}/scontrol.log
fi""",
    )
    program(tmp_path / "bin/srun", 'exec "$@"')
    python = program(tmp_path / "bin/checked-python", "exit 0")
    return inputs | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHON": python,
        "SLURM_JOB_ID": 12345,
        "SLURM_NNODES": 2,
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_SUBMIT_DIR": ROOT,
    }


def test_slurm_rendezvous(cluster, tmp_path):
    result = run(
        "scripts/slurm.sh", "scripts/vim-s.sh", "--epochs", "2", DRY_RUN=1, cwd=tmp_path, **cluster
    )
    assert result.returncode == 0, result.stderr
    assert (
        "--nnodes=2 --rdzv-backend=c10d --rdzv-id=12345 --rdzv-endpoint=node7:22345 "
        in result.stdout
    )
    assert "--standalone" not in result.stdout
    flags = flags_of(result.stdout)
    assert (flags["resume"], flags["epochs"], flags["model"]) == ("auto", "2", "dyvm_vim_small")


def test_slurm_requeues_an_interrupted_job_once_it_has_saved(cluster, tmp_path):
    program(
        tmp_path / "bin/srun",
        f"""
trap 'sleep 0.3; touch {tmp_path}/saved; exit 1' USR1
touch {tmp_path}/started
while :; do sleep 0.05; done""",
    )
    job = subprocess.Popen(
        ["bash", ROOT / "scripts/slurm.sh", "scripts/vim-s.sh"],
        env=environment(**cluster),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "started")
    job.send_signal(signal.SIGUSR1)
    message = job.communicate(timeout=20)[1]
    assert job.returncode == 0
    assert "job 12345 was interrupted" in message
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 12345\n"


def test_slurm_passes_a_failure_on(cluster, tmp_path):
    program(tmp_path / "bin/srun", "exit 3")
    assert run("scripts/slurm.sh", "scripts/vim-s.sh", **cluster).returncode == 3
    assert not (tmp_path / "scontrol.log").exists()


def test_slurm_says_how_to_submit(cluster, tmp_path):
    assert "submit it with: sbatch" in one_line(run("scripts/slurm.sh", "scripts/vim-s.sh"), 1)
    assert "is not a recipe" in one_line(run("scripts/slurm.sh", "scripts/none.sh", **cluster), 1)
    elsewhere = cluster | {"SLURM_SUBMIT_DIR": tmp_path}
    assert "not the repository's root" in one_line(
        run("scripts/slurm.sh", "scripts/vim-s.sh", **elsewhere), 1
    )
