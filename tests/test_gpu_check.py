"""scripts/gpu_check.sh, with a python that notes what it is asked to run."""

import os
import re
import subprocess
import sys
import time
from fnmatch import fnmatch

import pytest
from helpers.shell import ROOT, one_line, program, run

GPU_PARTS = [
    "machine",
    "parity, float32",
    "parity, bf16",
    "kernels",
    "graphs, waits",
    "model S",
    "train",
    "model S, 512",
    "benchmark ops",
    "layout",
    "model T and B",
    "goals",
]


@pytest.fixture
def quick(python, tmp_path):
    """`python`, where training does not outrun its time."""
    return program(
        tmp_path / "quick", f'[[ $* == *benchmarks/train.py* ]] && exit\nexec {python} "$@"'
    )


def gpu_check(python, tmp_path, **variables):
    """`scripts/gpu_check.sh` into tmp_path/results: its result, and {part: line of the summary}."""
    result = run(
        "scripts/gpu_check.sh",
        "results",
        cwd=tmp_path,
        **{"PYTHON": python, "TOTAL_SECONDS": 8, "GOLDEN_DIR": tmp_path} | variables,
    )
    lines = (tmp_path / "results/summary.txt").read_text().splitlines()
    assert lines[0].split() == ["part", "outcome", "seconds", "last", "line"]
    return result, {line[:18].rstrip(): line for line in lines[1:]}


def test_gpu_check_goes_on_after_a_failure(python, tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("train", "model-s", "goals"):
        (tmp_path / f"results/{name}.json").write_text("of an earlier call")
    result, rows = gpu_check(python, tmp_path)
    assert result.returncode == 1
    assert list(rows) == GPU_PARTS
    for part in ("parity, float32", "parity, bf16", "kernels"):
        assert re.search(r" passed .* 3 passed in 1.00s", rows[part])
    assert " passed " in rows["machine"] and " passed " in rows["benchmark ops"]
    assert re.search(r"failed \(exit 7\) .* a line of the benchmark", rows["model S"])
    assert "out of time" in rows["train"] and " passed " in rows["goals"]
    left = {path.name for path in (tmp_path / "results").iterdir()}
    assert left == {"log.txt", "summary.txt"}  # nothing of the earlier call
    assert result.stdout.endswith((tmp_path / "results/summary.txt").read_text())
    calls = (tmp_path / "calls.log").read_text()
    assert calls.count(f" --output {tmp_path}/results/") == 6
    assert calls.count(f"GOLDEN_DIR={tmp_path}\n") == len(GPU_PARTS)
    assert "benchmarks/ops.py --device cuda --precision bf16 --batch 256 " in calls
    assert "benchmarks/model.py --device cuda --models S --img-size 512 --batch 256 " in calls


def test_gpu_check_without_recorded_cases(quick, tmp_path):
    result, rows = gpu_check(quick, tmp_path, GOLDEN_DIR=tmp_path / "none")
    assert result.returncode == 1 and list(rows) == GPU_PARTS
    told = f"no recorded cases at {tmp_path}/none: PARITY WAS NOT CHECKED; set GOLDEN_DIR"
    for part in ("parity, float32", "parity, bf16"):
        assert "NOT RUN" in rows[part] and told in rows[part]
        assert f"== {part}: {told}" in (tmp_path / "results/log.txt").read_text()
    assert "tests/test_golden" not in (tmp_path / "calls.log").read_text()


def test_gpu_check_tells_tests_that_were_all_skipped(quick, tmp_path):
    skips = program(
        tmp_path / "skips",
        f"""
[[ $* == *tests/test_bf16.py* ]] && echo "34 skipped, 54 deselected in 6.17s" && exit
[[ $* == *benchmarks/[mt]* ]] && exit
exec {quick} "$@" """,
    )
    result, rows = gpu_check(skips, tmp_path)
    assert result.returncode == 1
    assert [part for part, line in rows.items() if " passed  " not in line] == ["parity, bf16"]
    assert "all skipped" in rows["parity, bf16"]


def test_gpu_check_with_and_without_xdist(quick, tmp_path):
    gpu_check(quick, tmp_path)
    side_by_side = f" -n {min(len(os.sched_getaffinity(0)), 8)} "
    calls = (tmp_path / "calls.log").read_text()
    assert calls.count(side_by_side) == calls.count("-m pytest") == 4
    (tmp_path / "calls.log").unlink()
    alone = program(tmp_path / "alone", f'[[ $2 == *xdist* ]] && exit 1\nexec {quick} "$@"')
    gpu_check(alone, tmp_path)
    calls = (tmp_path / "calls.log").read_text()
    assert calls.count("-m pytest") == 4 and " -n " not in calls


def test_gpu_check_is_not_held_up_by_what_a_part_leaves_behind(quick, tmp_path):
    lasting = program(
        tmp_path / "lasting",
        f"""
[[ $* == *benchmarks/machine.py* ]] && setsid sleep 30 &
exec {quick} "$@" """,
    )
    begin = time.monotonic()
    gpu_check(lasting, tmp_path)
    assert time.monotonic() - begin < 25


def test_gpu_check_takes_the_python_that_sees_a_gpu(quick, tmp_path):
    program(tmp_path / "bin/python3", f'exec {quick} "$@"')
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    gpu_check("", tmp_path, PATH=path)
    assert (tmp_path / "calls.log").read_text().count("benchmarks/goals.py") == 1
    blind = program(tmp_path / "bin/python3", "[[ $1 == -c && $2 != *cuda* ]]")
    setup = run("scripts/gpu_check.sh", "results", PATH=path, XDG_CACHE_HOME="/dev/null/none")
    assert blind.exists() and setup.returncode == 1 and "setup: " in setup.stderr


def test_gpu_check_runs_every_file_with_gpu_tests():
    script = (ROOT / "scripts/gpu_check.sh").read_text()
    marked = re.compile(r"mark\.gpu\b|golden\.backends\(\)|helpers\.kernels import")
    files = {
        path.name for path in (ROOT / "tests").glob("test_*.py") if marked.search(path.read_text())
    } - {"test_gpu_check.py"}
    named = re.findall(r"tests/(test_\S+\.py)", script)
    left_out = {name for name in files if not any(fnmatch(name, pattern) for pattern in named)}
    assert files and left_out == set()


def test_gpu_check_needs_few_packages():
    """Its programs can be imported without what a bare machine lacks."""
    programs = re.findall(r"benchmarks/(\w+)\.py", (ROOT / "scripts/gpu_check.sh").read_text())
    lacking = "tabulate einops matplotlib sklearn webdataset av onnx onnxscript onnxruntime jinja2"
    code = "\n".join(
        [
            "import sys",
            *(f"sys.modules[{name!r}] = None" for name in lacking.split()),
            *(f"import benchmarks.{name}" for name in sorted(set(programs))),
        ]
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert {"goals", "gpu_plan", "model"} <= set(programs) and run.returncode == 0, run.stderr


def test_gpu_check_helps():
    result = run("scripts/gpu_check.sh", "--help")
    assert result.returncode == 0 and "TOTAL_SECONDS (480)" in result.stdout
    assert "set -uo" not in result.stdout and result.stderr == ""


def test_gpu_check_without_a_gpu(tmp_path):
    python = program(tmp_path / "python", "[[ $2 != *cuda* ]]")
    assert "PyTorch sees no CUDA device" in one_line(
        run("scripts/gpu_check.sh", tmp_path / "out", PYTHON=python), 1
    )
    assert "name one folder" in one_line(run("scripts/gpu_check.sh"), 2)
    assert "TOTAL_SECONDS=0 is not" in one_line(
        run("scripts/gpu_check.sh", tmp_path / "out", TOTAL_SECONDS=0), 2
    )
    bare = program(tmp_path / "bare", "[[ $2 != *timm* ]]")
    assert f"{bare} cannot import timm" in one_line(
        run("scripts/gpu_check.sh", tmp_path / "out", PYTHON=bare), 1
    )
    (tmp_path / "file").touch()
    assert "cannot write to" in one_line(
        run("scripts/gpu_check.sh", tmp_path / "file", PYTHON=python), 1
    )
