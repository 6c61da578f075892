"""What this machine is, for the log of `scripts/gpu_check.sh`: GPUs, versions, missing packages,
backends of the selective scan that run here.

    python benchmarks/machine.py

The exit code is 1 if Triton's kernels cannot run: everything else would then measure something
else.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ops import selective_scan, triton_support
from ops.selective_scan import mamba_ssm
from utils.environment import describe_environment
from utils.errors import UserError
from utils.program import run_main
from utils.startup import MODULES

OTHERS = ("matplotlib", "sklearn", "webdataset", "pytest", "xdist")


def gpus() -> str:
    """nvidia-smi's table, or why there is none."""
    try:
        found = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not run ({error})"
    return (found.stdout or found.stderr).rstrip()


def main() -> None:
    print(gpus())
    for name, value in describe_environment("pytest", "pytest-xdist").items():
        print(f"{name}: {value}")
    missing = [name for name in (*MODULES, *OTHERS) if importlib.util.find_spec(name) is None]
    print(f"missing packages: {', '.join(missing) or 'none'}")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        print(
            f"GPU {index}: {found.name}, sm_{found.major}{found.minor}, "
            f"{found.multi_processor_count} SMs, {found.total_memory >> 20:,} MiB"
        )
    print(f"mamba_ssm backend: {mamba_ssm.available() or 'runs here'}")
    refusal = triton_support.refusal()
    if refusal is not None:
        raise UserError(f"Triton's kernels do not run here: {refusal}")
    runs = [name for name in selective_scan.PREFERENCE if selective_scan.runs_on(name, "cuda")]
    print(f"backends on CUDA, fastest first: {', '.join(runs)}")


if __name__ == "__main__":
    run_main(main)
