"""scripts/setup.sh: which python it takes, and that an environment is made once and never left
half-made as done.
"""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from helpers.shell import ROOT, environment, one_line, program, run, wait_for


def test_setup_takes_the_given_python():
    result = run("scripts/setup.sh", PYTHON=sys.executable)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{sys.executable}\n", "")


@pytest.mark.parametrize(
    "text, complaint",
    [
        (f'exec {sys.executable} -I -S "$@"', "it lacks torch, torchvision, .*jinja2; install"),
        (
            f'PYTHONPATH="${{0%/*}}" exec {sys.executable} "$@"',
            r"it cannot import torch \(no such operator\); install requirements.txt",
        ),
        ("exit 1", "it does not run"),
    ],
)
def test_setup_refuses_an_unfit_python(text, complaint, tmp_path):
    python = program(tmp_path / "python", text)
    (tmp_path / "torch.py").write_text("raise RuntimeError('no such operator')")
    assert re.search(
        f"PYTHON={python} cannot be used: {complaint}",
        one_line(run("scripts/setup.sh", PYTHON=python), 1),
    )


def test_setup_refuses_what_is_no_program():
    assert "PYTHON=/nowhere/python is not a program" in one_line(
        run("scripts/setup.sh", PYTHON="/nowhere/python"), 1
    )


class FreshMachine:
    """A copy of setup.sh beside its own requirements.txt, with a python3 whose venv is a folder and
    whose pip notes its calls, takes PIP_SECONDS and ends with PIP_EXIT.
    """

    def __init__(self, folder):
        self.folder = folder
        self.requirements = folder / "repository/requirements.txt"
        self.pip_log = folder / "pip.log"
        shutil.copytree(ROOT / "scripts", folder / "repository/scripts")
        self.requirements.write_text("torch\n")
        program(
            folder / "bin/python3",
            f"""
if [[ $1 == -m && $2 == venv ]]; then
  mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [[ $1 == -m && $2 == pip ]]; then
  echo "$0" >>{self.pip_log}
  echo "a line of pip"
  sleep "${{PIP_SECONDS:-0}}"
  exit "${{PIP_EXIT:-0}}"
else
  exec {sys.executable} "$@"
fi""",
        )

    def start(self, **variables):
        return subprocess.Popen(
            ["bash", self.folder / "repository/scripts/setup.sh"],
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # a shell cannot undo that the tests themselves were started with SIGINT ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env=environment(
                PATH=f"{self.folder}/bin:{os.environ['PATH']}",
                XDG_CACHE_HOME=self.folder / "cache",
                **variables,
            ),
        )

    def finish(self, job):
        stdout, stderr = job.communicate(timeout=120)
        return subprocess.CompletedProcess(job.args, job.returncode, stdout, stderr)

    def run(self, **variables):
        return self.finish(self.start(**variables))

    def pip_calls(self):
        return len(self.pip_log.read_text().splitlines())

    def environments(self):
        return [path for path in (self.folder / "cache/dyvm").glob("venv-*") if path.is_dir()]


@pytest.fixture
def fresh_machine(tmp_path):
    return FreshMachine(tmp_path)


def test_setup_installs_once(fresh_machine):
    first = fresh_machine.run()
    assert first.returncode == 0, first.stderr
    [environment_folder] = fresh_machine.environments()
    assert first.stdout == f"{environment_folder}/bin/python\n"
    assert "a line of pip" in first.stderr
    second = fresh_machine.run()
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert fresh_machine.pip_calls() == 1
    fresh_machine.requirements.write_text("torch\ntimm\n")
    assert fresh_machine.run().stdout != first.stdout
    assert fresh_machine.pip_calls() == 2


def test_setup_leaves_nothing_behind_when_pip_fails(fresh_machine):
    result = fresh_machine.run(PIP_EXIT=1)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(
        "setup: pip could not install requirements.txt"
    )
    assert fresh_machine.environments() == []
    assert fresh_machine.run().returncode == 0
    assert fresh_machine.pip_calls() == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_setup_makes_a_half_finished_environment_anew(fresh_machine, how):
    job = fresh_machine.start(PIP_SECONDS=20)
    wait_for(fresh_machine.pip_log)
    os.killpg(job.pid, how)
    job.communicate(timeout=20)
    for half_finished in fresh_machine.environments():
        (half_finished / "left over").touch()
    result = fresh_machine.run()
    assert result.returncode == 0, result.stderr
    assert fresh_machine.pip_calls() == 2
    assert not (fresh_machine.environments()[0] / "left over").exists()


def test_setup_makes_a_broken_environment_anew(fresh_machine):
    fresh_machine.run()
    program(fresh_machine.environments()[0] / "bin/python", "exit 127")
    assert fresh_machine.run().returncode == 0
    assert fresh_machine.pip_calls() == 2


def test_two_first_uses_install_once(fresh_machine):
    jobs = [fresh_machine.start(PIP_SECONDS=1), fresh_machine.start(PIP_SECONDS=1)]
    results = [fresh_machine.finish(job) for job in jobs]
    assert [result.returncode for result in results] == [0, 0]
    assert results[0].stdout == results[1].stdout
    assert fresh_machine.pip_calls() == 1
    assert sum("waiting for another set-up" in result.stderr for result in results) == 1


def test_setup_without_venv(fresh_machine, tmp_path):
    program(
        tmp_path / "bin/python3",
        f'''
[[ $2 == *ensurepip* ]] && exit 1
exec {sys.executable} "$@"''',
    )
    assert "cannot make virtual environments" in one_line(fresh_machine.run(), 1)


def test_setup_without_python(tmp_path):
    for name in ["python3", *(f"python3.{minor}" for minor in range(10, 15))]:
        program(tmp_path / "bin" / name, "exit 1")
    result = run(
        "scripts/setup.sh",
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
        XDG_CACHE_HOME=tmp_path / "cache",
    )
    assert "no Python 3.10 or newer found" in one_line(result, 1)
