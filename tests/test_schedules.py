"""Keep ratios that a training learns, noise that it anneals, and when it gives up."""

import itertools
import json
import math

import pytest
import torch
from helpers.flags import tiny
from helpers.processes import launch
from helpers.reductions import build

import main
import options
import predict
from evaluation import outcomes
from evaluation.inference import build_parser, load_predictor
from evaluation.outcomes import PlannedRun
from models.build import recorded_arguments
from models.flops import count_flops
from models.sampling import binary_gate, keep_decision
from schedules import KeepSchedule, fraction_of, noise_factor
from tasks import Experiment
from utils import preemption
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.distributed import Distributed
from utils.errors import UsageError

SMALL = tiny("--throughput-seconds", "0", epochs=2)
STAGES = ["--pruning-layers", "1", "2", "3"]
LEARNED = [*STAGES, "--method", "token", "--token-strategy", "distilled"]
LEARNED += ["--token-keep-ratio", "0.6", "--keep-schedule", "learned"]


def learn(worth, reduction="static", keep=(0.6, 0.3), steps=200):
    """What a schedule learns if the loss is the sum over stages of `worth` / tokens left."""
    kwargs = dict(reduction="mtr") if reduction == "mtr" else dict(token_strategy=reduction)
    model = build(route_blocks=False, img_size=80, token_keep=keep, **kwargs).eval()
    schedule = KeepSchedule(model, steps)
    calls = []

    def loss():
        calls.append(model.kept_counts())
        counts = torch.tensor([float(count) for count in model.kept_counts()])
        return (torch.tensor(worth) / counts).sum()

    for step in range(steps):
        if schedule.is_due(step):
            kept = schedule.learn(loss)
            assert kept == list(model.token_keep)
    assert schedule.is_done and len(calls) == 4 * schedule.trials
    return model, schedule


@pytest.mark.parametrize("reduction", ["static", "learned", "mtr"])
def test_tokens_go_where_they_are_worth_most_at_equal_operations(reduction):
    """Loss w1 / k1 + w2 / k2, both stages of two layers: at the best schedule k1 / k2 = sqrt(w1 /
    w2).
    """
    for worth, best in (((1.0, 1.0), 1.0), ((1.0, 0.25), 2.0), ((1.0, 0.05), math.sqrt(20))):
        model, schedule = learn(worth, reduction)
        first, second = model.kept_counts()
        assert first / second == pytest.approx(best, rel=0.15), (first, second)
        exact = count_flops(model).exact
        a_token = schedule.budget - count_flops(build_like(model, first, second - 1)).exact
        assert schedule.budget - a_token - 1 <= exact <= schedule.budget


def build_like(model, *counts):
    model.set_token_keep([(count + 0.5) / 100 for count in counts])
    return model


def test_a_schedule_goes_on_as_it_was():
    whole = learn((1.0, 0.1))[1]
    model = build(route_blocks=False, img_size=80, token_keep=(0.6, 0.3), token_strategy="static")
    first, second = KeepSchedule(model, 200), None

    def loss():
        return sum(w / k for w, k in zip((1.0, 0.1), model.kept_counts(), strict=True)) * one

    one = torch.ones(())
    for step in range(200):
        if step == 70:
            second = KeepSchedule(model, 200)
            second.budget = first.budget
            second.load_state_dict(first.state_dict())
        schedule = second or first
        if schedule.is_due(step):
            schedule.learn(loss)
    assert second.is_done and torch.allclose(second.logs, whole.logs, atol=1e-6)


def test_a_loss_that_is_no_number_teaches_nothing():
    model = build(route_blocks=False, token_strategy="static")
    schedule = KeepSchedule(model, 100)
    before = schedule.logs.clone()
    schedule.learn(lambda: torch.tensor(torch.nan))
    assert torch.equal(schedule.logs, before) and schedule.done == 1


def test_what_cannot_be_learned_is_told():
    one = build(route_blocks=False, pruning_layers=(2,), token_keep=(0.5,))
    with pytest.raises(UsageError, match="among stages, of which there is 1; give --pruning-l"):
        KeepSchedule(one, 100)
    with pytest.raises(UsageError, match="1 steps are too few"):
        KeepSchedule(build(route_blocks=False), 1)


def test_fractions_keep_the_counts_that_they_are_for():
    for patches in (16, 49, 100, 196, 1568, 10_000):
        for count in range(1, patches + 1, max(1, patches // 300)):
            keep = fraction_of(count, patches)
            assert int(keep * patches) == count and keep <= 1


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    output = tmp_path_factory.mktemp("dense")
    assert main.main([*SMALL, "--output_dir", str(output)]) == 0
    return output / "best_checkpoint.pth"


def train(output, dense, *flags, code=0):
    arguments = ["--model-path", dense, "--output_dir", output, *flags]
    assert main.main([*SMALL, *map(str, arguments)]) == code
    return output / "best_checkpoint.pth"


def read(folder):
    return json.loads((folder / "eval.json").read_text())


@pytest.fixture(scope="module")
def learned(dense, tmp_path_factory):
    return train(tmp_path_factory.mktemp("learned"), dense, *LEARNED, "--epochs", "5")


def test_the_checkpoint_records_what_was_learned(learned, dense, tmp_path, capsys):
    saved = load_checkpoint(learned)
    newest = load_checkpoint(learned.parent / "checkpoint.pth")
    assert len(saved["stage_keep"]) == 3 and saved["args"]["stage_keep"] is None
    assert newest["stage_keep"] != [0.6, 0.36, 0.216], "something was learned"
    report = read(learned.parent)
    assert report["dynamic"]["keep"] == pytest.approx(saved["stage_keep"], abs=1e-6)
    capsys.readouterr()

    def evaluate(*flags):
        words = ["--eval", "--model-path", learned, "--output_dir", tmp_path, "--device", "cpu"]
        assert main.main([*map(str, words), "--throughput-seconds", "0", *flags]) == 0
        return read(tmp_path)

    again = evaluate()
    assert again["dynamic"]["top1"] == report["dynamic"]["top1"]
    assert again["dynamic"]["flops"] == report["dynamic"]["flops"]
    assert evaluate("--token-keep-ratio", "0.5")["dynamic"]["keep"] == [8 / 16, 4 / 16, 2 / 16]
    assert evaluate("--stage-keep", "1", "0.5", "0.25")["dynamic"]["keep"] == [1, 0.5, 0.25]
    main.main(
        ["--eval", "--model-path", str(learned), "--output_dir", str(tmp_path), "--sweep", "0.6"]
    )
    point = json.loads((tmp_path / "sweep.json").read_text())["points"][0]
    assert not point["trained"] and point["keep"] == [9 / 16, 5 / 16, 3 / 16]
    assert "is not among these budgets" in "".join(capsys.readouterr())

    picture = str(tmp_path / "decisions" / "sample1.png")
    predict.main(["--model-path", str(learned), "--device", "cpu", picture])
    assert "sample1.png" in capsys.readouterr().out


def test_an_interrupted_run_learns_the_same(learned, dense, tmp_path, monkeypatch):
    flags = [*LEARNED, "--epochs", "5"]
    for leave in (5, 9):
        with monkeypatch.context() as patch:
            answers = itertools.chain([False] * leave, [True], itertools.repeat(False))
            patch.setattr(preemption, "requested", answers.__next__)
            patch.setattr(preemption, "received", lambda: "SIGTERM")
            train(tmp_path, dense, *flags, "--resume", "auto", code=preemption.EXIT_CODE)
    train(tmp_path, dense, *flags, "--resume", "auto")
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        one, other = load_checkpoint(tmp_path / name), load_checkpoint(learned.parent / name)
        assert one["stage_keep"] == other["stage_keep"]
        for part in ("model", "ema"):
            assert all(torch.equal(one[part][key], value) for key, value in other[part].items())
    assert (tmp_path / "log.txt").read_text() == (learned.parent / "log.txt").read_text()


def test_two_processes_learn_one_schedule(dense, tmp_path):
    """Of a selector that decides freely, whose budget term follows."""
    flags = [*SMALL, *STAGES, "--method", "dyvm", "--keep-schedule", "learned"]
    flags += ["--model-path", str(dense), "--output_dir", str(tmp_path), "--epochs", "4"]
    script = (
        "import sys, torch, main, training\n"
        "def keep(self, value):\n"
        "    before(self, value)\n"
        "    assert list(self.objective.budgets.token_keep) == list(value)\n"
        "    print('kept', *value, flush=True)\n"
        "before = training.Training.set_token_keep\n"
        "training.Training.set_token_keep = keep\n"
        "main.main(sys.argv[1:])\n"
    )
    kept = [
        [line for line in output.splitlines() if line.startswith("kept")]
        for output in launch(2, ["-c", script, *flags])
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 3 and "kept 0.7 " not in kept[0][0]


def test_noise_falls_and_ends(dense, tmp_path, monkeypatch):
    assert noise_factor(0, 0.2) == 1 and noise_factor(0.5, 0) == 0.5 and noise_factor(1, 0) == 0
    scores = torch.randn(4, 100, 2).log_softmax(-1)
    assert torch.equal(
        keep_decision(scores, "x", torch.zeros(())), (scores[..., 0] >= scores[..., 1]).float()
    )
    assert torch.equal(binary_gate(scores, "x", torch.zeros(())), (scores > 0).float())
    seed = torch.get_rng_state()
    one = keep_decision(scores, "x")
    torch.set_rng_state(seed)
    assert torch.equal(keep_decision(scores, "x", torch.ones(())), one), "the paper's"

    factors = []
    set_noise = main.VisionMamba.set_noise

    def spy(model, factor):
        set_noise(model, factor)
        assert model.layers[0].mixer.noise.item() == pytest.approx(factor)
        factors.append(factor)

    monkeypatch.setattr(main.VisionMamba, "set_noise", spy)
    train(tmp_path, dense, *STAGES, "--method", "dyvm", "--final-noise", "0.5")
    assert factors == pytest.approx([1 - 0.5 * step / 7 for step in range(8)])


def test_patience(dense, tmp_path, monkeypatch, capsys):
    values = iter([10.0, 30.0, 20.0, 29.0, 40.0])
    validate = main.validate

    def poorer(model, experiment, *args, quick=False, **kwargs):
        measured = validate(model, experiment, *args, quick=quick, **kwargs)
        return measured | ({"top1": next(values)} if quick else {})

    monkeypatch.setattr(main, "validate", poorer)
    flags = ["--method", "dense", "--no-model-ema", "--patience", "2"]
    train(tmp_path, dense, *flags, "--epochs", "9")
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["best_epoch"] for line in lines] == [0, 1, 1, 1]
    assert "--patience 2: no epoch since 2 was as good; the training ends after 4" in "".join(
        capsys.readouterr()
    )
    assert load_checkpoint(tmp_path / "best_checkpoint.pth")["best_epoch"] == 1
    # One that has given up stays so; more patience goes on.
    train(tmp_path, dense, *flags, "--epochs", "9", "--resume", "auto")
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4
    train(
        tmp_path, dense, *flags[:-1], "3", "--epochs", "5", "--resume", "auto", "--resume-override"
    )
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--keep-schedule", "learned", "--method", "block"], "--keep-schedule has no meaning"),
        (["--keep-schedule", "learned", "--pruning-layers", "2"], "of which there is 1"),
        (
            ["--keep-schedule", "learned", "--reduction", "merge", "--merge-tokens", "2"],
            "--keep-schedule has no meaning with --reduction merge, which merges as many",
        ),
        (["--stage-keep", "0.5", "0.6", "0.2"], "must not ascend"),
        (["--stage-keep", "0.5", "0.2"], "one fraction for each of the pruning layers [1, 2, 3]"),
        (
            ["--stage-keep", "0.5", "0.4", "0.2", "--token-keep-ratio", "0.5"],
            "--stage-keep and --token-keep-ratio both say what is left; give one",
        ),
        (
            ["--final-noise", "0", "--token-strategy", "static", "--method", "token"],
            "--final-noise has no meaning here: nothing is decided with noise",
        ),
        (["--patience", "0"], "'0' is no positive integer"),
        (["--keep-schedule", "other"], "invalid choice: 'other'"),
    ],
)
def test_flags_that_cannot_work(flags, words, dense, tmp_path):
    flags = flags if "--method" in flags else ["--method", "dyvm", *flags]
    stages = [] if "block" in flags else STAGES
    given = [*stages, "--model-path", str(dense), *flags]
    with pytest.raises(UsageError, match=words.replace("[", r"\[")):
        main.main([*SMALL, "--output_dir", str(tmp_path / "new"), *given])
    assert not (tmp_path / "new" / "checkpoint.pth").exists()


def test_its_speed_is_that_of_what_was_learned(learned, dense, monkeypatch):
    args = options.parse([*SMALL, *LEARNED, "--model-path", str(dense)])
    run = PlannedRun("learned", 0, learned.parent, [], args)
    timed = {}

    def speeds(models, *_):
        timed.update({name: model.kept_counts() for name, model in models.items()})
        return dict.fromkeys(models, 1.0), None

    monkeypatch.setattr(outcomes, "forward_speeds", speeds)
    alone = Distributed(torch.device("cpu"))
    experiment = Experiment.prepare(args, alone)
    record = learned.parent / "none.json"
    outcomes.measure_speeds([outcomes.Outcome.read(run)], str(dense), experiment, 1.0, record)
    kept = read(learned.parent)["dynamic"]["keep"]
    assert timed["learned"] == [round(16 * share) for share in kept]


def test_other_programs_show_what_was_learned_or_is_asked_for(learned, capsys):
    def kept(*flags):
        given = ["--model-path", str(learned), "--device", "cpu", *flags]
        return load_predictor(build_parser("predict.py", ""), given).model.kept_counts()

    own = [round(16 * share) for share in load_checkpoint(learned)["stage_keep"]]
    assert kept() == own
    assert kept("--token-keep-ratio", "0.5") == [8, 4, 2]
    assert kept("--stage-keep", "1", "0.5", "0.25") == [16, 8, 4]
    with pytest.raises(UsageError, match="the checkpoint's 3 stages have ratios of their own"):
        kept("--pruning-layers", "1", "2")


def test_a_sweep_leaves_the_schedule_to_what_is_written_beside_it(learned):
    checkpoint = load_checkpoint(learned)
    words = ["--eval", "--model-path", str(learned), "--sweep", "0.5"]
    assert (
        options.parse(words, recorded_arguments(checkpoint)).stage_keep
        == (checkpoint["stage_keep"])
    )


def test_a_learned_schedule_after_another_one(dense, tmp_path, capsys):
    """--resume-override from a run of fixed ratios, also one whose best epoch stays the best."""
    fixed = [flag for flag in LEARNED if flag not in ("--keep-schedule", "learned")]
    best = train(tmp_path, dense, *fixed, "--epochs", "1")
    content = load_checkpoint(best)
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        saved = load_checkpoint(tmp_path / name) | {"best": 101.0}
        save_checkpoint(saved, tmp_path / name)
    train(tmp_path, dense, *LEARNED, "--epochs", "4", "--resume", "auto", "--resume-override")
    assert load_checkpoint(tmp_path / "checkpoint.pth")["stage_keep"] is not None
    assert read(tmp_path)["dynamic"]["keep"] == [9 / 16, 5 / 16, 3 / 16], "of the best epoch"
    assert content["stage_keep"] is None and content["keep_schedule"] is None


def test_runs_of_earlier_versions_go_on(dense, tmp_path):
    """They do not record which epoch was the best."""
    flags = ["--method", "dense", "--patience", "1"]
    train(tmp_path, dense, *flags, "--epochs", "1")
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        saved = load_checkpoint(tmp_path / name) | {"best": 101.0}
        del saved["best_epoch"], saved["stage_keep"], saved["keep_schedule"]
        for flag in ("patience", "stage_keep", "keep_schedule", "final_noise"):
            del saved["args"][flag]
        save_checkpoint(saved, tmp_path / name)
    train(tmp_path, dense, *flags, "--epochs", "4", "--resume", "auto", "--resume-override")
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["best_epoch"] for line in lines] == [0, 0], "one more, and none is as good"


def test_a_method_without_stages_learns_no_schedule(dense, tmp_path):
    """The last --method counts, as in recipes and ablations."""
    flags = ["--method", "dyvm", *STAGES, "--keep-schedule", "learned", "--method", "block"]
    train(tmp_path, dense, *flags, "--epochs", "1")
    assert load_checkpoint(tmp_path / "checkpoint.pth")["stage_keep"] is None
