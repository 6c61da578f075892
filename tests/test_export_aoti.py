"""export.py --format aoti: a compiled package and its operators, as C++ and Python use them without
this project.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.exports import CLASSES, STAGE, TINY, classifier, exported, own_model, segmenter
from helpers.scans import params_of
from PIL import Image

import export
import main
import predict
import visualize
from exporting import package
from ops import selective_scan
from ops.selective_scan import BranchParams, native
from ops.selective_scan.cpu import build
from utils.errors import UsageError, UserError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "aoti"

pytestmark = [
    pytest.mark.usefixtures("as_a_process_of_its_own"),
    pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"
    ),
]


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A checkpoint with stages and routers, and its package."""
    folder = tmp_path_factory.mktemp("routed")
    checkpoint = classifier(folder, "--method", "dyvm", *STAGE, *TINY, seed=3)
    return checkpoint, exported(checkpoint, "--format", "aoti", suffix=".pt2")


def alone(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Python code that knows nothing of this project, with `f` a package in the folder."""
    load = "import torch; torch.ops.load_library('./model.so')\n"
    load += "f = torch._inductor.aoti_load_package('model.pt2')\n"
    return subprocess.run(
        [sys.executable, "-c", load + code], cwd=folder, capture_output=True, text=True, check=False
    )


def test_python_without_the_project(routed):
    checkpoint, file = routed
    folder = file.parent
    images = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.save(images, folder / "images.pt")
    shutil.copy(folder / "model.so", folder / "another.so")  # that of a second package
    code = "torch.ops.load_library('./another.so')\nx = torch.load('images.pt')\n"
    code += "y = x.contiguous(memory_format=torch.channels_last)\n"
    code += "torch.save([f(x), f(y), f(x[:1]), f(x[3:5])], 'logits.pt')"
    done = alone(code, folder)
    assert done.returncode == 0, done.stderr
    whole, other_strides, one, two = torch.load(folder / "logits.pt")
    with torch.no_grad():
        expected = own_model(checkpoint).model(images)
    assert expected.gates.unique().tolist() == [0, 1], "the test needs scans of both kinds"
    torch.testing.assert_close(whole, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(other_strides, whole)
    torch.testing.assert_close(torch.cat([one, two]), whole[[0, 3, 4]], atol=1e-5, rtol=1e-5)


def test_images_that_do_not_fit_are_refused(routed):
    """A compiled program would read past them without a word."""
    code = """
for x in (torch.zeros(1, 3, 40, 40), torch.zeros(2, 3, 32, 32).double()):
    try:
        f(x)
    except RuntimeError:
        print("refused")
"""
    done = alone(code, routed[1].parent)
    assert done.stdout.split() == ["refused", "refused"]
    said = "this model takes images [batch, 3, 32, 32] in float32 on the CPU, not "
    for given in "[1, 3, 40, 40] in Float", "[2, 3, 32, 32] in Double":
        assert said + given in done.stderr


def test_the_example_in_cpp(routed, tmp_path, capsys):
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    torch_folder = Path(torch.__file__).parent
    configure = ["cmake", "-S", str(EXAMPLE), "-B", str(tmp_path), f"-DTORCH={torch_folder}"]
    for command in (configure, ["cmake", "--build", str(tmp_path)]):
        subprocess.run(command, check=True, capture_output=True)
    checkpoint, file = routed
    pixels = torch.randint(256, (28, 28, 3), generator=torch.Generator().manual_seed(5))
    image = Image.fromarray(pixels.byte().numpy())
    image.save(tmp_path / "image.ppm")
    capsys.readouterr()
    predict.main(
        ["--model-path", str(checkpoint), "--json", "--num-workers", "0", f"{tmp_path}/image.ppm"]
    )
    (expected,) = json.loads(capsys.readouterr().out)
    best = expected["top"][0]

    def run(*words) -> subprocess.CompletedProcess:
        command = [str(tmp_path / "run"), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    library = package.library_of(file)
    done = run(file, library, tmp_path / "image.ppm")
    assert done.returncode == 0, done.stderr
    said = f"class {CLASSES.index(best['name'])} of {json.dumps(CLASSES)}, probability "
    assert done.stdout.startswith(said)
    probability = float(done.stdout.removeprefix(said))
    assert probability == pytest.approx(best["probability"], abs=1e-4)
    pixels = (tmp_path / "image.ppm").read_bytes()
    (tmp_path / "cut.ppm").write_bytes(pixels[:100])
    (tmp_path / "noted.ppm").write_bytes(pixels.replace(b"P6\n", b"P6\n# by hand\n# 7 7\n", 1))
    assert run(file, library, tmp_path / "noted.ppm").stdout == done.stdout
    image.save(tmp_path / "image.png")
    program = torch.export.export(torch.nn.Identity(), (torch.zeros(2),))
    torch.export.save(program, tmp_path / "other.pt2")
    no_package = "is no package of export.py --format aoti"
    for words, complaint in (
        ((tmp_path / "none.pt2", library, tmp_path / "image.ppm"), f"none.pt2 {no_package}"),
        ((tmp_path / "other.pt2", library, tmp_path / "image.ppm"), f"other.pt2 {no_package}"),
        ((file, library, tmp_path / "cut.ppm"), "cut.ppm is cut off"),
        ((file, library, tmp_path / "image.png"), "image.png is no binary PPM"),
        ((file, library, tmp_path / "none.ppm"), "none.ppm cannot be opened"),
        ((file, tmp_path / "none.so", tmp_path / "image.ppm"), "none.so: cannot open"),
        ((file,), "usage: run PACKAGE.pt2 LIBRARY.so IMAGE.ppm"),
    ):
        done = run(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert complaint in done.stderr


def test_what_the_package_says_of_itself(routed):
    package.operators()
    texts = package.open_package(routed[1]).get_metadata()
    assert json.loads(texts["class_names"]) == CLASSES
    assert json.loads(texts["input_size"]) == [32, 32]
    assert json.loads(texts["kept_patches"]) == own_model(routed[0]).model.kept_counts()


@pytest.mark.parametrize("images", [1, 2, 3, 9])
@pytest.mark.parametrize("channels, states, rank", [(8, 4, 1), (50, 3, 2), (33, 16, 5)])
@pytest.mark.parametrize("gated", [True, False])
def test_operators(images, channels, states, rank, gated):
    """Those of the library and those of the `cpu` backend have the same bits."""
    params = [
        BranchParams(*(p.float() for p in params_of(channels, states, rank))) for _ in range(2)
    ]
    xz = torch.randn(images, 19, 2 * channels)
    active = torch.rand(images, 2) > 0.4 if gated else None
    expected = selective_scan.cpu.bidirectional_ssm(xz, *params, active=active, scale=0.5)
    with torch.no_grad():
        actual = native.bidirectional_ssm(xz, *params, active=active, scale=0.5)
        strided = torch.randn(images, 19, 4 * channels)[..., ::2].copy_(xz)
        torch.testing.assert_close(
            native.bidirectional_ssm(strided, *params, active=active, scale=0.5), actual
        )
    assert torch.equal(actual, expected)
    with pytest.raises(NotImplementedError, match="no mask, gates or lengths"):
        native.bidirectional_ssm(xz, *params, mask=torch.ones(images, 19))


def test_no_compiler(tmp_path, monkeypatch):
    """Before any work, and nothing is written."""
    checkpoint = classifier(tmp_path, "--method", "dense", *TINY)
    monkeypatch.setattr(build, "_compiler", lambda: (_ for _ in ()).throw(build.BuildError("none")))
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    with pytest.raises(UserError, match="--format aoti needs a C\\+\\+ compiler: none"):
        exported(checkpoint, "--format", "aoti", suffix=".pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_programs_that_need_a_checkpoint(tmp_path):
    (tmp_path / "model.pt2").touch()
    for program, said in ((predict, "made from, or an ONNX file"), (visualize, "made from")):
        words = ["--model-path", f"{tmp_path}/model.pt2", "--images", "x", "--output_dir", "x"]
        words = words if program is visualize else [*words[:2], "x"]
        with pytest.raises(UsageError, match=f"model.pt2 is an exported model; .* {said}$"):
            program.main(words)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_evaluation_needs_the_checkpoint(suffix, tmp_path):
    with pytest.raises(UsageError, match="is an exported model; main.py needs the checkpoint"):
        main.main(["--eval", "--model-path", f"{tmp_path}/model{suffix}", "--device", "cpu"])


def test_wrong_flags(tmp_path):
    checkpoint = classifier(tmp_path, "--method", "dense", *TINY)
    with pytest.raises(UsageError, match="a file of --format aoti ends with .pt2"):
        export.main(["--model-path", str(checkpoint), "--format", "aoti", "--output", "x.onnx"])
    (tmp_path / "model.so").mkdir()
    with pytest.raises(UsageError, match="its operators would be .*model.so, which is a folder"):
        exported(checkpoint, "--format", "aoti", suffix=".pt2")
    (tmp_path / "model.so").rmdir()
    (tmp_path / "model.so").write_text("of another program")
    with pytest.raises(UsageError, match="model.so, which is there without such a package; choose"):
        exported(checkpoint, "--format", "aoti", suffix=".pt2")
    assert (tmp_path / "model.so").read_text() == "of another program"
    (tmp_path / "model.so").unlink()
    with pytest.raises(UsageError, match="--int8 is for --format onnx"):
        exported(checkpoint, "--format", "aoti", "--int8", suffix=".pt2")


def test_a_segmenter(tmp_path, capsys):
    """export.py itself refuses a package that differs from the checkpoint by more than 1e-4."""
    file = exported(segmenter(tmp_path, "upernet"), "--format", "aoti", suffix=".pt2")
    assert "segmentation, 3 classes" in capsys.readouterr().out
    assert package.open_package(file)(torch.rand(1, 3, 32, 32)).shape == (1, 3, 8, 8)
