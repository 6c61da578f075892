"""The recipes of segmentation are the published ones, and main.py takes every flag of them."""

import shlex
from pathlib import Path

import pytest
from helpers.recipes import recipe
from helpers.shell import run

import options
from datasets import task_of

# Processes, images of each, learning rate, weight decay, layer decay, thousands of steps, clipping,
# token and block keep ratio, features, rope.
PUBLISHED = {
    "upernet-vim-t": (4, 8, 2e-4, 0.1, 0.92, 60, None, None, "hidden", False),
    "upernet-vim-s": (4, 8, 1e-4, 0.05, 0.95, 60, None, None, "residual", True),
    "dyvm-vim-t": (2, 8, 6e-5, 0.01, 0.92, 80, 5, (0.9, 0.8), "hidden", False),
    "dyvm-vim-s": (2, 16, 1.2e-4, 0.01, 0.92, 80, 5, (0.8, 0.8), "hidden", False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_is_the_published_one(name, tmp_path):
    gpus, batch, lr, decay, layer_decay, thousands, clip, keep, features, rope = PUBLISHED[name]
    launcher, args = recipe(f"seg/{name}", tmp_path, GPUS=str(gpus))
    assert f"--nproc_per_node={gpus}" in launcher
    assert task_of(args.data_set) == "segmentation" and args.input_size == 512
    assert (args.batch_size, args.lr, args.unscale_lr) == (batch, lr, True)
    assert (args.weight_decay, args.layer_decay, args.clip_grad) == (decay, layer_decay, clip)
    assert (args.epochs, args.epoch_steps) == (thousands, 1000)
    assert (args.sched, args.poly_power, args.min_lr) == ("poly", 1, 0)
    assert args.sched_on_updates and args.warmup_epochs * args.epoch_steps == 1500
    assert args.warmup_lr == pytest.approx(1e-6 * lr)
    assert (args.features, args.model_kwargs) == (features, {"rope": True} if rope else {})
    assert (args.decoder, args.aux_weight, args.drop_path) == ("upernet", 0.4, 0.1)
    assert (args.model_ema, args.amp, args.opt_betas) == (False, "off", [0.9, 0.999])
    if keep:
        assert args.method == "dyvm" and args.model.startswith("dyvm_")
        assert (args.token_keep_ratio, args.block_keep_ratio) == keep
        assert (args.token_pruning_weight, args.block_pruning_weight) == (20, 20)
    else:
        assert args.method == "dense"


def test_vim_base_has_vim_smalls_recipe(tmp_path):
    small, base = (
        vars(recipe(f"seg/upernet-vim-{size}", tmp_path, GPUS="4")[1]) for size in ("s", "b")
    )
    differ = {name for name in small if small[name] != base[name]}
    assert differ == {"model", "output_dir"} and base["model"] == "vim_base"


def test_missing_variables_are_named():
    done = run("scripts/seg/dyvm-vim-t.sh")
    assert done.returncode == 2 and "MODEL_PATH is not set" in done.stderr
    assert "bash scripts/seg/dyvm-vim-t.sh" in done.stderr


@pytest.mark.parametrize("decoder, epochs", [("upernet", ("4", "2")), ("light", ("8", "4"))])
def test_the_demo(decoder, epochs, python, tmp_path):
    """What it runs; a step with the light decoder takes half as long, so that it makes more."""
    output, scenes = tmp_path / "demo", tmp_path / "scenes"
    variables = dict(PYTHON=python, OUTPUT=output, SCENES=scenes, DECODER=decoder)
    result = run("scripts/seg/demo.sh", **variables)
    assert result.returncode == 0, result.stderr
    calls = [shlex.split(line)[:-1] for line in (tmp_path / "calls.log").read_text().splitlines()]
    programs = [Path(call[0]).name for call in calls]
    assert programs == ["scenes.py", "main.py", "main.py", "main.py", "report.py"]
    assert calls[0][1:3] == ["--output", str(scenes)]
    assert calls[-1][1:] == [str(output / "dyvm")]
    dense, student, evaluated = (options.parse(call[1:]) for call in calls[1:4])
    assert [(args.method, args.decoder, str(args.epochs)) for args in (dense, student)] == [
        ("dense", decoder, epochs[0]),
        ("dyvm", decoder, epochs[1]),
    ]
    best = str(output / "dense" / "best_checkpoint.pth")
    assert student.model_path == evaluated.dense_path == best
    assert evaluated.model_path == str(output / "dyvm" / "best_checkpoint.pth")
