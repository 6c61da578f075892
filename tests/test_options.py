"""Flags: defaults, agreement of model and method, and one clear line for what cannot be."""

import pytest

import flag_rules
import options
from tasks import CLASSIFICATION
from utils.arguments import _at_home
from utils.errors import UsageError


def parse(line: str, recorded=None):
    return options.parse(line.split(), recorded)


def test_defaults_train_a_micro_model_on_digits():
    args = parse("")
    assert (args.model, args.method, args.data_set, args.amp) == (
        "vim_micro",
        "dense",
        "DIGITS",
        "off",
    )


@pytest.mark.parametrize(
    "line, model, method",
    [
        ("--model Vim-Small", "vim_small", "dense"),
        ("--model Vim-Small --method dyvm --model-path x", "dyvm_vim_small", "dyvm"),
        ("--model dyvm_vim_tiny --model-path x", "dyvm_vim_tiny", "dyvm"),
        ("--model MambaReg-Base --method block --model-path x", "dyvm_mambareg_base", "block"),
    ],
)
def test_model_and_method_agree(line, model, method):
    args = parse(line)
    assert (args.model, args.method) == (model, method)


def test_warm_up_fits_a_short_run():
    assert [parse(f"--epochs {epochs}").warmup_epochs for epochs in (1, 4, 30)] == [0, 2, 5]


def test_the_recorded_folder_belongs_to_the_recorded_data_set():
    recorded = {"data_set": "IMNET", "data_path": "imagenet"}
    assert parse("--eval --model-path x", recorded).data_path == "imagenet"
    assert parse("--eval --model-path x --data-set DIGITS", recorded).data_path is None


def test_recorded_choices_are_defaults_that_flags_override():
    recorded = {
        "data_set": "DIGITS",
        "model": "dyvm_vim_tiny",
        "method": "token",
        "token_keep_ratio": 0.9,
        "model_kwargs": [("depth", 4)],
    }
    args = parse("--eval --model-path x", recorded)
    assert (args.model, args.method, args.token_keep_ratio, args.model_kwargs) == (
        "dyvm_vim_tiny",
        "token",
        0.9,
        {"depth": 4},
    )
    assert parse("--eval --model-path x --token-keep-ratio 0.5", recorded).token_keep_ratio == 0.5


@pytest.mark.parametrize(
    "line, words",
    [
        ("--model resnet50", ["--model", "'resnet50'", "vim_small"]),
        ("--data-set", ["--data-set"]),
        ("--frobnicate 3", ["--frobnicate"]),
        ("--token-keep-ratio 0", ["--token-keep-ratio", "0", "(0, 1]"]),
        ("--token-keep-ratio 1.5", ["1.5", "(0, 1]"]),
        ("--block-keep-ratio nan", ["nan"]),
        ("--block-keep-ratio many", ["'many'"]),
        ("--epochs 0", ["--epochs", "'0'"]),
        ("--lr -1", ["--lr"]),
        ("--method sparse", ["--method", "sparse", "dyvm"]),
        ("--amp int8", ["--amp", "int8", "bf16"]),
        ("--model-kwargs depth", ["depth"]),
        ("--model-kwargs depth=x+", ["depth=x+", "NAME=VALUE"]),
        ("--method dense --model dyvm_vim_micro", ["dyvm_vim_micro", "vim_micro"]),
        ("--method dyvm", ["--model-path", "teacher"]),
        ("--eval", ["--model-path"]),
        ("--batch-size 3", ["3", "even", "--mixup 0"]),
        ("--batch-size 0", ["--batch-size", "0"]),
        ("--warmup-epochs 30", ["--warmup-epochs 30", "--epochs 30"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--seed 99999999999999999999", ["--seed", "too large"]),
        ("--num-workers -1", ["--num-workers", "'-1'"]),
        ("--opt adahessian", ["adahessian", "second derivatives"]),
        (
            "--model-path out/calibrated_checkpoint.pth --output_dir out",
            ["would be overwritten", "--output_dir"],
        ),
        ("--drop-path 1.5", ["--drop-path", "1.5"]),
        ("--opt-betas 2 3", ["--opt-betas", "2", "[0, 1"]),
        ("--layer-decay 0", ["--layer-decay", "(0, 1]"]),
        ("--smoothing 1.5", ["--smoothing", "1.5"]),
        ("--mixup-prob 3", ["--mixup-prob", "3"]),
        ("--opt *", ["--opt", "'*'", "adamw"]),
        (
            "--model-path out/best_checkpoint.pth --output_dir out",
            ["would be overwritten", "--output_dir"],
        ),
        ("--drop 0.1", ["--drop", "--drop-path"]),
        ("--scorer-input B", ["--scorer-input", "dense"]),
        (
            "--method dyvm --model-path x --token-strategy static --scorer-input B",
            ["--scorer-input B", "static"],
        ),
        ("--method block --model-path x --token-strategy static", ["--token-strategy", "block"]),
        (
            "--method dyvm --model-path x --token-strategy norm --reduction merge --merge-tokens 5",
            ["--token-strategy norm", "--reduction merge", "prune+merge"],
        ),
        (
            "--method dyvm --model-path x --scorer-input B --reduction mtr",
            ["--scorer-input B", "--reduction mtr", "learns no scores"],
        ),
        (
            "--method dyvm --model-path x --token-strategy static --selector-gradient inplace",
            ["--selector-gradient inplace", "--token-strategy static", "learns no scores"],
        ),
        ("--method dyvm --model-path x --reduction merge", ["--merge-tokens", "11", "vim_small"]),
        ("--method block --model-path x --merge-tokens 5", ["--merge-tokens", "--method block"]),
        ("--method dyvm --model-path x --merge-tokens 5", ["--merge-tokens", "--reduction prune"]),
        (
            "--method token --model-path x --reduction merge --merge-tokens 5 "
            "--token-keep-ratio 0.5",
            ["--token-keep-ratio", "--reduction merge", "--merge-tokens"],
        ),
        (
            "--method dyvm --model-path x --selector-weight 2",
            ["--selector-weight", "--token-strategy learned", "distilled"],
        ),
        (
            "--method dyvm --model-path x --importance-every 2 --token-strategy static",
            ["--importance-every", "--token-strategy static", "distilled"],
        ),
        ("--if_amp", ["--if_amp", "--amp bf16"]),
        ("--finetune x.pth", ["--finetune", "--model-path"]),
        ("--dist-eval", ["always distributed"]),
    ],
)
def test_what_cannot_be_is_told_in_one_line(line, words):
    with pytest.raises(UsageError) as error:
        parse(line)
    text = str(error.value)
    assert all(word in text for word in words), text
    assert "\n" not in text and error.value.exit_code == 2


def test_flags_without_effect_at_evaluation(caplog):
    line = "--eval --model-path x --method dyvm"
    with pytest.raises(UsageError, match="--overwrite has no meaning with --eval"):
        parse(f"{line} --overwrite", {})
    parse(f"{line} --calibrate --block-keep-ratio 0.3", {})
    assert caplog.messages == []
    parse(f"{line} --block-keep-ratio 0.3", {})
    assert "--block-keep-ratio 0.3 changes nothing here" in caplog.text
    assert "--calibrate finds the one for this share" in caplog.text


def test_a_tilde_is_the_home(monkeypatch):
    """No shell expands it after an equals sign."""
    monkeypatch.setenv("HOME", "/home/ada")
    args = parse("--data-set FOLDER --output_dir=~/run --data-path ~/data --model-path=~")
    assert (args.output_dir, args.data_path) == ("/home/ada/run", "/home/ada/data")
    assert args.model_path == "/home/ada"
    for word in ("~$office.docx", "--prefix=a/~/b", "x~/y", "~ada/x"):
        assert _at_home(word) == word


GIVEN = {
    "--gate-threshold": 0.5,
    "--reduction": "mtr",
    "--selector-gradient": "paper",
    "--keep-schedule": "fixed",
}  # where 1 is no value of the flag


@pytest.mark.parametrize(
    "method, flags",
    [
        (
            "dense",
            [
                "--token-keep-ratio",
                "--block-keep-ratio",
                "--token-pruning-weight",
                "--block-pruning-weight",
                "--distill-weight",
                "--pruning-layers",
                "--gate-threshold",
                "--reduction",
                "--selector-gradient",
                "--stage-keep",
                "--keep-schedule",
                "--final-noise",
            ],
        ),
        ("token", ["--block-keep-ratio", "--block-pruning-weight", "--gate-threshold"]),
        (
            "block",
            [
                "--token-keep-ratio",
                "--token-pruning-weight",
                "--pruning-layers",
                "--reduction",
                "--selector-gradient",
                "--stage-keep",
                "--keep-schedule",
            ],
        ),
        ("dyvm", []),
    ],
)
def test_flags_that_the_method_does_not_read_are_refused(method, flags):
    for flag in flag_rules.READ_BY:
        given = GIVEN.get(flag, 1)
        for value in (
            f"{flag} {given}",
            f"{flag}={given}",
        ):  # the default of some: what counts is that it was given
            line = f"--method {method} --model-path x {value}"
            if flag not in flags:
                parse(line)
                continue
            with pytest.raises(UsageError) as error:
                parse(line)
            assert str(error.value).startswith(
                f"{flag} has no meaning with --method {method}; leave it out, or "
            )
    parse(f"--method {method} --model-path x")


def test_another_reduction_at_evaluation():
    """What the checkpoint records of its own is left out."""
    recorded = {"data_set": "DIGITS", "model": "dyvm_vim_tiny", "method": "token"}
    recorded |= {"model_kwargs": [], "token_keep_ratio": 0.5, "token_strategy": "distilled"}
    args = parse("--eval --model-path x --reduction mtr", recorded)
    assert (args.reduction, args.token_strategy, args.token_keep_ratio) == ("mtr", "learned", 0.5)
    assert parse("--eval --model-path x", recorded).token_strategy == "distilled"
    recorded |= {"token_strategy": "learned", "reduction": "merge", "merge_tokens": 5}
    args = parse("--eval --model-path x --selector static --reduction prune+merge", recorded)
    assert (args.reduction, args.token_strategy, args.merge_tokens) == (
        "prune+merge", "static", None,
    )  # fmt: skip


def test_flags_that_the_default_method_does_not_read_are_refused():
    with pytest.raises(
        UsageError, match="--token-keep-ratio has no meaning with --method dense; .* dyvm or token$"
    ):
        parse("--token-keep-ratio 0.5")


def test_a_recipe_keeps_its_flags_when_its_method_is_changed():
    line = "--method dyvm --model-path x --token-keep-ratio 0.7 --block-keep-ratio 0.8"
    for method in ("token", "block", "dense"):
        assert parse(f"{line} --method {method}").method == method


def test_evaluation_takes_all_of_them():
    recorded = {"data_set": "DIGITS", "model": "vim_tiny", "method": "dense", "model_kwargs": []}
    for flag in flag_rules.READ_BY:
        parse(f"--eval --model-path x {flag} {GIVEN.get(flag, 1)}", recorded)


DYNAMIC = {"data_set": "DIGITS", "model": "dyvm_vim_tiny", "method": "dyvm", "model_kwargs": []}


def test_a_folder_needs_its_data_set():
    """The digits are the default: a folder beside them would not be read."""
    for line, recorded in (("", None), ("--eval --model-path x --model vim_tiny", {})):
        with pytest.raises(UsageError, match="--data-path photos without --data-set, .* FOLDER is"):
            parse(f"{line} --data-path photos", recorded)
    with pytest.raises(UsageError, match="--data-path has no meaning with --data-set DIGITS"):
        parse("--data-set DIGITS --data-path=photos")
    with pytest.raises(UsageError, match="--data-path has no meaning with --data-set DIGITS"):
        parse("--eval --model-path x --data-path photos", DYNAMIC)
    recorded = DYNAMIC | {"data_set": "FOLDER", "data_path": "old"}
    args = parse("--eval --model-path x --data-path photos", recorded)
    assert (args.data_set, args.data_path) == ("FOLDER", "photos")
    assert parse("--eval --model-path x --data-path photos").data_path == "photos"  # not yet known


@pytest.mark.parametrize(
    "line, recorded, words",
    [
        ("--dense-path x.pth", None, ["--dense-path", "--eval", "--model-path"]),
        ("--method dyvm --dense-path x.pth", None, ["--dense-path", "teacher", "--model-path"]),
        (
            "--eval --model-path x --dense-path y",
            DYNAMIC | {"model": "vim_tiny", "method": "dense"},
            ["--dense-path"],
        ),
        (
            "--data-set SEG_FOLDER --data-path x --whole-images",
            None,
            ["--whole-images", "--data-set SEG_FOLDER"],
        ),
        ("--train-split nope", None, ["--train-split", "--data-set DIGITS", "wds/"]),
        (
            "--data-set FOLDER --data-path x --val-split=test",
            None,
            ["--val-split", "--data-set FOLDER"],
        ),
        (
            "--eval --sweep 0.5 --model-path x",
            DYNAMIC | {"reduction": "merge", "merge_tokens": 5},
            ["--sweep", "--reduction merge"],
        ),
        ("--eval --model-path x --val-split test", DYNAMIC, ["--val-split", "--data-set DIGITS"]),
        (
            "--eval --model-path x --resume nowhere.pth",
            DYNAMIC,
            ["--resume", "--eval", "--model-path"],
        ),
        ("--resume-override", None, ["--resume-override", "--resume auto"]),
    ],
)
def test_flags_that_the_run_does_not_read_are_refused(line, recorded, words):
    with pytest.raises(UsageError) as error:
        parse(line, recorded)
    text = str(error.value)
    assert text.startswith(f"{words[0]} has no meaning ") and all(word in text for word in words), (
        text
    )
    assert "\n" not in text and "{" not in text and error.value.exit_code == 2


@pytest.mark.parametrize(
    "line, recorded",
    [
        ("--eval --model-path x --dense-path y", DYNAMIC),
        ("--data-set wds/birds --data-path x --train-split a --val-split b", None),
        (
            "--eval --model-path x --resume auto",
            DYNAMIC,
        ),  # as scripts/slurm.sh launches scripts/eval.sh
        ("--resume auto --resume-override", None),
        ("--resume x.pth --resume-override", None),
    ],
)
def test_flags_that_the_run_reads_are_taken(line, recorded):
    parse(line, recorded)


def test_every_flag_stands_in_a_named_group():
    groups = {group.title: group for group in options.build_parser(CLASSIFICATION)._action_groups}
    assert {
        "model",
        "method",
        "data",
        "augmentation",
        "mixup",
        "optimisation",
        "run",
    } <= groups.keys()
    assert [action.dest for action in groups["options"]._group_actions] == ["help"]


@pytest.mark.parametrize("text, size", [("224", 224), ("192x384", [192, 384])])
def test_image_sizes(text, size):
    assert parse(f"--input-size {text}").input_size == size


@pytest.mark.parametrize("text", ["0", "192x", "192x0", "1x2x3", "-4", "a"])
def test_wrong_image_sizes(text):
    with pytest.raises(UsageError, match="neither a positive integer nor HEIGHTxWIDTH"):
        parse(f"--input-size={text}")
