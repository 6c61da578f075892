"""The shell scripts: the recipes' numbers, what they launch and what they say to a wrong
environment, with a stand-in for python so that nothing is trained.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers.recipes import flags_of
from helpers.shell import ROOT, one_line, program, run

import ablation
import options

SCRIPTS = sorted(ROOT.glob("scripts/**/*.sh"))

# The paper's recipes for ImageNet-1K: model, images per GPU, learning rate, token keep ratio, block
# keep ratio.
RECIPES = {
    "vim-t": ("dyvm_vim_tiny", 128, 3e-5, 0.9, 0.8),
    "vim-s": ("dyvm_vim_small", 64, 5e-5, 0.7, 0.8),
    "vim-b": ("dyvm_vim_base", 32, 5e-5, 0.7, 0.7),
    "videomamba-t": ("dyvm_videomamba_tiny", 128, 3e-5, 0.9, 0.8),
    "videomamba-s": ("dyvm_videomamba_small", 64, 5e-5, 0.7, 0.8),
    "mambareg-s": ("dyvm_mambareg_small", 64, 5e-5, 0.7, 0.8),
    "mambareg-b": ("dyvm_mambareg_base", 32, 5e-5, 0.7, 0.7),
}
SHARED_RECIPE = {
    "method": "dyvm",
    "data-set": "IMNET",
    "epochs": 30,
    "sched": "cosine",
    "warmup-epochs": 5,
    "warmup-lr": 1e-5,
    "min-lr": 1e-6,
    "opt": "adamw",
    "weight-decay": 1e-8,
    "drop-path": 0,
    "model-ema-decay": 0.99996,
    "amp": "off",
    "repeated-aug": True,
    "aa": "rand-m9-mstd0.5-inc1",
    "color-jitter": 0.3,
    "train-interpolation": "bicubic",
    "reprob": 0.25,
    "remode": "pixel",
    "mixup": 0.8,
    "cutmix": 1,
    "smoothing": 0.1,
    "eval-crop-ratio": 0.875,
    "token-pruning-weight": 10,
    "block-pruning-weight": 10,
}


def same_value(printed, expected):
    return printed == expected if isinstance(expected, (bool, str)) else float(printed) == expected


# Syntax and documents


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_syntax(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("document", [*ROOT.glob("*.md"), *SCRIPTS], ids=lambda path: path.name)
def test_named_files_exist(document):
    """Every script and program that the README or a script's launch lines name is there."""
    named = re.findall(
        r"(?:bash|python3?|sbatch.*) ((?:scripts|benchmarks|tests)/[\w/-]+\.(?:sh|py)|main\.py)",
        document.read_text(),
    )
    assert [name for name in named if not (ROOT / name).is_file()] == []


# Recipes


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_the_papers(name, inputs):
    result = run(f"scripts/{name}.sh", DRY_RUN=1, GPUS=4, PYTHON="python3", **inputs)
    assert result.returncode == 0, result.stderr
    assert "torch.distributed.run --standalone --nproc_per_node=4 " in result.stdout
    model, batch, lr, token_keep, block_keep = RECIPES[name]
    expected = SHARED_RECIPE | {
        "model": model,
        "batch-size": batch,
        "lr": lr,
        "token-keep-ratio": token_keep,
        "block-keep-ratio": block_keep,
        "model-path": str(inputs["MODEL_PATH"]),
        "data-path": str(inputs["DATA_PATH"]),
        "output_dir": str(ROOT / "output" / name),
    }
    flags = flags_of(result.stdout)
    assert flags.keys() == expected.keys()
    assert {
        flag: flags[flag] for flag in expected if not same_value(flags[flag], expected[flag])
    } == {}


def test_main_knows_every_flag_of_the_recipes(inputs):
    usage = subprocess.run(
        [sys.executable, ROOT / "main.py", "--help"], capture_output=True, text=True
    ).stdout
    commands = [
        run("scripts/vim-t.sh", DRY_RUN=1, **inputs).stdout,
        run("scripts/eval.sh", DRY_RUN=1, **inputs).stdout,
    ]
    demo = (ROOT / "scripts/demo.sh").read_text()
    flags = {f"--{flag}" for command in commands for flag in flags_of(command)}
    flags |= set(re.findall(r"(?<=\s)--[\w-]+", demo)) - {
        "--logdir",
        "--output",
    }  # of other programs
    assert {flag for flag in flags if not re.search(rf"{flag}\b(?!-)", usage)} == set()


def test_extra_flags_win(inputs):
    result = run(
        "scripts/vim-s.sh",
        "--lr",
        "1e-3",
        "--no-repeated-aug",
        DRY_RUN=1,
        OUTPUT="/runs/a b",
        **inputs,
    )
    flags = flags_of(result.stdout)
    assert flags["lr"] == "1e-3"
    assert flags["output_dir"] == "/runs/a b"
    assert result.stdout.rstrip().endswith("--no-repeated-aug")


@pytest.mark.parametrize("devices, processes", [("0,1,3", 3), ("2", 1), ("", 1), ("-1", 1)])
def test_one_process_for_each_visible_gpu(devices, processes, inputs):
    result = run("scripts/vim-s.sh", DRY_RUN=1, CUDA_VISIBLE_DEVICES=devices, **inputs)
    if processes == 1:  # without a launcher
        assert result.stdout.startswith("python3 ") and "torch.distributed.run" not in result.stdout
    else:
        assert f"--nproc_per_node={processes} " in result.stdout


def test_gpus_are_counted_by_the_driver(inputs, tmp_path):
    program(tmp_path / "bin/nvidia-smi", 'printf "GPU 0: A (UUID: x)\\nGPU 1: A (UUID: y)\\n"')
    result = run(
        "scripts/vim-s.sh", DRY_RUN=1, PATH=f"{tmp_path}/bin:{os.environ['PATH']}", **inputs
    )
    assert "--nproc_per_node=2 " in result.stdout


@pytest.mark.parametrize("script", [f"scripts/{name}.sh" for name in [*RECIPES, "eval"]])
@pytest.mark.parametrize("variable", ["MODEL_PATH", "DATA_PATH"])
def test_missing_variables(script, variable, inputs):
    unset = {name: value for name, value in inputs.items() if name != variable}
    assert f"{variable} is not set" in one_line(run(script, DRY_RUN=1, **unset), 2)
    message = one_line(run(script, DRY_RUN=1, **unset, **{variable: "/nowhere/at all"}), 1)
    assert f"{variable}=/nowhere/at all does not exist" in message


@pytest.mark.parametrize("gpus", ["0", "two", "-1"])
def test_wrong_gpus(gpus, inputs):
    assert f"GPUS={gpus} is not" in one_line(
        run("scripts/vim-s.sh", DRY_RUN=1, GPUS=gpus, **inputs), 2
    )


def test_eval_command(inputs):
    flags = flags_of(
        run("scripts/eval.sh", "--model", "dyvm_vim_small", DRY_RUN=1, **inputs).stdout
    )
    assert flags["eval"] is True
    assert flags["model-path"] == str(inputs["MODEL_PATH"])
    assert flags["model"] == "dyvm_vim_small"


# Ablations


@pytest.mark.parametrize(
    "name, flag, value",
    [
        ("token-only", "method", "token"),
        ("block-only", "method", "block"),
        ("scorer-b", "scorer-input", "B"),
        ("scorer-delta", "scorer-input", "delta"),
        ("random", "token-strategy", "random"),
        ("static", "token-strategy", "static"),
    ],
)
def test_an_ablation_is_the_recipe_but_for_one_flag(name, flag, value, inputs, tmp_path):
    recipe = flags_of(run("scripts/vim-s.sh", DRY_RUN=1, GPUS=4, **inputs).stdout)
    result = run(f"scripts/ablation/{name}.sh", DRY_RUN=1, GPUS=4, cwd=tmp_path, **inputs)
    assert flags_of(result.stdout) == recipe | {
        flag: value,
        "output_dir": str(ROOT / "output/ablation" / name),
    }
    assert f"/path/to/it bash scripts/ablation/{name}.sh" in one_line(
        run(f"scripts/ablation/{name}.sh"), 2
    )
    assert shlex.join([f"--{flag}", value]) in ablation.VARIANTS.values()


def test_all_ablations_on_imagenet(inputs):
    printed = run(
        "scripts/ablation/all.sh", "--amp", "bf16", DRY_RUN=1, GPUS=8, SEEDS="3 5", **inputs
    ).stdout
    words = shlex.split(printed)
    args = ablation.parse(words[2:])
    assert words[1] == str(ROOT / "ablation.py")
    assert (args.seeds, args.jobs, list(args.variants)) == ([3, 5], 8, list(ablation.VARIANTS))
    assert (args.dense_path, args.output_dir) == (
        str(inputs["MODEL_PATH"]),
        str(ROOT / "output/ablation/all"),
    )
    run_args = ablation.plan(args)[0].args
    recipe = flags_of(run("scripts/vim-s.sh", DRY_RUN=1, **inputs).stdout)
    assert run_args.batch_size * run_args.accum_steps == 4 * int(recipe["batch-size"])
    assert (run_args.lr, run_args.epochs, run_args.data_set, run_args.amp) == (
        5e-5,
        30,
        "IMNET",
        "bf16",
    )
    for variable in ("MODEL_PATH", "DATA_PATH"):
        unset = {name: value for name, value in inputs.items() if name != variable}
        assert f"{variable} is not set" in one_line(
            run("scripts/ablation/all.sh", DRY_RUN=1, **unset), 2
        )


def test_ablations_on_fashion_mnist(python, tmp_path):
    result = run(
        "scripts/ablation/fmnist.sh",
        "--amp",
        "bf16",
        PYTHON=python,
        OUTPUT=tmp_path / "runs",
        EPOCHS_DENSE=5,
        EPOCHS=3,
        SUBSET=640,
        JOBS=4,
        SEEDS="1 2",
    )
    assert result.returncode == 0, result.stderr
    dense, runner = (tmp_path / "calls.log").read_text().splitlines()
    flags = flags_of(dense)
    assert (flags["method"], flags["epochs"], flags["subset"], flags["resume"]) == (
        "dense",
        "5",
        "640",
        "auto",
    )
    args = ablation.parse(shlex.split(runner)[1:-1])  # without the stand-in's GOLDEN_DIR
    assert (args.seeds, args.jobs, args.output_dir) == ([1, 2], 4, str(tmp_path / "runs"))
    assert args.dense_path == f"{flags['output_dir']}/best_checkpoint.pth"
    student, teacher = ablation.plan(args)[0].args, options.parse(shlex.split(dense)[1:-1])
    assert (student.epochs, student.pruning_layers, student.token_keep_ratio) == (3, [2, 4, 6], 0.6)
    own = {
        "epochs",
        "lr",
        "warmup_epochs",
        "method",
        "model",
        "model_path",
        "output_dir",
        "pruning_layers",
        "token_keep_ratio",
        "seed",
    }
    assert {
        name for name in vars(student) if getattr(student, name) != getattr(teacher, name)
    } == own


# test.sh and demo.sh with a python that notes what it is asked to run


def test_test_command(python, tmp_path):
    assert run("scripts/test.sh", PYTHON=python, cwd=tmp_path).returncode == 0
    check, layout, everything = (tmp_path / "calls.log").read_text().splitlines()
    assert check.startswith("-m ruff check . ")
    assert layout.startswith("-m ruff format --check . ")
    assert everything.startswith("-m pytest ")
    assert "--cov=models " in everything
    assert "--cov-fail-under=80 " in everything and "-n 2 " in everything
    assert everything.endswith(f"GOLDEN_DIR={(ROOT.parent / 'shared/golden').resolve()}")
    run(
        "scripts/test.sh",
        "tests/test_flops.py",
        "-k",
        "paper",
        PYTHON=python,
        GOLDEN_DIR="vectors",
        cwd=tmp_path,
    )
    part = (tmp_path / "calls.log").read_text().splitlines()[-1]
    assert "tests/test_flops.py -k paper " in part
    assert "--cov-fail-under" not in part and "-n 2 " not in part
    assert part.endswith(f"GOLDEN_DIR={tmp_path / 'vectors'}")


def test_ci_runs_the_test_command(python, tmp_path):
    """Where no browser can be installed."""
    program(tmp_path / "bin/apt-get", "exit 100")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    assert run(".ci/run", PYTHON=python, PATH=path, cwd=tmp_path).returncode == 0
    of_ci = (tmp_path / "calls.log").read_text()
    run("scripts/test.sh", PYTHON=python)
    assert (tmp_path / "calls.log").read_text() == 2 * of_ci


def test_test_command_names_what_is_missing(tmp_path):
    python = program(tmp_path / "python", "[[ $2 != *pytest_cov* ]]")
    assert f"{python} has no pytest_cov" in one_line(run("scripts/test.sh", PYTHON=python), 1)


def test_arm_check_without_an_emulator(tmp_path):
    for tool, real in {"bash": "bash", "dirname": "dirname", "mmdebstrap": "true"}.items():
        (tmp_path / tool).symlink_to(shutil.which(real))
    said = one_line(run("scripts/arm_check.sh", PATH=str(tmp_path), ARM_ROOT=tmp_path / "arm"), 1)
    assert "needs qemu-aarch64 aarch64-linux-gnu-g++: sudo apt-get install" in said
    assert not (tmp_path / "arm").exists()


def test_demo(python, tmp_path):
    result = run(
        "scripts/demo.sh", PYTHON=python, OUTPUT=tmp_path / "demo", EPOCHS_DENSE=5, EPOCHS_DYVM=3
    )
    assert result.returncode == 0, result.stderr
    assert f"report:   {tmp_path}/demo/report.html" in result.stdout
    *calls, report = (tmp_path / "calls.log").read_text().splitlines()
    dense, student, sweep, evaluation, distilled = map(flags_of, calls)
    different = {name: value for name, value in distilled.items() if student.get(name) != value}
    assert different == {"token-strategy": "distilled", "output_dir": f"{tmp_path}/demo/distilled"}
    assert (dense["method"], dense["model"], dense["epochs"]) == ("dense", "vim_micro", "5")
    assert (student["method"], student["model"], student["epochs"]) == (
        "dyvm",
        "dyvm_vim_micro",
        "3",
    )
    assert (
        student["model-path"]
        == evaluation["dense-path"]
        == f"{tmp_path}/demo/dense/best_checkpoint.pth"
    )
    assert (
        evaluation["model-path"]
        == sweep["model-path"]
        == f"{tmp_path}/demo/dyvm/best_checkpoint.pth"
    )
    assert sweep["sweep"] == "0.5:1.0:0.1"
    folders = f"{tmp_path}/demo/dyvm {tmp_path}/demo/distilled"
    assert f"report.py {folders} --output {tmp_path}/demo/report.html" in report


@pytest.mark.parametrize("script", ["demo", "seg/demo", "video/demo"])
@pytest.mark.parametrize("flags", [["--help"], ["--epochs", "3", "-h"]])
def test_the_demos_tell_what_they_are(python, tmp_path, script, flags):
    result = run(f"scripts/{script}.sh", *flags, PYTHON=python, OUTPUT=tmp_path / "demo")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"bash scripts/{script}.sh [flags of main.py" in result.stdout
    assert not (tmp_path / "calls.log").exists()


@pytest.mark.parametrize("epochs, warmup", [(1, 0), (5, 2), (20, 3)])
def test_a_short_demo_warms_up_for_half_of_it(python, tmp_path, epochs, warmup):
    run("scripts/demo.sh", PYTHON=python, OUTPUT=tmp_path, EPOCHS_DENSE=epochs, EPOCHS_DYVM=epochs)
    calls = (tmp_path / "calls.log").read_text().splitlines()
    trainings = [flags_of(line) for line in calls if "--epochs" in line]
    assert [flags["warmup-epochs"] for flags in trainings] == [str(warmup)] * 3
