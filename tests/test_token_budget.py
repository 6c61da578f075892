"""`--token-budget image`: each image keeps as many tokens as its scores earn."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.exports import decided, segmenter
from helpers.reductions import build
from helpers.runs import evaluated
from helpers.seeing import DYNAMIC, SMALL, save_model

import export
import main
import options
from benchmarks.exported import decide
from drawing.pictures import GAP, decision_picture
from evaluation import samples, summary
from evaluation.inference import build_parser, load_predictor
from models.build import TOKEN_THRESHOLDS, sigmoid
from models.flops import count_flops, decoder_operations, flops_per_image
from models.reduction.selection import log_odds
from models.tokens import kept_in_all
from tasks.meters import ReductionMeter
from utils.checkpoint import load_checkpoint
from utils.distributed import Distributed
from utils.errors import UsageError, UserError
from utils.run_folder import CALIBRATED

ALONE = Distributed(torch.device("cpu"))


def set_thresholds(model, images: torch.Tensor) -> None:
    """Half of the tokens that enter each stage exceed its threshold, in the mean of these images;
    they differ in contrast, so that their numbers do.
    """
    found = []
    for predictor in model.score_predictors:
        keep_all = [-1e9] * (len(model.pruning_layers) - len(found))
        model.set_token_thresholds([*found, *keep_all])
        odds = []
        hook = predictor.register_forward_hook(
            lambda _, inputs, scores, odds=odds: odds.append(log_odds(scores)[inputs[1] > 0.5])
        )
        model(images)
        hook.remove()
        found.append(odds[0].median().item() + 1e-6)
    model.set_token_thresholds(found)


def of_many(family: str, **more):
    model = build(family, pruning_layers=(1, 2), **more).eval()
    with torch.no_grad():
        decide(model.named_parameters())
    side = model.patch_embed.img_size
    images = torch.randn(6, 3, *side, generator=torch.Generator().manual_seed(2))
    images = images * torch.tensor([0.2, 3.0, 1.0, 0.5, 2.0, 1.5])[:, None, None, None]
    with torch.no_grad():
        set_thresholds(model, images)
    return model, images


def kept_alone(model, image: torch.Tensor, counts: list[int]):
    """The model's result for one image, which keeps so many tokens as all images used to."""
    thresholds = model.reduction.thresholds
    model.set_token_keep([(count + 0.5) / model.num_patches for count in counts])
    assert not model.reduction.thresholds, "a budget's thresholds are not those of another one"
    result = model(image)
    model.set_token_thresholds(thresholds)
    return result


@pytest.mark.parametrize("recorded", [False, True], ids=["in groups", "whole"])
@pytest.mark.parametrize("more", [{}, {"route_blocks": False}, {"scorer_input": "B"}], ids=str)
@pytest.mark.parametrize("family", ["vim", "videomamba", "mambareg"])
def test_each_image_as_if_alone(family, more, recorded):
    """With the numbers of tokens that it earned, it gets what the fixed budget would give it."""
    model, images = of_many(family, **more)
    with torch.set_grad_enabled(recorded):
        together = model(images)
        counts = torch.stack(together.counts, dim=1)
        assert len(counts.unique(dim=0)) > 2, "the test needs images that differ"
        for i, own in enumerate(counts.tolist()):
            alone = kept_alone(model, images[i : i + 1], own)
            torch.testing.assert_close(together.logits[i], alone.logits[0], atol=2e-5, rtol=2e-5)
            assert torch.equal(together.gates[:, i], alone.gates[:, 0])
            for stage, kept in zip(together.kept, alone.kept, strict=True):
                assert torch.equal(stage[i][: kept.shape[1]], kept[0])
                assert (stage[i][kept.shape[1] :] == -1).all()


def test_operations_of_each_image():
    model, images = of_many("vim")
    with torch.no_grad():
        result = model(images)
    found = flops_per_image(model, result.gates, result.counts)
    assert len(found.exact.unique()) > 2
    for i, own in enumerate(torch.stack(result.counts, dim=1).tolist()):
        model.set_token_keep([(count + 0.5) / model.num_patches for count in own])
        alone = count_flops(model, result.gates[:, i])
        assert found.paper[i] == pytest.approx(alone.paper, rel=1e-12)
        assert found.exact[i] == pytest.approx(alone.exact, rel=1e-12)


def test_one_token_at_least_and_no_other_models():
    model, images = of_many("vim")
    model.set_token_thresholds([1e9, 1e9])
    with torch.no_grad():
        result = model(images)
    assert [stage.tolist() for stage in result.counts] == [[1] * 6] * 2
    assert result.logits.isfinite().all()
    with pytest.raises(ValueError, match=r"must have one threshold for each of the pruning layers"):
        model.set_token_thresholds([0.0])
    for more in {"reduction": "prune+merge"}, {"token_strategy": "static"}:
        with pytest.raises(ValueError, match="only tokens that are pruned by learned scores"):
            build("vim", **more).set_token_thresholds([0.0, 0.0])


def test_training_does_not_see_thresholds():
    model, images = of_many("vim")
    model.train()
    assert len(model(images).decisions) == 2


def test_maps_of_segmenters(tmp_path):
    """Dropped patches keep what they showed, whatever the other images kept; what the decoder costs
    is no part of what the images' own numbers change.
    """
    path = segmenter(tmp_path, "upernet")
    flags = ["--model-path", str(path), "--device", "cpu"]
    model = load_predictor(build_parser("", ""), flags).model
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images = images * torch.tensor([0.3, 3.0, 1.0, 2.0])[:, None, None, None]
    meter = ReductionMeter(model, torch.device("cpu"))
    with torch.no_grad():
        set_thresholds(model, images)
        together = model(images)
        assert len(together.counts[0].unique()) > 1
        model.set_token_thresholds([1e9] * len(model.pruning_layers))
        least = model(images)
        meter.update(SimpleNamespace(images=images), least)
        own = flops_per_image(model, least.gates, least.counts).exact
        fixed = flops_per_image(model, least.gates).exact
        cost = (own - decoder_operations(model)) / (fixed - decoder_operations(model))
        assert meter.compute(ALONE)["cost"] == pytest.approx(cost.mean().item(), rel=1e-4)
        assert cost.max() < (own / fixed).min() - 0.1
        set_thresholds(model, images)
        for i, own in enumerate(torch.stack(together.counts, dim=1).tolist()):
            alone = kept_alone(model, images[i : i + 1], own)
            torch.testing.assert_close(together.logits[i], alone.logits[0], atol=2e-5, rtol=2e-5)


def test_reports_of_images(monkeypatch):
    """Pictures and their captions show each image's own patches."""
    model, images = of_many("vim")
    with torch.no_grad():
        result = model(images)
    answers = [[] for _ in images]
    task = SimpleNamespace(answers=lambda result, names: answers)
    predictor = SimpleNamespace(model=model, class_names=list("abcdefg"), task=task)
    monkeypatch.setattr(samples, "dense_flops", lambda predictor: 1.0)
    reports = samples.explain(predictor, result, list("123456"))
    for stage, counts in enumerate(result.counts):
        assert [len(report.kept[stage]) for report in reports] == counts.tolist()
        assert all((report.kept[stage] >= 0).all() for report in reports)
    pixels = decision_picture(torch.ones_like(images), result.kept, model.patch_embed)
    side, area = images.shape[-1], images[0, 0].numel() // model.num_patches
    columns = range(0, pixels.shape[1], side + GAP)
    for stage, counts in enumerate(result.counts, start=1):
        top = stage * (side + GAP)
        for left, count in zip(columns, counts.tolist(), strict=True):
            own = pixels[top : top + side, left : left + side]
            dimmed = (own != pixels[:side, left : left + side]).any(axis=-1).sum()
            assert dimmed == (model.num_patches - count) * area


def test_counted_and_joined():
    model, images = of_many("vim")
    meter = ReductionMeter(model, torch.device("cpu"))
    for part in images[:4], images[4:]:
        with torch.no_grad():
            result = model(part)
        meter.update(SimpleNamespace(images=part), result)
    values = meter.compute(ALONE)
    with torch.no_grad():
        whole = model(images)
    counts = torch.stack(whole.counts).double()
    assert values["keep"] == pytest.approx((counts.mean(dim=1) / model.num_patches).tolist())
    exact = flops_per_image(model, whole.gates, whole.counts).exact
    assert values["flops"].exact == pytest.approx(exact.mean().item(), rel=1e-6)
    fixed = flops_per_image(model, whole.gates).exact
    share = exact.mean() / fixed.mean()
    assert values["cost"] == pytest.approx(share.item(), rel=1e-6)
    error = (exact - share * fixed).std() / fixed.mean() / 6**0.5
    assert error > 0.005, "the test needs images that differ"
    assert values["cost_error"] == pytest.approx(error.item(), rel=1e-4)
    meter = ReductionMeter(model, torch.device("cpu"))
    with torch.no_grad():
        meter.update(SimpleNamespace(images=images[:1]), model(images[:1]))
    assert meter.compute(ALONE)["cost_error"] is None
    assert [int(each.sum()) for each in values["counts"]] == [6, 6]
    with torch.no_grad():
        few, many = (model(part) for part in images.split(3))
    for stage, (one, other) in zip(whole.counts, kept_in_all([few, many]), strict=True):
        assert one.shape == other.shape
        assert torch.equal((torch.cat([one, other]) >= 0).sum(dim=1), stage)


def test_a_whole_evaluation(tmp_path: Path, capsys):
    path = decided(save_model(tmp_path / "model.pth", *DYNAMIC, *SMALL))
    fixed = evaluated(path, tmp_path / "fixed")
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "eval.json").write_text('{"checkpoint_sha256": "another"}')
    own = evaluated(path, tmp_path / "image", "--token-budget", "image")
    said = capsys.readouterr().out
    told = said.index("eval.json is of another checkpoint, and will be replaced")
    assert told < said.index("patches kept after each stage", told)
    assert "token_budget" not in fixed and "patches of four images in five" in said
    found = own["token_budget"]
    assert len(found["thresholds"]) == len(own["keep"])
    assert own["keep"] == pytest.approx(fixed["keep"], rel=0.1)
    assert found["exact_to_fixed_at_equal_gates"] == pytest.approx(1, abs=0.05)
    assert 0 < found["standard_error"] < 0.05 and "(standard error " in said
    assert own["flops"]["exact"] == pytest.approx(fixed["flops"]["exact"], rel=0.1)
    ranges = zip(*(found["patches"][k] for k in ("least", "median", "most")), strict=True)
    assert all(1 <= low <= middle <= high for low, middle, high in ranges)
    assert json.loads((tmp_path / "image" / "eval.json").read_text())["images"] == 360


def test_thresholds_that_a_checkpoint_holds(tmp_path: Path, monkeypatch):
    """`--calibrate` writes them; all programs read them, for the budget they were chosen for."""
    path = decided(save_model(tmp_path / "model.pth", *DYNAMIC, *SMALL))
    image = "--token-budget", "image"
    chosen = evaluated(path, tmp_path / "out", *image, "--calibrate")
    calibrated = tmp_path / "out" / CALIBRATED

    def refuse(*_):
        raise AssertionError("chosen again")

    with monkeypatch.context() as patched:
        patched.setattr(main, "calibrate_tokens", refuse)
        again = evaluated(calibrated, tmp_path / "again", *image)
        for name in "keep", "gates", "token_budget", "top1", "flops":
            assert again[name] == chosen[name], name
        with pytest.raises(AssertionError, match="chosen again"):
            evaluated(calibrated, tmp_path / "other", *image, "--token-keep-ratio", "0.6")
    assert "token_budget" not in evaluated(calibrated, tmp_path / "fixed")

    flags = ["--device", "cpu", *image]
    parser = build_parser("predict.py", "")
    model = load_predictor(parser, ["--model-path", str(calibrated), *flags]).model
    found = [sigmoid(odds) for odds in model.reduction.thresholds]
    assert found == chosen["token_budget"]["thresholds"]
    for source, more in (path, []), (calibrated, ["--token-keep-ratio", "0.6"]):
        with pytest.raises(UserError, match="holds no thresholds of tokens for these flags; main"):
            load_predictor(parser, ["--model-path", str(source), *flags, *more])
    words = ["--model-path", str(calibrated), *image, "--output", str(tmp_path / "x.onnx")]
    with pytest.raises(UsageError, match="keeps the same number of tokens of every image"):
        export.main(words)


def test_thresholds_are_not_those_of_other_gates(tmp_path: Path):
    path = decided(save_model(tmp_path / "model.pth", *DYNAMIC, *SMALL))
    image, gates = ("--token-budget", "image"), ("--gate-threshold", "0.99")
    evaluated(path, tmp_path / "out", *image, "--calibrate")
    calibrated = tmp_path / "out" / CALIBRATED
    found = [evaluated(each, tmp_path / "x", *image, *gates) for each in (path, calibrated)]
    assert found[0]["token_budget"] == found[1]["token_budget"]  # chosen anew of both
    flags = ["--model-path", str(calibrated), "--device", "cpu", *image, *gates]
    with pytest.raises(UserError, match="holds no thresholds of tokens for these flags"):
        load_predictor(build_parser("predict.py", ""), flags)


def test_thresholds_of_a_model_that_routes_nothing(tmp_path: Path):
    path = save_model(tmp_path / "model.pth", "--method", "token", *DYNAMIC[2:], *SMALL)
    image = "--token-budget", "image"
    chosen = evaluated(decided(path), tmp_path / "out", *image, "--calibrate")
    again = evaluated(tmp_path / "out" / CALIBRATED, tmp_path / "again", *image)
    assert again["token_budget"] == chosen["token_budget"]


def test_gates_that_are_chosen_again_drop_the_thresholds_of_tokens(tmp_path: Path):
    path = decided(save_model(tmp_path / "model.pth", *DYNAMIC, *SMALL))
    evaluated(path, tmp_path / "one", "--token-budget", "image", "--calibrate")
    evaluated(tmp_path / "one" / CALIBRATED, tmp_path / "two", "--calibrate")
    held = [load_checkpoint(tmp_path / run / CALIBRATED) for run in ("one", "two")]
    assert [TOKEN_THRESHOLDS in each for each in held] == [True, False]


def test_a_missed_budget_is_told(caplog):
    model, images = of_many("vim")
    counts = torch.zeros(2, model.num_patches + 1, dtype=torch.float64)
    counts[0, [4, 8]], counts[1, [2, 6]] = 5, 5
    told = 0
    for share, error, more in (
        (1.0, 0.004, 0),
        (1.015, 0.004, 0),
        (1.03, 0.004, 1),
        (1.03, 0.016, 0),  # no more than chance may do
        (1.03, None, 1),
        (0.9, 0.004, 1),
    ):
        values = {"cost": share, "counts": counts, "cost_error": error}
        found = summary._of_images(model, values, "video")
        assert found["standard_error"] == error
        assert found["exact_to_fixed_at_equal_gates"] == share
        told += more
        assert len(caplog.records) == told
    names = "least", "tenth", "median", "nine_tenths", "most"
    assert [found["patches"][name] for name in names] == [[4, 2], [4, 2], [4, 2], [8, 6], [8, 6]]
    assert "cost is 90.0 % of the fixed budget's: these videos earn other numbers" in caplog.text


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--model-path", "x"], "--token-budget image needs --eval"),
        (["--method", "block"], "not for --method block"),
        (["--token-strategy", "static"], "not for --token-strategy static"),
        (["--reduction", "mtr"], "not for --reduction mtr"),
        (["--sweep", "0.5:1:0.1"], "--token-budget image and --sweep do not go together"),
    ],
)
def test_wrong_flags(flags, said):
    words = ["--method", "dyvm", "--data-set", "DIGITS", "--token-budget", "image", *flags]
    if "--model-path" not in flags:
        words += ["--eval", "--model-path", "x"]
    with pytest.raises(UsageError, match=said):
        options.parse(words, {"data_set": "DIGITS"} if "--eval" in words else None)
