"""The comparison: knobs that meet a budget, smaller dense models, real small runs and their tables,
and what it says to bad input.
"""

import csv
import json
import shlex
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.data import save_garments

import compare
import main
import options
from drawing.comparison import comparison
from evaluation import comparison_table, runs, smaller, summary
from evaluation.budgets import Cell, Method, Priced, budgets, nearest_pairs, nearest_ratio, solve
from models.build import ModelSpec, build_model
from tasks import task_named
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UsageError, UserError
from utils.files import write_json
from utils.run_folder import locked

TRAINING = """--model vim_micro --input-size 56 --model-kwargs patch_size=8 depth=6 embed_dim=16
    d_state=4 --batch-size 10 --epochs 1 --warmup-epochs 0 --lr 1e-2 --unscale-lr --aa none
    --no-repeated-aug --mixup 0 --cutmix 0 --num-workers 0 --no-model-ema --device cpu""".split()
STAGE = ["--pruning-layers", "2"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    fashion = save_garments(tmp_path_factory.mktemp("fashion"))
    return ["--data-set", "CLUTTER", "--data-path", str(fashion), *TRAINING]


@pytest.fixture(scope="module")
def teacher(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("dense")
    assert main.main([*flags, "--output_dir", str(output), "--throughput-seconds", "0"]) == 0
    return output / "best_checkpoint.pth"


def words(output, teacher, common, *own):
    return [
        *("--dense-path", str(teacher), "--output_dir", str(output)),
        *("--throughput-seconds", "0.01", *map(str, own), "--", *common),
    ]


OWN = """--methods distilled --training-free merge --keep 0.8 0.3 --seeds 0 7 --jobs 2
    --smaller embed_dim=8""".split()


@pytest.fixture(scope="module")
def done(flags, teacher, tmp_path_factory):
    """Output folder of one trained method and one untrained one, two seeds, a smaller model."""
    output = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert compare.main(words(output, teacher, [*flags, *STAGE], *OWN)) == 0
    return output


# Budgets, without any training


def build(spec):
    return build_model(spec, 10)


def spec(*more):
    given = ["--method", "token", *TRAINING, *STAGE, "--model-path", "x", *more]
    return ModelSpec.from_args(options.parse(given))


def static(*more):
    return Priced(spec("--token-strategy", "static", *more), build)


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


def parsed(*own, common=(*TRAINING, *STAGE)):
    return compare.parse(words("out", "dense.pth", common, *own))


def test_each_method_has_its_flags():
    args = parsed("--methods", *compare.METHODS, "--keep", 0.5, "--method", "own", "--lr 1")
    plan = compare.plan(args)
    assert [method.name for method in plan.methods] == [*compare.METHODS, "own"]
    of = {method.name: given for method, given in plan.methods.items()}
    assert all(given.method == "token" for given in of.values())
    chosen = {name: (of[name].token_strategy, of[name].reduction) for name in of}
    assert chosen["paper"] == ("learned", "prune") == chosen["inplace"]
    assert chosen["distilled+merge"] == ("distilled", "prune+merge")
    assert of["own"].lr == 1
    in_place = {name for name in of if of[name].selector_gradient == "inplace"}
    assert in_place == {"inplace", "distilled+inplace"}


def test_pairs_are_merged_before_every_second_layer():
    args = parsed("--method", "early", "--reduction merge --pruning-layers 1")
    knob = "--merge-tokens", "3"
    layers = {}
    for method in (
        Method("merge", ("--reduction", "merge")),
        Method("early", tuple(args.flags_of["early"])),
    ):
        given = compare.words_of(args, method, knob, depth=6)
        layers[method.name] = options.parse([*given, "--model-path", "x"]).pruning_layers
    assert layers == {"merge": [2, 4], "early": [1]}
    with pytest.raises(UsageError, match="method merge: .* every second layer .* a model of 2"):
        compare.words_of(args, Method("merge", ("--reduction", "merge")), knob, depth=2)


def test_what_can_be_had_without_training():
    plan = compare.plan(parsed("--methods", "static", "paper", "merge", "--training-free"))
    free = [method.name for method in plan.methods if method.training_free]
    assert free == ["static-untrained", "merge-untrained"]
    alone = compare.plan(parsed("--methods", "--training-free", "norm"))
    assert [method.name for method in alone.methods] == ["norm-untrained"]
    with pytest.raises(
        UsageError, match="--training-free paper: its predictors have to be trained"
    ):
        compare.plan(parsed("--training-free", "paper"))


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
    assert "not recorded" in smaller.training_of(5, 8, None, 12, {})


# Tables and plots of numbers that are known

MEASURE = task_named("classification").best


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
    text = comparison_table.table(rows, MEASURE, "github")
    cells = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert cells == [
        ["dense", "", "90.00", "2.00", "", "100.0", "", "", ""],
        ["dense-depth=2", "", "60.00", "0.50", "", "300.0", "", "", "1"],
        ["a", "0.5", "82.00 ± 2.83", "1.00", "+0.0 %", "150.0", "40.0 %", "70.0 %", "2"],
        ["b", "0.5", "-", "-", "-", "-", "-", "-", "0"],
        ["a", "0.2", "70.00", "1.03", "+3.0 % (!)", "200.0", "40.0 %", "70.0 %", "1"],
    ]
    without = [row | {"object_share": None} for row in rows]
    assert "object" not in comparison_table.table(without, MEASURE, "simple")


def test_at_equal_speed(rows):
    def method(name, keep, speed, top1):
        return rows[2] | {"name": name, "keep": keep, "images_per_s": speed, "top1": top1}

    static = [method("static", 0.5, 160.0, 80.0), method("static", 0.2, 190.0, 70.0)]
    slow = [method("slow", 0.5, 120.0, 90.0), method("slow", 0.2, 170.0, 80.0)]
    text = comparison_table.equal_speed_table([*rows[:2], *static, *slow], MEASURE)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[0] == ["method", "at 160.0 images/s (keep 0.5)", "at 190.0 images/s (keep 0.2)"]
    assert lines[2:] == [["static", "80.00", "70.00"], ["slow", "82.00", "-"]]
    assert comparison_table.equal_speed_table(rows, MEASURE) == "", "without static no speeds"


@pytest.mark.parametrize(
    "axis, front", [("flops", [0.5, 1, 2]), ("images_per_s", [100, 150, 200, 300])]
)
def test_a_plot_of_known_numbers(rows, axis, front):
    [axes] = comparison(rows, axis, MEASURE).axes
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
    assert (
        comparison([row | {"images_per_s": None} for row in rows], "images_per_s", MEASURE) is None
    )


# Real runs


def report(done, run):
    return json.loads((done / run / "eval.json").read_text())


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def modified(output):
    return {path: path.stat().st_mtime_ns for path in output.glob("*/**/*") if path.is_file()}


def test_operations_are_those_that_were_planned(done):
    record = json.loads((done / "compare.json").read_text())
    rows = {(row["name"], row["keep"]): row for row in record["rows"]}
    assert list(rows) == [
        ("dense", None),
        ("dense-embed_dim=8", None),
        ("distilled", 0.8),
        ("merge-untrained", 0.8),
        ("distilled", 0.3),
    ]
    of_static = budgets(static(), [0.8, 0.3])
    for (name, keep), row in rows.items():
        if keep is None:
            continue
        for seed in (0, 7) if name == "distilled" else (0,):
            own = report(done, f"{name}/keep{keep}/seed{seed}")["dynamic"]
            assert own["flops"]["exact"] == row["flops"]
        assert row["deviation"] == pytest.approx(row["flops"] / of_static[keep] - 1)
        assert abs(row["deviation"]) < 0.02
    assert list(record["left_out"]) == ["merge-untrained/keep0.3"]


def test_the_table_is_what_the_runs_say(done):
    rows = {(row["method"], row["keep"]): row for row in rows_of(done / "compare.csv")}
    found = [report(done, f"distilled/keep0.3/seed{seed}")["dynamic"] for seed in (0, 7)]
    row = rows["distilled", "0.3"]
    top1 = [values["top1"] for values in found]
    assert float(row["top1_mean"]) == pytest.approx(statistics.fmean(top1))
    assert float(row["top1_sd"]) == pytest.approx(statistics.stdev(top1))
    assert row["runs"] == "2" and float(row["images_per_s"]) > 0
    for column, part in (("kept_on_object_percent", "share"), ("object_kept_percent", "mass")):
        values = [each["object"][part][-1] for each in found]
        assert float(row[column]) == pytest.approx(statistics.fmean(values))
    dense = rows["dense", ""]
    assert float(dense["top1_mean"]) == report(done, "distilled/keep0.3/seed0")["dense"]["top1"]
    of_runs = rows_of(done / "compare_runs.csv")
    assert [(each["run"], each["seed"]) for each in of_runs] == [
        ("distilled/keep0.8", "0"),
        ("distilled/keep0.3", "0"),
        ("merge-untrained/keep0.8", "0"),
        ("distilled/keep0.8", "7"),
        ("distilled/keep0.3", "7"),
        ("dense-embed_dim=8", "0"),
        ("dense-embed_dim=8", "7"),
    ]
    [loss] = [float(each["loss"]) for each in of_runs if each["run"] == "merge-untrained/keep0.8"]
    assert loss == report(done, "merge-untrained/keep0.8/seed0")["dynamic"]["loss"]


def test_what_is_not_trained_has_the_teachers_weights(done, teacher):
    folder = done / "merge-untrained" / "keep0.8" / "seed0"
    assert not list(folder.glob("*.pth")) and not (folder / "log.txt").exists()
    own = json.loads((folder / "eval.json").read_text())
    assert own["checkpoint_sha256"] == runs.sha256_of(teacher)
    assert len(own["dynamic"]["keep"]) == 2, "before layers 2 and 4"


def test_a_smaller_model_is_trained_as_long_as_both(done, teacher):
    args = json.loads((done / "dense-embed_dim=8" / "seed7" / "args.json").read_text())
    of_teacher = load_checkpoint(teacher)["args"]
    same = ("lr", "unscale_lr", "batch_size", "repeated_aug", "aa", "data_path", "input_size")
    assert all(args[name] == of_teacher[name] for name in same)
    assert (args["method"], args["model_path"], args["epochs"]) == ("dense", None, 2)
    assert args["model_kwargs"] == of_teacher["model_kwargs"] | {"embed_dim": 8}
    told = "dense-embed_dim=8: from scratch, 2 epochs of 4 steps, 8 in all (teacher 4 + student 4"
    assert told in (done / "compare.md").read_text()


def test_the_document_tells_what_was_done(done):
    text = (done / "compare.md").read_text()
    for told in (
        "merge-untrained/keep0.3 is left out at this budget: pairs cannot reach it",
        "with the teacher's weights, not trained: merge-untrained",
        "epochs from the dense teacher: 1; seeds: 0, 7",
        "| distilled | `--token-strategy distilled` | 0.8: `--token-keep-ratio 0.",
        "0.8: `--merge-tokens ",
        "python compare.py --dense-path ",
        "on one batch of 10, cpu",
    ):
        assert told in text
    assert "Missing" not in text
    assert all(
        (done / name).stat().st_size > 5000 for name in ("compare_flops.png", "compare_speed.png")
    )


def test_the_same_command_again_runs_and_measures_nothing(done, flags, teacher, monkeypatch):
    before, table = modified(done), (done / "compare.md").read_text()
    monkeypatch.setattr(summary, "interleaved", lambda *args: pytest.fail("measured again"))
    monkeypatch.setattr(runs, "_start", lambda run, *_: pytest.fail(f"{run} started again"))
    again = words(done, teacher, [*flags, *STAGE], *OWN)
    assert compare.main(again) == 0
    assert modified(done) == before and (done / "compare.md").read_text() == table
    with locked(done), pytest.raises(UserError, match="in use by another compare.py, or by train"):
        compare.main(again)


def test_an_evaluation_stands_under_its_own_conditions(done, tmp_path):
    folder = done / "merge-untrained" / "keep0.8" / "seed0"
    conditions = json.loads((folder / runs.CONDITIONS).read_text())
    assert {"teacher_sha256", "images_sha256", "amp", "model"} <= set(conditions)
    run = runs.PlannedRun("merge-untrained", 0, folder, [], None, conditions)
    assert runs.is_complete(run, "", {})
    assert not runs.is_complete(replace(run, conditions=conditions | {"amp": "bf16"}), "", {})
    assert not runs.is_complete(replace(run, folder=tmp_path), "", {})
    write_json(tmp_path / runs.CONDITIONS, conditions)
    assert not runs.is_complete(replace(run, folder=tmp_path), "", {}), "it was interrupted"


# Bad input


@pytest.mark.parametrize(
    "own, common, told",
    [
        ("--methods static nonsense", "", "--methods: nonsense is not built in; known are static"),
        ("--training-free nonsense", "", "--training-free: nonsense is not built in"),
        ("--methods static static", "", "--methods: static is given twice"),
        ("--method a '' --method a ''", "", "--method: a is given twice"),
        ("--method paper '--lr 1'", "", "--method 'paper' is built in"),
        ("--method ../x '--lr 1'", "", "'../x'"),
        ('--method a "--lr \'1"', "", "cannot be split into words"),
        ("--method a '--lr x'", "", "method a: argument --lr"),
        ("--method a '--seed 1'", "", "method a: --seed is set by compare.py; use --seeds"),
        ("--method a '--token-keep-ratio 0.5'", "", "method a: --token-keep-ratio is set"),
        ("--method a '--merge-tokens 900'", "", "method a: --merge-tokens is set by"),
        ("--method a '--method dyvm'", "", "method a: --method is set by compare.py"),
        ("--method a '--data-set CIFAR10'", "", "method a: --data-set must be the same for all"),
        ("--method static-untrained '' --training-free static", "", "is given twice"),
        ("--methods", "", "nothing to compare: give --methods"),
        ("--keep 0", "", "argument --keep: 0 is outside (0, 1]"),
        ("--keep 1.5", "", "argument --keep: 1.5 is outside (0, 1]"),
        ("--keep 0.5 0.50", "", "--keep: 0.5 is given twice"),
        ("--seeds 1 1", "", "--seeds: 1 is given twice"),
        ("--smaller embed_dim", "", "--smaller 'embed_dim': 'embed_dim' is not NAME=VALUE"),
        ("--smaller ''", "", "--smaller '': give changes of --model-kwargs"),
        ("--smaller depth=2 --smaller depth=2", "", "--smaller: dense-depth=2 is given twice"),
        ("--smaller-flags '--lr 1'", "", "--smaller-flags is for --smaller"),
        ("--smaller depth=2 --smaller-flags '--model x'", "", "--model is set by compare.py"),
        ("", "--token-strategy norm", "after --: --token-strategy is set by compare.py"),
        ("", "--reduction=mtr", 'after --: --reduction is set by compare.py; use --method NAME "'),
        (
            "",
            "--token-keep-ratio 0.5",
            "after --: --token-keep-ratio is set by compare.py; use --k",
        ),
        ("", "--output_dir=x", "after --: --output_dir is set by compare.py"),
        ("", "--epochs no", "after --: argument --epochs"),
        ("--methods norm", "--importance-every 2", "after --: --importance-every has no meaning"),
    ],
)
def test_mistakes_in_the_command(own, common, told):
    own = shlex.split(own)
    own = ["--methods", "static", *own] if "--methods" not in own else own
    with pytest.raises(UsageError) as error:
        compare.plan(parsed(*own, common=[*TRAINING, *STAGE, *common.split()]))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_mistakes_that_the_files_show(flags, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_start", lambda run, *_: pytest.fail(f"{run} was started"))

    def refused(match, *own, dense=teacher, common=(), kind=UsageError):
        with pytest.raises(UserError, match=match) as error:
            compare.main(words(tmp_path / "out", dense, [*flags, *STAGE, *common], *own))
        assert type(error.value) is kind and "\n" not in str(error.value)
        assert not (tmp_path / "out").exists(), "refused before anything was written"

    only = "--methods", "static"
    refused("none.pth", *only, dense=tmp_path / "none.pth", kind=UserError)
    other = ["--model-kwargs", "patch_size=8", "depth=6"]
    refused("method static/keep0.7: .* does not fit", *only, common=other, kind=UserError)
    refused("--keep 0.01 leaves none of the 49 patches", *only, "--keep", 0.01)
    refused(
        "nothing is left to compare: pairs cannot reach it", "--methods", "merge", "--keep", 0.1
    )
    large = ["--model-kwargs", "patch_size=28", "depth=6", "embed_dim=16", "d_state=4"]
    stages = "--reduction merge --pruning-layers 1 2 3 4"
    refused(
        "method m: .*merge_tokens 1 before each of the layers .* more than the 4 patches",
        *("--methods", "--method", "m", stages, "--keep", 0.5),
        common=large,
    )
    refused("--smaller depth=9: its .* MFLOPs are not fewer", *only, "--smaller", "depth=9")
    cropped = load_checkpoint(teacher)
    cropped["args"]["eval_crop_ratio"] = 0.9
    save_checkpoint(cropped, tmp_path / "cropped.pth")
    refused(
        "method norm-untrained: --eval-crop-ratio is 0.9 in .* and 0.875 here; give it after --",
        *("--methods", "--training-free", "norm"),
        dense=tmp_path / "cropped.pth",
    )
    bare = load_checkpoint(teacher)
    save_checkpoint({"model": bare["model"]}, tmp_path / "bare.pth")
    refused(
        "bare.pth does not record how it was trained; give --smaller-flags",
        *(*only, "--smaller", "depth=2"),
        dense=tmp_path / "bare.pth",
    )
