"""benchmarks/model.py: which forms of a model get a speed."""

import pytest
import torch
from helpers.benchmarks import tiny_table

from benchmarks.rivals import with_our_products
from ops import onednn
from ops.linear import Linear
from ops.selective_scan import torch_lean


@pytest.fixture(autouse=True)
def products_of_pytorch(monkeypatch):
    """On all machines alike."""
    monkeypatch.setattr(onednn, "is_faster", lambda: False)


def test_only_forms_with_the_right_logits_get_a_speed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "compile", lambda deit, dynamic: lambda images: deit(images) * 1.01)
    part, complaint = tiny_table(monkeypatch, tmp_path, "--compile", "--runs", "2")
    assert part["wrong"] == ["DeiT-T, compiled"] and part["errors"][
        "DeiT-T, compiled"
    ] == pytest.approx(0.01, rel=1e-3)
    assert part["models"].keys() == {"DeiT-T", "Vim-T", "DyVM-T"}
    assert all(row["images_per_s"] > 0 for row in part["models"].values())
    assert all(row["samples"] == 2 * 5 for row in part["models"].values())
    assert part["x DeiT eager"]["DeiT-T"] == [1, 1] and len(part["x DeiT eager"]["Vim-T"]) == 2
    assert complaint == (
        1,
        "no speed without correctness: DeiT-T, compiled at batch 3 beyond 2e-05",
    )
    printed = capsys.readouterr()
    assert "no speed: the logits of DeiT-T, compiled at batch 3 are wrong by 1.0e-02" in printed.err
    assert "DeiT-T, compiled" not in printed.out and "dynamic against dense" in printed.out
    assert "1.00 to 1.00" in printed.out


def test_a_form_that_cannot_be_made_is_left_out(monkeypatch, tmp_path, capsys):
    def refuse(deit, dynamic):
        raise RuntimeError("no compiler\nbehind a trace")

    monkeypatch.setattr(torch, "compile", refuse)
    part, complaint = tiny_table(monkeypatch, tmp_path, "--compile")
    assert complaint is None and part["wrong"] == [] and "DeiT-T, compiled" not in part["models"]
    assert capsys.readouterr().err.splitlines()[-1] == "left out: DeiT-T, compiled (no compiler)"


def test_a_wrong_model_gets_no_speed(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DYVM_BACKEND", "torch")
    right = torch_lean.ssm_branch
    monkeypatch.setattr(
        torch_lean, "ssm_branch", lambda *args, **kwargs: right(*args, **kwargs) * 1.1
    )
    part, complaint = tiny_table(monkeypatch, tmp_path, "--no-compile")
    assert (
        part["wrong"] == ["Vim-T", "DyVM-T"]
        and part["models"].keys() == {"DeiT-T"}
        and "share" not in part
    )
    assert complaint[0] == 1 and "Vim-T at batch 3, DyVM-T at batch 3" in complaint[1]


@pytest.mark.skipif(not onednn.works(), reason="PyTorch was built without oneDNN")
def test_deit_has_our_products_too_where_they_are_faster(monkeypatch, tmp_path):
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    part, complaint = tiny_table(monkeypatch, tmp_path, "--no-compile")
    assert complaint is None
    assert part["models"].keys() == {"DeiT-T", "Vim-T", "DyVM-T", "DeiT-T, oneDNN"}
    assert part["errors"]["DeiT-T, oneDNN"] < 2e-5


def test_a_model_with_our_products():
    given = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False)), Linear(2, 2)
    )
    given[0].requires_grad_(False)
    state = torch.random.get_rng_state()
    ours = with_our_products(given.eval())
    # The images that follow are the same on every machine.
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [type(layer) for layer in given.modules()].count(Linear) == 1  # left as it was
    layers = [layer for layer in ours.modules() if isinstance(layer, torch.nn.Linear)]
    assert [type(layer) for layer in layers] == [Linear] * 3
    assert not any(layer.training for layer in ours.modules())
    assert [weight.requires_grad for weight in ours.parameters()] == [False] * 2 + [True] * 3
    x = torch.randn(5, 3)
    torch.testing.assert_close(ours(x), given(x))
