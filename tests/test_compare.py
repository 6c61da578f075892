"""The comparison: plans, real small runs and their tables, and what it says to bad input."""

import csv
import json
import shlex
import shutil
from dataclasses import replace

import pytest
from helpers.budgets import STAGE, TRAINING, static
from helpers.data import save_garments

import compare
import main
import options
from evaluation import runs, summary
from evaluation.budgets import Cell, Method, budgets
from tasks import Experiment
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.distributed import init_distributed
from utils.errors import UsageError, UserError
from utils.files import write_json
from utils.run_folder import locked


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


OWN = """--methods distilled --training-free merge --keep 0.8 0.3 --seeds 7 --jobs 2
    --smaller embed_dim=8""".split()


@pytest.fixture(scope="module")
def done(flags, teacher, tmp_path_factory):
    """Output folder of one trained method, one untrained one and a smaller model."""
    output = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert compare.main(words(output, teacher, [*flags, *STAGE], *OWN)) == 0
    return output


# Plans, without any training


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
    learning = ["--method", "a", "--token-strategy static --keep-schedule learned"]
    some = compare.plan(parsed("--methods", "static", *learning, "--training-free"))
    assert [method.name for method in some.methods] == ["static", "a", "static-untrained"]
    assert free == ["static-untrained", "merge-untrained"]
    alone = compare.plan(parsed("--methods", "--training-free", "norm"))
    assert [method.name for method in alone.methods] == ["norm-untrained"]
    with pytest.raises(
        UsageError, match="--training-free paper: its predictors have to be trained"
    ):
        compare.plan(parsed("--training-free", "paper"))


def test_seed_by_seed_and_once_without_training(teacher, flags, tmp_path):
    """Spread over the seeds is in tests/test_budgets.py, with known numbers."""
    args = compare.parse(words(tmp_path, teacher, [*flags, *STAGE], "--seeds", 3, 5))
    cells = [
        Cell(Method("norm", ("--token-strategy", "norm"), free), keep, knob, 1e6, 1e6)
        for free in (False, True)
        for keep, knob in ((0.5, ("--token-keep-ratio", "0.4")), (0.2, ("--token-keep-ratio", "1")))
    ]
    cells = [
        replace(cell, method=replace(cell.method, name=f"n{i}")) for i, cell in enumerate(cells)
    ]
    planned = compare.plan_runs(args, cells, 6, {"some": "condition"})
    assert list(map(str, planned)) == [
        *("n0/keep0.5/seed3", "n1/keep0.2/seed3", "n2/keep0.5/seed3", "n3/keep0.2/seed3"),
        *("n0/keep0.5/seed5", "n1/keep0.2/seed5"),
    ]
    for run in planned:
        untrained = run.variant[:2] in ("n2", "n3")
        assert ("--eval" in run.flags) is untrained is (run.conditions is not None)
        assert run.args.seed == run.seed and run.args.token_strategy == "norm"
        assert run.args.token_keep_ratio == (0.4 if "keep0.5" in run.variant else 1)
        assert run.checkpoint == (teacher if untrained else run.folder / "best_checkpoint.pth")


def test_smaller_models_of_some_seeds(teacher, flags, tmp_path):
    own = "--seeds", 3, 5, "--smaller", "embed_dim=8", "--smaller", "embed_dim=12"
    for more, seeds in (([], [3, 3, 5, 5]), (["--smaller-seeds", 1], [3, 3])):
        args = compare.parse(words(tmp_path, teacher, [*flags, *STAGE], *own, *more))
        student = compare.plan(args).shared
        experiment = Experiment.prepare(student, init_distributed("cpu"))
        planned = compare.plan_smaller(args, student, experiment).runs
        assert [run.seed for run in planned] == seeds


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
        own = report(done, f"{name}/keep{keep}/seed7")["dynamic"]
        assert own["flops"]["exact"] == row["flops"]
        assert row["deviation"] == pytest.approx(row["flops"] / of_static[keep] - 1)
        assert abs(row["deviation"]) < 0.02
    assert list(record["left_out"]) == ["merge-untrained/keep0.3"]


def test_the_table_is_what_the_runs_say(done):
    rows = {(row["method"], row["keep"]): row for row in rows_of(done / "compare.csv")}
    found = report(done, "distilled/keep0.3/seed7")["dynamic"]
    row = rows["distilled", "0.3"]
    assert float(row["top1_mean"]) == found["top1"] and row["top1_sd"] == ""
    assert row["runs"] == "1" and float(row["images_per_s"]) > 0
    assert float(row["kept_on_object_percent"]) == found["object"]["share"][-1]
    assert float(row["object_kept_percent"]) == found["object"]["mass"][-1]
    dense = rows["dense", ""]
    assert float(dense["top1_mean"]) == report(done, "distilled/keep0.3/seed7")["dense"]["top1"]
    of_runs = rows_of(done / "compare_runs.csv")
    assert [(each["run"], each["seed"]) for each in of_runs] == [
        ("distilled/keep0.8", "7"),
        ("distilled/keep0.3", "7"),
        ("merge-untrained/keep0.8", "7"),
        ("dense-embed_dim=8", "7"),
    ]
    [loss] = [float(each["loss"]) for each in of_runs if each["run"] == "merge-untrained/keep0.8"]
    assert loss == report(done, "merge-untrained/keep0.8/seed7")["dynamic"]["loss"]


def test_what_is_not_trained_has_the_teachers_weights(done, teacher):
    folder = done / "merge-untrained" / "keep0.8" / "seed7"
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
        "epochs from the dense teacher: 1; seeds: 7",
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


def test_what_failed_is_named(done, flags, teacher, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    shutil.copytree(done, output)
    failed = {"distilled/keep0.3/seed7": "error: no luck"}
    monkeypatch.setattr(compare, "train_missing", lambda *_: failed)
    assert compare.main(words(output, teacher, [*flags, *STAGE], *OWN)) == 1
    assert "missing: distilled/keep0.3/seed7: error: no luck" in capsys.readouterr().out
    text = (output / "compare.md").read_text()
    assert "* distilled/keep0.3/seed7: error: no luck" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["distilled", "0.3", *["-"] * 6, "0"] in rows


def test_an_evaluation_stands_under_its_own_conditions(done, tmp_path):
    folder = done / "merge-untrained" / "keep0.8" / "seed7"
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
        ("--method a '--stage-keep 0.5'", "", "method a: --stage-keep is set by"),
        (
            "--method a '--token-strategy static --keep-schedule learned' --training-free a",
            "",
            "--training-free a: its schedule has to be learned",
        ),
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
        ("--smaller-seeds 1", "", "--smaller-seeds is for --smaller"),
        ("--seeds 1 --smaller depth=2 --smaller-seeds 2", "", "are more than the 1 of --seeds"),
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
    learned = "--method", "a", "--token-strategy static --keep-schedule learned"
    refused("method a/keep0.7: --keep-schedule learned .* there is 1", *only, *learned)
    other = ["--model-kwargs", "patch_size=8", "depth=6"]
    refused("method static/keep0.7: .* does not fit", *only, common=other, kind=UserError)
    refused("--keep 0.01 leaves none of the 49 patches", *only, "--keep", 0.01)
    refused(
        "nothing is left to compare: pairs cannot reach it", "--methods", "merge", "--keep", 0.1
    )
    large = ["--model-kwargs", "patch_size=28", "depth=6", "embed_dim=16", "d_state=4"]
    stages = "--reduction merge --pruning-layers 1 2 3 4"
    refused(
        "method m: .*merge_tokens 1 at each of 4 stages are more than the 4 patches",
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
