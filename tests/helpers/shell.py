"""Running the repository's shell scripts in tests, with stand-ins for slow programs."""

import os
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables):
    """This process's environment without the variables that scripts read, plus `variables`."""
    read = {
        "PYTHON",
        "DATA_PATH",
        "MODEL_PATH",
        "GPUS",
        "OUTPUT",
        "DRY_RUN",
        "MAX_RESTARTS",
        "GOLDEN_DIR",
        "EPOCHS",
        "EPOCHS_DENSE",
        "SUBSET",
        "SEEDS",
        "JOBS",
        "CUDA_VISIBLE_DEVICES",
        "RDZV_ENDPOINT",
        "RDZV_ID",
        "NNODES",
        "XDG_CACHE_HOME",
        "ARM_ROOT",
    }
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in read and not name.startswith("SLURM_")
    }
    return kept | {name: str(value) for name, value in variables.items()}


def run(script, *arguments, cwd=None, **variables):
    return subprocess.run(
        ["bash", str(ROOT / script), *map(str, arguments)],
        env=environment(**variables),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=180,
    )


def program(path, text):
    """An executable shell script at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def one_line(result, code):
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    return result.stderr
