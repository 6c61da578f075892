"""Set before PyTorch is imported: threads that wait for each other sleep.

The tests' tensors are tiny. On a shared machine, threads that spin while they wait take the
processor from those that they wait for, and everything becomes ten times slower.
"""

import os
import sys

import pytest
from helpers.shell import program

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if os.environ.get("TRITON_INTERPRET") == "1":
    from helpers import interpreter

    interpreter.hasten()


@pytest.fixture
def two_threads():
    """PyTorch computes with two threads, as it would by itself on two cores; scripts/test.sh gives
    each of its processes one.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def python(tmp_path):
    """A python that notes its arguments in calls.log; `-` runs what it is given, `-c` (the checks)
    always succeeds.
    """
    return program(
        tmp_path / "python",
        f"""
case "$1" in
  -) exec {sys.executable} "$@" ;;
  -c) exit ;;
esac
printf '%q ' "$@" >>{tmp_path}/calls.log
echo "GOLDEN_DIR=${{GOLDEN_DIR:-}}" >>{tmp_path}/calls.log
case "$*" in
  *benchmarks/model.py*) echo "a line of the benchmark"; exit 7 ;;
  *benchmarks/train.py*) sleep 20 ;;
  *"-m gpu"*) echo "3 passed in 1.00s" ;;
esac""",
    )
