"""export.py: files that other runtimes run, equal to the checkpoint; what it says to bad input."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.exports import (
    CLASSES,
    SMALLEST,
    STAGE,
    TINY,
    TOKEN,
    classifier,
    exported,
    own_model,
    segmenter,
)
from helpers.seeing import save_images, save_model
from sklearn.datasets import load_digits
from torch import nn

import export
import predict
import visualize
from evaluation.inference import build_parser, load_predictor
from exporting import checking
from exporting.onnx_model import OnnxModel, sealed
from models.build import FLAG_OF
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UsageError, UserError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.usefixtures("as_a_process_of_its_own")


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A checkpoint with stages and routers, and its ONNX file."""
    folder = tmp_path_factory.mktemp("routed")
    checkpoint = classifier(folder, "--method", "dyvm", *STAGE, *TINY, seed=3)
    return checkpoint, exported(checkpoint)


def check_on_digits(model, runtime) -> None:
    """64 real images: the same classes, and logits within 1e-4 of the largest."""
    digits = torch.from_numpy(load_digits().images[:64]).float()[:, None] / 16
    images = nn.functional.interpolate(digits, model.patch_embed.img_size, mode="bilinear")
    images = (images.expand(-1, 3, -1, -1) - 0.45) / 0.225
    with torch.no_grad():
        expected = model(images).logits
    actual = runtime(images).logits
    assert len(actual) == 64 and torch.equal(actual.argmax(1), expected.argmax(1))
    assert checking.relative(actual, expected).max() < 1e-4


def test_real_images(routed):
    checkpoint, file = routed
    check_on_digits(own_model(checkpoint).model, OnnxModel(file))


def test_batches_of_any_size(routed):
    checkpoint, file = routed
    model, runtime = own_model(checkpoint).model, OnnxModel(file)
    images = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images)
    for size in (1, 2, 7):
        logits = runtime(images[:size]).logits
        torch.testing.assert_close(logits, expected.logits[:size], atol=1e-5, rtol=1e-5)
    assert expected.gates.unique().tolist() == [0, 1], "the test needs scans of both kinds"


def test_standard_operators_alone_and_tokens_really_go(routed):
    graph = onnx.load(routed[1]).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["If"] == 4, "a direction of a layer each"
    assert kinds["TopK"] >= 1 and not kinds["Scan"]
    inside = [node.op_type for each in graph.node if each.op_type == "If"
              for branch in each.attribute for node in branch.g.node]  # fmt: skip
    assert inside.count("Scan") == 4
    assert [len(each.type.tensor_type.shape.dim) for each in graph.input] == [4]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_scan_that_no_image_wants_is_not_run(routed, tmp_path):
    """By ONNX Runtime's own profile, against the gates of each image."""
    checkpoint, file = routed
    model = own_model(checkpoint).model
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images *= torch.linspace(-4, 4, 12)[:, None, None, None]
    with torch.no_grad():
        wanted = model(images).gates.sum(dim=(0, 2)).int().tolist()
    for image, scans in zip(images, wanted, strict=True):
        settings = onnxruntime.SessionOptions()
        settings.enable_profiling, settings.profile_file_prefix = True, str(tmp_path / "profile")
        session = onnxruntime.InferenceSession(str(file), settings)
        session.run(None, {"images": image[None].numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
        run = [e for e in events if e.get("args", {}).get("op_name") == "Scan"
               and e["name"].endswith("_kernel_time")]  # fmt: skip
        assert len(run) == scans
    assert len(set(wanted)) > 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--model", "videomamba_micro", *TOKEN),
        ("--model", "mambareg_tiny", "--input-size", "32", *TOKEN, "patch_size=8",
         "num_registers=4", "register_reduction=2"),
        ("--data-set", "VIDEO_FOLDER", "--model", "videomamba_micro", "--num-frames", "2", *TOKEN),
        ("--method", "token", "--reduction", "merge", "--merge-tokens", "3", *TINY),
        ("--reduction", "mtr", *TOKEN),
        ("--reduction", "prune+merge", *TOKEN),
        ("--token-strategy", "static", *TOKEN),
        ("--method", "dense", "--model", "videomamba_micro", *TINY),
    ],
    ids=["videomamba", "mambareg", "clips", "merge", "mtr", "prune+merge", "static", "dense"],
)  # fmt: skip
def test_every_kind_of_model(flags, tmp_path, capsys):
    """export.py itself refuses a file that differs from the checkpoint by more than 1e-4."""
    checkpoint = classifier(tmp_path, *flags)
    file = exported(checkpoint)
    said = capsys.readouterr().out
    assert str(file) in said and "100 % of the top-1 are the same" in said
    model, runtime = own_model(checkpoint).model, OnnxModel(file)
    found = checking.compare(model, lambda images: runtime(images).logits)
    assert found.error < 1e-5
    if model.num_frames is None:
        check_on_digits(model, runtime)


@pytest.mark.parametrize("decoder", ["light", "upernet"])
def test_segmenters(decoder, tmp_path, capsys):
    checkpoint = segmenter(tmp_path, decoder)
    file = exported(checkpoint)
    runtime = OnnxModel(file)
    assert runtime(torch.rand(1, 3, 32, 32)).logits.shape[:2] == (1, 3)
    said = []
    images = save_images(tmp_path / "images", 2)
    capsys.readouterr()
    for model in (checkpoint, file):
        predict.main(["--model-path", str(model), "--num-workers", "0", str(images)])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


def test_predict_says_the_same_of_the_file(routed, tmp_path, capsys):
    images = save_images(tmp_path / "images", 5)
    said = []
    for model in routed:
        predict.main(["--model-path", str(model), "--json", "--num-workers", "0", str(images)])
        said.append(json.loads(capsys.readouterr().out))
    probabilities = []
    for own, other in zip(*said, strict=True):
        assert own["file"] == other["file"]
        first, second = (
            {each["name"]: each["probability"] for each in e["top"]} for e in (own, other)
        )
        assert first == pytest.approx(second, abs=1e-5) and len(first) == len(CLASSES)
        probabilities.append(first["ant"])
    assert len(set(probabilities)) > 1


def test_what_the_file_says_of_itself(routed):
    texts = onnxruntime.InferenceSession(str(routed[1])).get_modelmeta().custom_metadata_map
    assert json.loads(texts["class_names"]) == CLASSES
    assert json.loads(texts["input_size"]) == [32, 32]
    assert json.loads(texts["mean"]) == pytest.approx([0.485, 0.456, 0.406])
    model = own_model(routed[0]).model
    assert json.loads(texts["kept_patches"]) == model.kept_counts()
    assert "data_path" not in json.loads(texts["dyvm"])["args"], "of the machine"


def test_eight_bits(routed, tmp_path):
    from exporting.onnx_file import with_int8_weights

    _, file = routed
    small = tmp_path / "small.onnx"
    small.write_bytes(sealed(with_int8_weights(onnx.load(file)).SerializeToString()))
    kinds = Counter(node.op_type for node in onnx.load(small).graph.node)
    assert kinds["MatMulInteger"] and small.stat().st_size < file.stat().st_size
    images = torch.rand(4, 3, 32, 32)
    near = OnnxModel(small)(images).logits - OnnxModel(file)(images).logits
    assert 0 < near.abs().max() < 0.2 * OnnxModel(file)(images).logits.abs().max()


def test_for_torch_export_load(routed, tmp_path):
    checkpoint, _ = routed
    file = exported(checkpoint, "--format", "torch", suffix=".pt2")
    texts = {"class_names": ""}
    program = torch.export.load(file, extra_files=texts)
    assert json.loads(texts["class_names"]) == CLASSES
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert len(graphs) > 4, "those of the scans and the gates"
    assert not [node for m in graphs for node in m.graph.nodes if "dyvm" in str(node.target)]
    images = torch.rand(3, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    alone = "import torch; p = torch.export.load('model.pt2').module(); "
    alone += "torch.save(p(torch.load('images.pt')), 'logits.pt')"
    folder = checkpoint.parent
    shutil.copy(tmp_path / "images.pt", folder)
    subprocess.run([sys.executable, "-c", alone], cwd=folder, check=True, capture_output=True)
    with torch.no_grad():
        expected = own_model(checkpoint).model(images).logits
    torch.testing.assert_close(torch.load(folder / "logits.pt"), expected, atol=1e-5, rtol=1e-5)


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    checkpoint = classifier(tmp_path, *SMALLEST)
    monkeypatch.setattr(checking, "LARGEST_ERROR", 0.0)
    with pytest.raises(UserError, match="is not the checkpoint's: logits differ .* nothing was"):
        exported(checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]
    checkpoint = load_checkpoint(checkpoint)
    checkpoint["model"]["layers.0.norm.weight"].fill_(1e30)
    save_checkpoint(dict(checkpoint), tmp_path / "model.pth")
    with pytest.raises(UserError, match="answers to noise are not finite"):
        exported(tmp_path / "model.pth")


def test_the_average_in_eight_bits_with_names_of_ones_own(tmp_path, capsys):
    path = classifier(tmp_path, *SMALLEST)
    checkpoint = load_checkpoint(path)
    average = {name: weight + 0.1 for name, weight in checkpoint["model"].items()}
    save_checkpoint(dict(checkpoint) | {"ema": average}, path)
    (tmp_path / "names.txt").write_text("Ameise\nBiene\nKatze\n")
    file = exported(
        path, "--ema", "--int8", "--opset", "21", "--class-names", f"{tmp_path}/names.txt"
    )
    assert "logits differ by" in capsys.readouterr().out
    runtime = OnnxModel(file)
    assert (runtime.record["ema"], runtime.record["int8"]) == (True, True)
    assert onnx.load(file).opset_import[0].version == 21
    wanted = load_predictor(
        export.build_parser(), ["--model-path", str(path), "--output", "x", "--ema"]
    )
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = wanted.model(images).logits
    assert (runtime(images).logits - expected).abs().max() < 0.1 * expected.abs().max()
    images = save_images(tmp_path / "images", 1)
    capsys.readouterr()
    predict.main(["--model-path", str(file), "--num-workers", "0", str(images)])
    assert capsys.readouterr().out.split("\t")[1] in ("Ameise", "Biene", "Katze")
    (tmp_path / "by_folder.json").write_text('{"ant": "one", "bee": "two", "cat": "three"}')
    named = ["--class-names", f"{tmp_path}/by_folder.json"]
    predict.main(["--model-path", str(file), "--num-workers", "0", str(images), *named])
    assert capsys.readouterr().out.split("\t")[1] in ("one", "two", "three")


def test_images_are_shown_as_by_the_checkpoint(tmp_path):
    """Flags that a checkpoint does not record have predict.py's defaults."""
    path = save_model(tmp_path / "model.pth", *SMALLEST)
    checkpoint = load_checkpoint(path)
    for name in ("whole_images", "eval_crop_ratio", "bit_depth"):
        del checkpoint["args"][name]
    save_checkpoint(dict(checkpoint), path)
    args = own_model(path).args
    usual = load_predictor(
        build_parser("", ""), ["--model-path", str(path), "--device", "cpu"]
    ).args
    for name in ("whole_images", "eval_crop_ratio", "bit_depth"):
        assert getattr(args, name) == getattr(usual, name)


def test_what_hangs_on_rounding_is_not_compared(routed, monkeypatch):
    model = own_model(routed[0]).model
    right = checking.compare(model, lambda images: model(images).logits)
    assert (right.images, right.error, right.same) == (checking.CHECKED, 0, 1)
    monkeypatch.setattr(checking, "STEADY", 0.0)
    found = checking.compare(model, lambda images: torch.zeros(len(images), 3))
    assert found.images == 0 and "NOT COMPARED" in str(found)
    checking.require_agreement(found)
    told = checking.compare(model, lambda images: model(images).logits, always=True)
    assert (told.images, told.error, told.same) == (checking.CHECKED, 0, 1)
    assert "depend" not in str(right) and "all of whose answers depend on rounding" in str(told)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--output model.pt2", "a file of --format onnx ends with .onnx"),
        ("--output nowhere/x.onnx", "there is no folder nowhere"),
        ("--output x.pt2 --format torch --int8", "--int8 is for --format onnx"),
        ("--output x.pt2 --format torch --opset 20", "--opset is for --format onnx"),
        ("--output x.onnx --opset 12", "--opset 12: give 18 to 21"),
    ],
)
def test_wrong_flags(flags, said, routed):
    with pytest.raises(UsageError, match=said):
        export.main(["--model-path", str(routed[0]), *flags.split()])


def test_flags_of_training_are_none_of_its_own():
    own = {"output", "format", "opset", "int8", "class_names", "ema", "model_path", "help"}
    of_budget = {"gate_threshold", "token_budget"}
    flags = {action.dest for action in export.build_parser()._actions}
    assert flags == own | of_budget | {*FLAG_OF.values()} - {"drop_path"}


def test_random_tokens_are_refused(tmp_path):
    checkpoint = save_model(tmp_path / "model.pth", "--token-strategy", "random", *TOKEN)
    with pytest.raises(UsageError, match="random tokens depend on every bit of an image"):
        exported(checkpoint)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--token-keep-ratio 0.5", "--token-keep-ratio cannot change .*; export the checkpoint"),
        ("--ema", "--ema cannot change"),
        ("--method dense", "--method cannot change"),
        ("--input-size 64", "--input-size cannot change"),
        ("--amp bf16", "run by ONNX Runtime on the CPU"),
    ],
)
def test_what_a_file_cannot_follow(flags, said, routed, tmp_path):
    images = save_images(tmp_path / "images", 1)
    with pytest.raises(UsageError, match=said):
        predict.main(["--model-path", str(routed[1]), *flags.split(), str(images)])


def test_programs_that_need_the_checkpoint(routed, tmp_path):
    file = str(routed[1])
    with pytest.raises(UsageError, match="is an exported model; export.py needs the checkpoint"):
        export.main(["--model-path", file, "--output", str(tmp_path / "x.onnx")])
    words = ["--model-path", file, "--images", str(tmp_path), "--output_dir", f"{tmp_path}/out"]
    with pytest.raises(UsageError, match="is an exported model; visualize.py needs the checkpoint"):
        visualize.main(words)


def test_other_files(routed, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(routed[0].read_bytes())
    with pytest.raises(UserError, match="broken.onnx: ONNX Runtime cannot load it"):
        OnnxModel(tmp_path / "broken.onnx")
    foreign = onnx.load(routed[1])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="foreign.onnx is not a model that export.py has written"):
        OnnxModel(tmp_path / "foreign.onnx")
    onnx.helper.set_model_props(foreign, {"dyvm": '{"version": 99, "task": "x", "args": {}}'})
    onnx.save(foreign, tmp_path / "newer.onnx")
    with pytest.raises(UserError, match="was written by another version of export.py"):
        OnnxModel(tmp_path / "newer.onnx")
    with pytest.raises(UserError, match="there is no file .*missing.onnx"):
        OnnxModel(tmp_path / "missing.onnx")


def test_a_file_that_was_changed(routed, tmp_path):
    """ONNX Runtime would run it, and answer something else."""
    model, content, changed = onnx.load(routed[1]), routed[1].read_bytes(), tmp_path / "x.onnx"
    largest = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    place = content.index(largest.raw_data) + 2
    flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    texts = {each.key: each.value for each in model.metadata_props}
    record = json.loads(texts["dyvm"])
    onnx.helper.set_model_props(model, texts | {"dyvm": json.dumps(record | {"shown_names": []})})
    for other in (flipped, model.SerializeToString(), content + content[-81:]):
        changed.write_bytes(other)
        with pytest.raises(UserError, match="x.onnx is not as export.py has written it: damaged"):
            OnnxModel(changed)
    assert texts["dyvm_sha256"] == hashlib.sha256(content[:-81]).hexdigest()
