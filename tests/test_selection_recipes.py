"""Recipes of ways to reduce tokens other than the paper's."""

import shlex

import pytest
from helpers.recipes import recipe
from helpers.shell import run

import compare
import options
from models.build import ModelSpec

OURS = {
    "distilled-vim-s": {"token_strategy": "distilled"},
    "inplace-vim-s": {"selector_gradient": "inplace"},
    "distilled-merge-vim-s": {"token_strategy": "distilled", "reduction": "prune+merge"},
}
R_MEETO = {  # model, tokens merged by each stage, epochs
    "r-meeto-vim-t": ("dyvm_vim_tiny", 5, 30),
    "r-meeto-vim-s": ("dyvm_vim_small", 11, 15),
    "r-meeto-vim-b": ("dyvm_vim_base", 11, 15),
}


@pytest.mark.parametrize("name, flags", OURS.items())
def test_one_flag_or_two_differ_from_the_papers_recipe(name, flags, tmp_path):
    _, paper = recipe("vim-s", tmp_path, GPUS="4")
    launcher, args = recipe(f"selection/{name}", tmp_path, GPUS="4")
    assert "--nproc_per_node=4" in launcher
    changed = {key: value for key, value in vars(args).items() if value != vars(paper)[key]}
    assert changed.pop("output_dir").endswith(f"output/selection/{name}")
    assert changed == flags


@pytest.mark.parametrize("name", R_MEETO)
def test_merging_is_as_published(name, tmp_path):
    model, merged, epochs = R_MEETO[name]
    _, args = recipe(f"selection/{name}", tmp_path, GPUS="4")
    spec = ModelSpec.from_args(args)
    assert (spec.name, spec.method, spec.reduction) == (model, "token", "merge")
    assert (spec.merge_tokens, args.epochs, args.lr, args.min_lr) == (merged, epochs, 2e-5, 1e-6)
    assert spec.pruning_layers is None, "every second layer"


@pytest.mark.parametrize("name", ["clutter", "fmnist", "fmnist-56", "digits"])
def test_the_comparison(name, python, tmp_path):
    """A dense teacher, and compare.py from its checkpoint with equal flags."""
    given = {"SEEDS": "1 2", "KEEP": "0.4", "METHODS": "static distilled", "STEPS": 30}
    given |= {"SMALLER": "depth=4;depth=3 d_state=2"}
    done = run(
        "scripts/selection/compare.sh", name, "--amp", "bf16",
        PYTHON=python, OUTPUT=tmp_path / "runs", EPOCHS_DENSE=3, **given,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dense, comparison = (tmp_path / "calls.log").read_text().splitlines()
    teacher = options.parse(shlex.split(dense)[1:-1])  # without the stand-in's GOLDEN_DIR
    assert (teacher.method, teacher.epochs, teacher.resume) == ("dense", 3, "auto")
    args = compare.parse(shlex.split(comparison)[1:-1])
    assert (args.seeds, args.keep) == ([1, 2], [0.4])
    assert [smaller.changes for smaller in args.smaller] == [
        {"depth": 4},
        {"depth": 3, "d_state": 2},
    ]
    assert args.trained == ["static", "distilled", "merge-early", "distilled-3"]
    assert args.dense_path == f"{teacher.output_dir}/best_checkpoint.pth"
    student = compare.plan(args).shared
    assert (student.epoch_steps, student.amp, student.pruning_layers) == (30, "bf16", [2])
    same = ("data_set", "input_size", "model_kwargs", "batch_size", "hflip", "crop_padding")
    assert all(getattr(student, flag) == getattr(teacher, flag) for flag in same)


def test_a_comparison_of_nothing_known(tmp_path):
    done = run("scripts/selection/compare.sh", "imagenet")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("which comparison? ") and "not 'imagenet'" in done.stderr
