"""Equal operations: knobs that meet a budget, smaller models, tables and plots of known numbers."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.budgets import STAGE, build, spec, static

import compare
import options
from drawing import trade_offs
from drawing.comparison import comparison
from evaluation import ablation_table, comparison_table, runs, smaller
from evaluation.budgets import Cell, Method, Priced, budgets, nearest_pairs, nearest_ratio, solve
from tasks import task_named
from utils.errors import UsageError


@pytest.mark.parametrize("stages", ["2", "1 3 4"])
@pytest.mark.parametrize("name", ["random", "paper", "mtr", "prune+merge", "distilled+merge"])
def test_no_ratio_is_nearer_to_the_budget(name, stages):
    """Against every number of tokens that one stage, or the first of several, can leave."""
    layers = ["--pruning-layers", *stages.split()]
    priced = Priced(spec(*compare.METHODS[name].split(), *layers), build)
    number = len(stages.split())
    for keep, budget in budgets(static(*layers), [0.8, 0.5]).items():
        ratio, exact = nearest_ratio(priced, keep, budget)
        assert priced.at_ratio(ratio) == exact
        ratios = {(n + 1e-6) / 49 for n in range(1, 49)}
        if number > 1:
            ratios = {ratio ** (1 / stage) for ratio in ratios for stage in range(1, number + 1)}
        others = [r for r in ratios if int(r**number * 49)]
        nearest = min(abs(priced.at_ratio(r) - budget) for r in others)
        assert abs(exact - budget) <= nearest + 1e-6
        if name == "random":
            assert (ratio, exact) == (keep, budget), "what costs the same keeps the same"
        elif name == "paper":
            assert ratio < keep, "its predictor is paid for with tokens"


def test_a_patch_is_left():
    """Of five stages that keep 0.2 each, nothing is."""
    layers = ["--pruning-layers", "1", "2", "3", "4", "5"]
    priced = Priced(spec("--token-strategy", "norm", *layers), build)
    ratio, _ = nearest_ratio(priced, 0.2, 0.0)
    priced.at_ratio(ratio)
    assert priced.model.kept_counts()[-1] == 1
    priced.at_ratio(ratio - 1e-4)
    assert priced.model.kept_counts()[-1] == 0


def test_as_many_pairs_as_meet_the_budget():
    layers = ["--pruning-layers", "2", "4"]
    priced = Priced(spec("--reduction", "merge", "--merge-tokens", "1", *layers), build)
    possible = {n: exact for n in range(1, 50) if (exact := priced.at_pairs(n)) is not None}
    assert list(possible) == list(range(1, 17)), "of 33 tokens 16 pairs can be merged"
    for keep, budget in budgets(static(), [0.9, 0.8, 0.3]).items():
        pairs, exact, most = nearest_pairs(priced, budget)
        assert abs(exact - budget) == min(abs(other - budget) for other in possible.values())
        assert possible[pairs] == exact and most is (keep == 0.3)


def test_cells_and_what_is_left_out():
    priced = Priced(spec("--reduction", "merge", "--merge-tokens", "1", *STAGE, "4"), build)
    wanted = budgets(static(), [0.8, 0.3])
    [cell], left_out = solve(Method("merge", ()), priced, wanted)
    assert (cell.name, cell.keep, cell.knob[0]) == ("merge/keep0.8", 0.8, "--merge-tokens")
    assert cell.budget == wanted[0.8] and cell.exact == priced.at_pairs(int(cell.knob[1]))
    assert cell.deviation == cell.exact / wanted[0.8] - 1 and abs(cell.deviation) < 0.02
    assert list(left_out) == ["merge/keep0.3"]
    assert (
        "pairs cannot reach it: merged before layers 2, 4, at most 16" in left_out["merge/keep0.3"]
    )
    assert replace(cell, exact=1.021 * cell.budget).is_off
    assert not replace(cell, exact=0.981 * cell.budget).is_off


def test_budgets_that_are_none():
    with pytest.raises(UsageError, match="--keep 0.01 leaves none of the 49 patches after 1 stage"):
        budgets(static(), [0.5, 0.01])
    with pytest.raises(UsageError, match=r"--keep 0.5 and 0.505 leave the same patches, \[24\]"):
        budgets(static(), [0.5, 0.505])


# Smaller dense models, without any training


def test_a_recipe_repeats_the_teachers_training():
    task = task_named("classification")
    parser = options.build_parser(task)
    parser.set_defaults(**task.defaults)
    teacher = options.parse(
        """--model vim_tiny --method dense --data-set FOLDER --data-path there --lr 0.02 --epochs 7
        --unscale-lr --no-repeated-aug --no-model-ema --clip-grad 1.5 --opt-betas 0.8 0.95
        --subset 0.25 --batch-size 48 --accum-steps 2 --warmup-epochs 3 --drop-path 0.1
        --aa none --mixup 0.4 --sched-on-updates --seed 5 --input-size 64 --amp bf16""".split()
    )
    student = options.parse(
        """--method token --model-path x --data-set FOLDER --data-path here --input-size 96x64
        --device cpu --num-workers 1""".split()
    )
    again = options.parse(
        ["--method", "dense", "--epochs", "9", *smaller.recipe(parser, vars(teacher), student)]
    )
    of_student = ("data_path", "input_size", "device", "num_workers", "amp")
    assert all(getattr(again, name) == getattr(student, name) for name in of_student)
    other = {name for name in vars(again) if getattr(again, name) != getattr(teacher, name)}
    assert other == {*of_student, "epochs", "model", "seed"}


def test_what_a_smaller_model_was_trained_for():
    teacher = {"args": {"epochs": 10, "accum_steps": 2}, "steps_per_epoch": 7}
    assert smaller.updates(teacher) == 30 and smaller.updates({"args": {}}) is None
    told = smaller.training_of(5, 8, 30, 12, teacher)
    assert told == "from scratch, 5 epochs of 8 steps, 40 in all (teacher 30 + student 12 = 42)"
    teacher["args"]["model_path"] = "official.pth"
    assert "started from is not counted" in smaller.training_of(5, 8, 30, 12, teacher)
    several = teacher | {"world_size": 4}
    assert smaller._whole_batch(several) == {"accum_steps": 8}, "one process joins four's batches"
    assert "not recorded" in smaller.training_of(5, 8, None, 12, {})


# Tables and plots of numbers that are known

TASK = task_named("classification")
MEASURE = TASK.best


def cell(name, keep, exact):
    return Cell(Method(name, ()), keep, ("--token-keep-ratio", str(keep)), exact, 1e6)


def outcome(name, seed, top1, flops=1e6, **more):
    values = {"top1": top1, "flops": {"exact": flops}, **more}
    dense = {"top1": 90.0, "flops": {"exact": 2e6}}
    return runs.Outcome(SimpleNamespace(variant=name, seed=seed), values, dense)


@pytest.fixture
def rows():
    cells = [cell("a", 0.5, 1e6), cell("a", 0.2, 1.03e6), cell("b", 0.5, 1e6)]
    of_object = {"object": {"share": [10.0, 40.0], "mass": [90.0, 70.0], "chance": 12.0}}
    outcomes = [
        outcome("dense-depth=2", 0, 60.0, 0.5e6),
        outcome("a/keep0.5", 0, 80.0, **of_object),
        outcome("a/keep0.5", 1, 84.0, **of_object),
        outcome("a/keep0.2", 0, 70.0, 1.03e6, **of_object),
    ]
    speeds = {"dense": 100.0, "a/keep0.5": 150.0, "a/keep0.2": 200.0, "dense-depth=2": 300.0}
    return comparison_table.summarise(
        cells, {"dense-depth=2": "long"}, outcomes, {"images_per_s": speeds}, MEASURE
    )


def test_a_table_of_known_numbers(rows):
    text = comparison_table.table(rows, TASK, "github")
    cells = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert cells == [
        ["dense", "", "90.00", "2.00", "", "100.0", "", "", ""],
        ["dense-depth=2", "", "60.00", "0.50", "", "300.0", "", "", "1"],
        ["a", "0.5", "82.00 ± 2.83", "1.00", "+0.0 %", "150.0", "40.0 %", "70.0 %", "2"],
        ["b", "0.5", "-", "-", "-", "-", "-", "-", "0"],
        ["a", "0.2", "70.00", "1.03", "+3.0 % (!)", "200.0", "40.0 %", "70.0 %", "1"],
    ]
    without = [row | {"object_share": None} for row in rows]
    assert "object" not in comparison_table.table(without, TASK, "simple")


def test_videos_are_no_images(rows, tmp_path):
    videos = copy.copy(TASK)
    videos.example = "video"
    conditions = {"batch_size": 2, "device": "cpu", "precision": "fp32", "seconds": 1.0}
    static = [rows[2] | {"name": "static"}, rows[2]]
    about = {"subset": 0.5, "seeds": [0], "epochs": 1, "data_set": "CLIPS", "model": "vim_micro"}
    about |= {"command": "x", "smaller": {}, "left_out": {}, "training_free": [], "methods": {}}
    kept = {"patches_kept": 0.5, "scans_kept": 0.5}
    for name, module, known, shown in (
        ("compare", comparison_table, about, [*rows[:2], *static]),
        ("ablation", ablation_table, about | {"variants": {}}, [row | kept for row in static]),
    ):
        for seconds in 0.0, 1.0:
            speeds = {"conditions": conditions | {"seconds": seconds}}
            module.write(shown, [], {}, known, speeds, videos, tmp_path)
            text = (tmp_path / f"{name}.md").read_text()
            assert "videos/s" in text and "0.5 of the training videos" in text
            assert "image" not in text, text
    for axis, label in ("images_per_s", "videos/s, measured"), ("flops", "MFLOPs per video, exact"):
        assert comparison(rows, axis, MEASURE, "video").axes[0].get_xlabel() == label
        drawn = trade_offs.variants(static, axis, MEASURE, "video")
        assert drawn.axes[0].get_xlabel() == label


def test_at_equal_speed(rows):
    def method(name, keep, speed, top1):
        return rows[2] | {"name": name, "keep": keep, "images_per_s": speed, "top1": top1}

    def cells(*more, smaller=("dense-depth=2",)):
        text = comparison_table.equal_speed_table([*rows[:2], *more], smaller, TASK)
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]

    static = [method("static", 0.5, 150.0, 80.0), method("static", 0.2, 200.0, 70.0)]
    slow = [method("slow", 0.5, 125.0, 84.0), method("slow", 0.2, 220.0, 81.0)]
    header, _, *lines = cells(*static, *slow)
    assert header[4:] == ["static (difference)", "smaller dense (difference)"]
    # Dense 90 at 100, 60 at 300.
    assert lines == [
        ["slow", "0.5", "125.0", "84.00", "85.00 (-1.00)", "86.25 (-2.25)"],
        ["slow", "0.2", "220.0", "81.00", "-", "72.00 (+9.00)"],
    ]
    assert cells(*slow)[0][4:] == ["smaller dense (difference)"]
    assert cells(*static, *slow, smaller=())[0][4:] == ["static (difference)"]
    assert cells(*slow, smaller=()) == [], "no line to compare with"
    untimed = [rows[0] | {"images_per_s": None}, *static, *slow]
    assert comparison_table.equal_speed_table(untimed, (), TASK) == ""


@pytest.mark.parametrize(
    "axis, front", [("flops", [0.5, 1, 2]), ("images_per_s", [100, 150, 200, 300])]
)
def test_a_plot_of_known_numbers(rows, axis, front):
    [axes] = comparison(rows, axis, MEASURE, "image").axes
    handles, names = axes.get_legend_handles_labels()
    of = dict(zip(names, handles, strict=True))
    assert set(of) == {"dense", "dense-depth=2", "a", "Pareto front"}, "b has no point"
    assert sorted(of["Pareto front"].get_xdata()) == front
    line, _, [bars] = of["a"].lines
    scale = 1e6 if axis == "flops" else 1
    points = sorted(
        (row[axis] / scale, row["top1"]) for row in rows if row["name"] == "a" and row["n"]
    )
    assert list(zip(*line.get_data(), strict=True)) == points
    heights = sorted(end[1] - start[1] for start, end in bars.get_segments())
    assert heights == pytest.approx([0, 2 * 2.8284271])
    untimed = [row | {"images_per_s": None} for row in rows]
    assert comparison(untimed, "images_per_s", MEASURE, "image") is None
