"""The recipes of video are the published ones, and main.py takes every flag of them."""

import shlex
from pathlib import Path

import pytest
from helpers.recipes import recipe
from helpers.shell import run

import options
from datasets import task_of

# Learning rate of 512 clips, epochs, drop path, weight decay, RandAugment; published for 256 clips.
DENSE = {
    "videomamba-t-k400": (4e-4, 70, 0.1, 0.1, "rand-m5-n2-mstd0.25-inc1"),
    "videomamba-s-k400": (4e-4, 50, 0.35, 0.05, "rand-m7-n4-mstd0.5-inc1"),
    "videomamba-m-k400": (4e-4, 50, 0.8, 0.05, "rand-m7-n4-mstd0.5-inc1"),
    "videomamba-t-ssv2": (8e-4, 35, 0.1, 0.1, "rand-m5-n2-mstd0.25-inc1"),
    "videomamba-s-ssv2": (8e-4, 30, 0.35, 0.05, "rand-m7-n4-mstd0.5-inc1"),
    "videomamba-m-ssv2": (8e-4, 30, 0.8, 0.05, "rand-m7-n4-mstd0.5-inc1"),
}
DYVM = {
    "dyvm-videomamba-t-k400": (3e-5, 30),
    "dyvm-videomamba-s-k400": (5e-5, 15),
    "dyvm-videomamba-m-k400": (5e-5, 15),
}
SHUFFLE = "--eval-shuffle-frames"
SIZES = {"t": "tiny", "s": "small", "m": "middle"}


def of_video(name: str, tmp_path: Path):
    """The flags of a recipe for 8 GPUs."""
    launcher, args = recipe(f"video/{name}", tmp_path, GPUS="8")
    assert "--nproc_per_node=8" in launcher
    return args


@pytest.mark.parametrize("name", [*DENSE, *DYVM])
def test_recipe_is_the_published_one(name, tmp_path):
    args = of_video(name, tmp_path)
    *_, size, data_set = name.split("-")
    assert task_of(args.data_set) == "video" and args.data_set == data_set.upper()
    assert args.model.removeprefix("dyvm_") == f"videomamba_{SIZES[size]}"
    assert 8 * args.batch_size * args.accum_steps * args.num_sample == 1024, "clips of a step"
    assert (args.num_frames, args.tubelet_size, args.input_size) == (8, 1, 224)
    assert (args.amp, args.model_ema, args.opt, args.opt_betas) == (
        "bf16", False, "adamw", [0.9, 0.999],
    )  # fmt: skip
    assert (args.mixup, args.cutmix, args.smoothing, args.reprob) == (0.8, 1.0, 0.1, 0.25)
    assert args.sched_on_updates and (args.sched, args.warmup_epochs) == ("cosine", 5)
    assert not args.unscale_lr and args.clip_grad is None and args.layer_decay is None
    sided = data_set == "ssv2"
    assert (args.hflip, args.frame_sampling) == ((0, "parts") if sided else (0.5, "uniform"))
    assert (args.eval_segments, args.eval_crops) == (2 if sided else 4, 3)
    if name in DENSE:
        lr, epochs, drop_path, decay, policy = DENSE[name]
        assert args.method == "dense" and (args.lr, args.epochs) == (lr, epochs)
        assert (args.drop_path, args.weight_decay, args.aa) == (drop_path, decay, policy)
        assert args.min_lr == args.warmup_lr == pytest.approx(1e-6 * 1024 / 256)
    else:
        assert args.method == "dyvm" and (args.lr, args.epochs) == DYVM[name]
        assert (args.drop_path, args.weight_decay) == (0, 1e-8)
        assert (args.token_keep_ratio, args.block_keep_ratio) == (0.7, 0.8)
        assert (args.token_pruning_weight, args.block_pruning_weight) == (10, 10)
    assert args.grad_checkpointing == (size == "m")


def test_missing_variables_are_named():
    done = run("scripts/video/videomamba-t-k400.sh")
    assert done.returncode == 2 and "MODEL_PATH is not set" in done.stderr
    assert "bash scripts/video/videomamba-t-k400.sh" in done.stderr


def test_the_demo(python, tmp_path):
    """What it runs: the same evaluation in order and shuffled."""
    output, clips = tmp_path / "demo", tmp_path / "clips"
    result = run("scripts/video/demo.sh", PYTHON=python, OUTPUT=output, CLIPS=clips)
    assert result.returncode == 0, result.stderr
    calls = [shlex.split(line)[:-1] for line in (tmp_path / "calls.log").read_text().splitlines()]
    programs = [Path(call[0]).name for call in calls]
    assert programs == ["clips.py", *["main.py"] * 4, "report.py"]
    assert calls[0][1:3] == ["--output", str(clips)]
    assert [SHUFFLE in call for call in calls] == [False] * 4 + [True, False]
    assert calls[-1][1:] == [str(output / "dyvm")]
    # The flags of an evaluation are those of the checkpoint's task, and here there is none.
    calls[4] = [word for word in calls[4] if word != SHUFFLE]
    dense, student, evaluated, shuffled = (options.parse(call[1:]) for call in calls[1:5])
    assert (dense.method, student.method) == ("dense", "dyvm")
    assert dense.hflip == student.hflip == 0, "a flip changes the direction"
    best = str(output / "dense" / "best_checkpoint.pth")
    assert student.model_path == evaluated.dense_path == shuffled.dense_path == best
    assert evaluated.model_path == shuffled.model_path
    assert evaluated.output_dir != shuffled.output_dir
