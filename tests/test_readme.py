"""The README's commands: each is read by its program's own parser, and a chain of them is run on a
few small images.
"""

import importlib
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.data import make_folders
from helpers.shell import ROOT, run
from torch.distributed.run import get_args_parser as torchrun_parser

import ablation
import compare
import options
from utils.checkpoint import load_checkpoint
from utils.errors import UsageError, UserError

# Scripts that train or test whatever the flags: test_scripts.py and others run them with stand-ins
# for their programs.
WITH_STAND_INS = {
    "scripts/demo.sh",
    "scripts/test.sh",
    "scripts/gpu_check.sh",
    "scripts/arm_check.sh",
    "scripts/slurm.sh",
    "scripts/seg/demo.sh",
    "scripts/video/demo.sh",
    "scripts/ablation/fmnist.sh",
    "scripts/selection/compare.sh",
}
FAST = ["--num-workers", "0", "--device", "cpu"]
# Behind the README's own flags: what makes a training one of seconds.
SMALL = [
    "--model",
    "vim_micro",
    "--model-kwargs",
    "embed_dim=16",
    "--input-size",
    "32",
    "--batch-size",
    "4",
    "--epochs",
    "1",
]


class Command(NamedTuple):
    """VARIABLE=value launcher program arguments"""

    variables: dict[str, str]
    launcher: str
    program: str
    arguments: list[str]

    def __str__(self) -> str:
        return " ".join([self.program, *self.arguments])


def read_command(line: str) -> Command | None:
    """The command of a line; None where it holds a comment alone."""
    words = shlex.split(line, comments=True)
    if not words:
        return None
    variables = list(itertools.takewhile(re.compile("[A-Z_]+=").match, words))
    launcher, *words = words[len(variables) :]
    if launcher == "torchrun":
        launched = torchrun_parser().parse_args(words)
        words = [launched.training_script, *launched.training_script_args]
    return Command(
        dict(variable.split("=", 1) for variable in variables), launcher, words[0], words[1:]
    )


def readme_commands() -> list[Command]:
    """The commands of the bash blocks, and those that stand in the text as `python ...`, `bash
    ...`.
    """
    text = (ROOT / "README.md").read_text()
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`((?:python|torchrun|bash|sbatch) [^`]+)`", text)
    lines = [*blocks.replace("\\\n", " ").splitlines(), *inline]
    return [command for command in map(read_command, lines) if command]


COMMANDS = readme_commands()


def check_flags(program: str, flags: list[str]) -> None:
    """Judge flags as the program does before it reads any file. Raises UsageError."""
    if flags == ["--help"]:
        with pytest.raises(SystemExit, match="^0$"):
            options.parse(flags)
    elif program == "main.py":
        if flags[-1:] == ["..."]:  # the example of several GPUs leaves the rest to the reader
            flags = [*flags[:-1], "--model-path", "teacher.pth"]
        options.parse(flags, {} if "--eval" in flags else None)
    elif program == "ablation.py":
        ablation.plan(ablation.parse(flags))
    elif program == "compare.py":
        compare.plan(compare.parse(flags))
    else:  # where no file of the command is, the program gets as far as looking for it
        with pytest.raises(UserError) as error:
            importlib.import_module(program.removesuffix(".py")).main(flags)
        if error.value.exit_code == UsageError.exit_code:
            raise error.value


def test_the_commands_are_found():
    assert {
        "main.py",
        "ablation.py",
        "compare.py",
        "visualize.py",
        "predict.py",
        "report.py",
        "export.py",
        "scripts/eval.sh",
        "scripts/vim-s.sh",
        *WITH_STAND_INS,
    } <= {command.program for command in COMMANDS}
    assert {"python", "torchrun", "bash", "sbatch"} == {command.launcher for command in COMMANDS}


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.launcher in ("python", "torchrun")], ids=str
)
def test_the_program_takes_the_flags(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_flags(command.program, command.arguments)


@pytest.mark.parametrize(
    "line",
    [
        "python main.py --token-keep-ratios 0.7",
        "python main.py --eval --model-path x --token-keep-ratio 7",
        "torchrun --standalone main.py --method dvym ...",
        "python ablation.py --dense-path x -- --epoch 3",
        "python compare.py --dense-path x --keep 2 -- --epochs 3",
        "python visualize.py --model-path x --image photos/ --output_dir y",
        "python predict.py --model x FILE",
        "python export.py --model-path x --output y.onnx --format coreml",
        "python report.py x --outputs y",
    ],
)
def test_a_flag_that_is_wrong_is_noticed(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = read_command(line)
    with pytest.raises(UsageError):
        check_flags(command.program, command.arguments)


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if c.program.endswith(".sh") and c.program not in WITH_STAND_INS],
    ids=str,
)
def test_the_script_launches_what_its_program_takes(command, tmp_path):
    paths = {name: tmp_path for name in ("MODEL_PATH", "DATA_PATH") if name in command.variables}
    result = run(command.program, *command.arguments, **command.variables | paths, DRY_RUN=1)
    assert result.returncode == 0, result.stderr
    words = [word.removeprefix(f"{ROOT}/") for word in shlex.split(result.stdout)]
    [position] = [words.index(name) for name in ("main.py", "ablation.py") if name in words]
    check_flags(words[position], words[position + 1 :])


# A user's first hour: the commands as the README has them, in a folder where its FOLDER and photos/
# are.


def find(program: str, *flags: str) -> list[str]:
    """The arguments of the README's one `python PROGRAM ...` with these flags, its placeholders
    filled in.
    """
    [command] = [
        c
        for c in COMMANDS
        if (c.launcher, c.program) == ("python", program) and {*flags} <= {*c.arguments}
    ]
    places = {"CKPT": "output/dyvm/best_checkpoint.pth", "DIR": "output/sweep", "FILE...": "photos"}
    return [places.get(word, word) for word in command.arguments]


def start(program: str, *arguments: str) -> None:
    assert not importlib.import_module(program.removesuffix(".py")).main([*arguments])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which the README's dense and DyVM trainings have been run."""
    folder = tmp_path_factory.mktemp("home")
    make_folders(folder / "FOLDER")
    make_folders(folder / "photos", train=1, val=2)
    (folder / "output").mkdir()
    (folder / "output/demo").symlink_to(
        folder / "output"
    )  # the demo's runs are laid out like these
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for method in ("dense", "dyvm"):
            start(
                "main.py",
                *find("main.py", "--method", method, "vim_tiny"),
                *SMALL,
                *FAST,
                "--throughput-seconds",
                "0.1",
            )
    return folder


@pytest.fixture
def at_home(home, monkeypatch, as_a_process_of_its_own):
    monkeypatch.chdir(home)
    return home


def evaluation(folder: Path) -> dict:
    return json.loads((folder / "eval.json").read_text())


def test_training(at_home):
    dense, student = (
        load_checkpoint(at_home / f"output/{name}/best_checkpoint.pth")
        for name in ("dense", "dyvm")
    )
    assert (dense["args"]["model"], dense["args"]["lr"], dense["class_names"]) == (
        "vim_micro",
        1e-3,
        ["cat", "dog"],
    )
    assert (
        student["args"]["model"],
        student["args"]["token_keep_ratio"],
        student["args"]["block_keep_ratio"],
    ) == ("dyvm_vim_micro", 0.7, 0.8)
    report = evaluation(at_home / "output/dyvm")
    assert report["dense"]["top1"] == evaluation(at_home / "output/dense")["dense"]["top1"], (
        "the teacher is that run"
    )
    assert report["dynamic"]["keep"] == [int(64 * 0.7**stage) / 64 for stage in (1, 2, 3)]


def test_evaluation_and_another_budget(at_home):
    reports = []
    for command in COMMANDS:
        if {"--eval", "output/dyvm/best_checkpoint.pth"} <= {*command.arguments}:
            start("main.py", *command.arguments, *FAST, "--throughput-seconds", "0")
            reports.append(evaluation(at_home / "output/eval")["dynamic"])
    as_trained, half = reports
    trained = evaluation(at_home / "output/dyvm")["dynamic"]
    assert {key: as_trained[key] for key in ("top1", "loss", "keep", "flops")} == {
        key: trained[key] for key in ("top1", "loss", "keep", "flops")
    }
    assert half["keep"] == [0.5, 0.25, 0.125]


def test_sweep(at_home):
    start("main.py", *find("main.py", "--eval", "--sweep"), *FAST, "--throughput-seconds", "0.1")
    points = json.loads((at_home / "output/sweep/sweep.json").read_text())["points"]
    assert [point["token_keep_ratio"] for point in points] == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def test_predictions(at_home, capsys):
    start("predict.py", *find("predict.py", "CKPT"), *FAST)
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6 and {row[1] for row in rows} <= {"cat", "dog"}


def test_another_runtime(at_home, capsys):
    pytest.importorskip("onnxruntime")
    start("export.py", *find("export.py", "dyvm.onnx"))
    capsys.readouterr()
    said = []
    for arguments in (find("predict.py", "dyvm.onnx"), find("predict.py", "CKPT")):
        start("predict.py", *("photos" if a == "photo.jpg" else a for a in arguments), *FAST)
        said.append([line.split("\t")[:2] for line in capsys.readouterr().out.splitlines()])
    assert said[0] == said[1] and len(said[0]) == 6


def test_pictures(at_home):
    start("visualize.py", *find("visualize.py"), *FAST)
    assert len((at_home / "pictures/images.csv").read_text().splitlines()) == 1 + 6


def test_report(at_home):
    start("report.py", *find("report.py"))
    text = (at_home / "both.html").read_text()
    assert "dyvm_vim_micro on FOLDER" in text and ">dense<" in text


def test_ablation_fits_the_teacher(at_home):
    args = ablation.parse([*find("ablation.py"), *SMALL, *FAST])
    runs = ablation.plan(args)
    experiment = ablation.check_inputs(runs, args.dense_path, at_home / "new")
    assert experiment.data.class_names == ["cat", "dog"]
    assert {run.variant for run in runs} == {*ablation.VARIANTS, "half"} and len(runs) == 3 * 8


def test_the_guarantees_name_tests_that_exist():
    text = (ROOT / "docs" / "guarantees.md").read_text()
    named = re.findall(r"`(test_\w+\.py)((?:::\w+)*)`", text)
    assert len(named) > 15
    for file, names in named:
        source = (ROOT / "tests" / file).read_text()
        for name in filter(None, names.split("::")):
            assert re.search(rf"^\s*(def|class) {name}\b", source, re.M), f"{file} has no {name}"
