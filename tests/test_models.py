"""Models: names, sizes, layouts, initialisation, and the agreement of training and evaluation."""

import pytest
import timm
import torch

import models
from benchmarks.checking import set_telling_weights
from models import FAMILIES, DynamicVisionMamba, Result, VisionMamba, cumulative_keep, sampling
from models.flops import count_flops
from models.layouts import HeadClassToken, MiddleClassToken, SpreadRegisters, extract, insert, read
from models.reduction import selection
from ops import selective_scan
from ops.selective_scan import torch_lean

PARAMETERS = {  # dense, dynamic; 1000 classes
    "vim_tiny": (7_148_008, 7_367_086),
    "vim_small": (25_796_584, 26_594_110),
    "vim_base": (97_598_440, 100_631_134),
    "videomamba_tiny": (7_148_008, 7_367_086),
    "videomamba_small": (25_796_584, 26_594_110),
    "videomamba_middle": (74_217_448, 75_989_726),
    "videomamba_base": (97_598_440, 100_631_134),
    "mambareg_small": (27_801_064, 28_598_590),
    "mambareg_base": (99_301_096, 102_333_790),
    "mambareg_large": (341_222_376, 346_740_558),
}
pytestmark = pytest.mark.usefixtures("two_threads")
SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=5, num_classes=7)
FAMILY_ARGUMENTS = {
    "vim": {},
    "videomamba": {},
    "mambareg": dict(num_registers=4, register_reduction=2),
    "videomamba clips": dict(img_size=16, num_frames=8, tubelet_size=2),
}


def small(family: str, dynamic: bool, **kwargs) -> VisionMamba:
    """A model of a family, or of clips of one."""
    torch.manual_seed(0)
    arguments = SMALL | FAMILY_ARGUMENTS[family] | kwargs
    family = FAMILIES[family.removesuffix(" clips")]
    if not dynamic:
        return VisionMamba(family, **arguments)
    return DynamicVisionMamba(family, pruning_layers=(1, 3), token_keep=(0.7, 0.4), **arguments)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in timm.create_model(prefix + name).parameters())
            for prefix in ("", "dyvm_")
        ]
    assert tuple(counts) == PARAMETERS[name]


@pytest.mark.parametrize(
    "name, ratio, gate, exact",
    [
        ("vim_tiny", None, None, 1.823),
        ("vim_small", None, None, 5.912),
        ("vim_base", None, None, 20.886),
        ("mambareg_small", None, None, 6.241),
        ("mambareg_base", None, None, 22.049),
        ("dyvm_vim_tiny", 0.9, 0.8, 1.471),
        ("dyvm_vim_small", 0.7, 0.8, 3.663),
        ("dyvm_vim_base", 0.7, 0.7, 12.938),
    ],
)
def test_exact_operations(name, ratio, gate, exact):
    with torch.device("meta"):
        model = timm.create_model(name, **({} if ratio is None else {"token_keep": ratio}))
    assert count_flops(model, gate).exact / 1e9 == pytest.approx(exact, abs=6e-4)


def test_each_direction_counts_with_its_own_gate():
    model = small("vim", dynamic=True)
    gates = torch.ones(model.depth, 2)
    full = count_flops(model, gates)
    gates[2, 1] = 0
    less = count_flops(model, gates)
    assert full.exact - less.exact == 2 * (full.paper - less.paper) - 3 * 4 * 2 * model.embed_dim


def test_every_name_builds_and_the_release_spelling_is_known():
    with torch.device("meta"):
        for name in models.model_names():
            assert isinstance(timm.create_model(name), DynamicVisionMamba) == name.startswith(
                "dyvm_"
            )
    assert models.canonical_name("Vim-Small") == "vim_small"
    assert models.canonical_name("vim_small") == "vim_small"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(typo=1), "typo"),
        (dict(pruning_layers=(3, 1)), "ascend"),
        (dict(pruning_layers=(1, 5)), "1 ... 4"),
        (dict(token_keep=(0.5, 0.7)), "must not ascend"),
        (dict(token_keep=(1.2, 0.7)), r"\(0, 1\]"),
        (dict(token_keep=(0.7,)), "one fraction for each"),
        (dict(scorer_input="x"), "hidden, B, delta"),
        (dict(token_strategy="best"), "learned, distilled, random, static"),
        (dict(img_size=4), "smaller than the patch size"),
        (dict(img_size=33), "leaves 1 pixels that no patch of 8 at stride 8 sees; 32 and 40 fit"),
        (dict(depth=0), "depth must be a positive integer, not 0"),
        (dict(embed_dim="a"), "embed_dim must be a positive integer, not 'a'"),
        (dict(stride=-1), "stride must be a positive integer"),
        (dict(num_registers=4), "MambaReg"),
        (dict(embed_dim=15), "embed_dim 15, .* an even number of features, 4 or more, not 15"),
        (dict(scorer_input="B", d_state=2), "d_state 2: .* not 2 .scorer_input B."),
    ],
)
def test_bad_arguments_are_errors(arguments, message):
    defaults = SMALL | dict(pruning_layers=(1, 3), token_keep=(0.7, 0.4))
    with pytest.raises((TypeError, ValueError), match=message):
        DynamicVisionMamba(FAMILIES["vim"], **(defaults | arguments))


def test_register_reduction_must_divide():
    with pytest.raises(ValueError, match="must divide num_registers 5"):
        small("mambareg", dynamic=False, num_registers=5)


def test_no_pretrained_weights():
    with pytest.raises(ValueError, match="--model-path"):
        timm.create_model("vim_tiny", pretrained=True)


def test_wrong_image_size():
    with pytest.raises(ValueError, match="48 x 32, the model takes 32 x 32"):
        small("vim", dynamic=False)(torch.zeros(1, 3, 48, 32))


@pytest.mark.parametrize("layout", [MiddleClassToken(), HeadClassToken(), SpreadRegisters(4)])
def test_insert_and_extract_undo_each_other(layout):
    patches, class_tokens = torch.randn(3, 11, 2), torch.randn(3, layout.num_tokens, 2)
    same = layout.class_slots(11)
    each = layout.class_slots(torch.tensor([11, 6, 0]))
    assert tuple(each[0].tolist()) == same
    for positions in (same, each):
        sequence = insert(patches, class_tokens, positions)
        assert torch.equal(read(sequence, positions), class_tokens)
        back = extract(sequence, positions)
        assert torch.equal(back[0], patches) and torch.equal(back[1], class_tokens)
    shared = torch.tensor(same).expand(3, -1)
    assert torch.equal(insert(patches, class_tokens, same), insert(patches, class_tokens, shared))


@pytest.mark.parametrize("family", FAMILIES)
def test_initialisation(family):
    model = small(family, dynamic=True, embed_dim=64, depth=4)
    for layer in model.layers:
        for dt_proj in (layer.mixer.dt_proj, layer.mixer.dt_proj_b):
            steps = torch.nn.functional.softplus(dt_proj.bias)
            assert 1e-3 * 0.999 <= steps.min() and steps.max() <= 0.1 * 1.001
            assert dt_proj.weight.abs().max() <= dt_proj.in_features**-0.5
        assert torch.allclose(layer.mixer.A_log[0].exp(), torch.arange(1.0, 17))
        assert (layer.mixer.D == 1).all()
        assert not layer.mixer.block_head.weight.any() and (layer.mixer.block_head.bias == 5).all()
    assert model.layers[0].mixer.out_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.15)
    for name in ("cls_token", "pos_embed"):
        assert getattr(model, name).std().item() == pytest.approx(0.02, rel=0.3)
    decayed = {name for name, p in model.named_parameters() if p.ndim > 1} - model.no_weight_decay()
    assert not [
        name for name in decayed if name.endswith(("A_log", "A_b_log", "pos_embed", "cls_token"))
    ]


def masked_and_pruned(
    model: DynamicVisionMamba, counts: tuple[int, int], monkeypatch
) -> tuple[Result, Result]:
    """Training's and evaluation's result for the same random decisions, which keep `counts`
    patches.
    """
    time = () if model.num_frames is None else (model.num_frames,)
    images = torch.randn(3, 3, *time, *model.patch_embed.img_size)
    slots = [
        torch.stack([torch.randperm(before)[:after].sort().values for _ in images])
        for before, after in zip((model.num_patches, counts[0]), counts, strict=True)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(
            sampling,
            "keep_decision",
            lambda log_probs, name, *_: torch.zeros_like(log_probs[..., 0]).scatter(
                1, slots[int(name[-1])], 1.0
            ),
        )
        trained = model.train()(images)
        left = list(slots)
        patch.setattr(model.reduction, "kept_counts", lambda patches: list(counts))
        patch.setattr(selection, "best_in_order", lambda scores, count: left.pop(0))
        with torch.no_grad():
            pruned = model.eval()(images)
    assert pruned.tokens.shape[1] == counts[1] and (trained.alive.sum(1) == counts[1]).all()
    return trained, pruned


@pytest.mark.parametrize(
    "backend", [name for name in selective_scan.PREFERENCE if selective_scan.runs_on(name, "cpu")]
)
@pytest.mark.parametrize("family", FAMILY_ARGUMENTS)
@pytest.mark.parametrize("routed", [False, True])
def test_masked_training_equals_pruned_evaluation(family, routed, backend, monkeypatch):
    """For equal decisions, training's masked path and evaluation's pruned path give the same
    logits, in float32.
    """
    monkeypatch.setenv("DYVM_BACKEND", backend)
    model = small(family, dynamic=True, route_blocks=routed)
    set_telling_weights(model)
    if routed:  # routers that differ between images, layers and directions
        for layer in model.layers:
            torch.nn.init.normal_(layer.mixer.block_head.weight, std=20.0)
            torch.nn.init.zeros_(layer.mixer.block_head.bias)
        monkeypatch.setattr(
            sampling, "binary_gate", lambda logits, name, *_: (logits > 0).to(logits.dtype)
        )
    patches, gates = model.num_patches, []
    for counts in [
        (patches, patches),
        (patches, 1),
        (1, 1),
        (0, 0),
        (9, 0),
        (9, 4),
        (13, 7),
        (5, 5),
    ]:
        trained, pruned = masked_and_pruned(model, counts, monkeypatch)
        assert torch.equal(trained.gates, pruned.gates)
        torch.testing.assert_close(trained.logits, pruned.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(trained.tokens[:, : counts[1]], pruned.tokens, atol=1e-5, rtol=0)
        assert torch.equal(trained.origin[:, : counts[1]], pruned.origin)
        gates.append(pruned.gates)
    if routed:
        assert 0 < torch.stack(gates).mean() < 1


@pytest.mark.parametrize("wrong", ["forgets its state", "leaves out the mask"])
@pytest.mark.parametrize("family", FAMILY_ARGUMENTS)
def test_that_comparison_sees_a_wrong_scan(family, wrong, monkeypatch):
    """Wrong in training's path alone, and there in the backward scans."""
    right = torch_lean.ssm_branch

    def wrong_in_training(xz, params, *, reverse=False, mask=None, **options):
        if mask is not None and reverse and wrong == "forgets its state":
            params = params._replace(A=params.A * 1e4)
        elif mask is not None and reverse:
            mask = None
        return right(xz, params, reverse=reverse, mask=mask, **options)

    monkeypatch.setenv("DYVM_BACKEND", "torch")
    monkeypatch.setattr(torch_lean, "ssm_branch", wrong_in_training)
    model = small(family, dynamic=True)
    set_telling_weights(model)
    trained, pruned = masked_and_pruned(model, (13, 7), monkeypatch)
    assert (trained.logits - pruned.logits).abs().max() > 1e-3


def test_evaluation_keeps_the_published_counts():
    model = timm.create_model("dyvm_vim_tiny", depth=19)
    for ratio, counts in ((0.7, [137, 96, 67]), (0.8, [156, 125, 100]), (0.9, [176, 158, 142])):
        model.set_token_keep(cumulative_keep(ratio, 3))
        assert model.kept_counts() == counts


def test_dropped_tokens_stay_dropped():
    model = small("vim", dynamic=True).train()
    result = model(torch.randn(6, 3, 32, 32))
    first, second = (decision.detach() for decision in result.decisions)
    dead = first.sum(1, keepdim=True) <= torch.arange(first.shape[1])
    assert dead.any() and not second[dead].any()


@pytest.mark.parametrize("strategy", ["random", "static"])
def test_baseline_strategies_keep_the_budget_and_are_nested(strategy):
    model = small("vim", dynamic=True, token_strategy=strategy)
    images = torch.randn(4, 3, 32, 32)
    trained = model.train()(images)
    assert [kept.shape[1] for kept in trained.kept] == [11, 6] and not trained.decisions
    evaluated = model.eval()(images)
    assert [kept.shape[1] for kept in evaluated.kept] == [11, 6]
    for outer, inner in zip(*evaluated.kept, strict=True):
        assert set(inner.tolist()) <= set(outer.tolist())
    if strategy == "static":
        assert torch.equal(trained.origin, evaluated.origin)
    else:
        alone = torch.cat([model(image[None]).origin for image in images])
        assert torch.equal(alone, evaluated.origin), "an image keeps the same tokens in any batch"
        assert len({tuple(kept.tolist()) for kept in evaluated.origin}) > 1


@pytest.mark.parametrize("scorer_input", ["B", "delta"])
def test_scorer_inputs_train(scorer_input):
    model = small("vim", dynamic=True, scorer_input=scorer_input).train()
    result = model(torch.randn(2, 3, 32, 32))
    sum(decision.sum() for decision in result.decisions).backward()
    gradient = model.score_predictors[0].in_conv[1].weight.grad
    assert gradient.shape[0] == {"B": 16, "delta": 32}[scorer_input] and gradient.any()
    assert model.eval()(torch.randn(2, 3, 32, 32)).kept[1].shape == (2, 6)


def test_forward_is_the_same_alone_and_in_a_batch():
    model = small("vim", dynamic=True).eval()
    images = torch.randn(3, 3, 32, 32)
    together = model(images).logits
    torch.testing.assert_close(
        torch.cat([model(image[None]).logits for image in images]), together, atol=1e-5, rtol=1e-5
    )


def test_no_images():
    with torch.no_grad():
        result = small("vim", dynamic=True).eval()(torch.randn(0, 3, 32, 32))
    assert result.logits.shape == (0, 7) and [kept.shape for kept in result.kept] == [
        (0, 11),
        (0, 6),
    ]


def test_bf16_autocast_trains_without_nan():
    model = small("vim", dynamic=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(torch.randn(4, 3, 32, 32))
            loss = result.logits.float().square().mean() + result.tokens.float().square().mean()
            loss = loss + sum(d.mean() for d in result.decisions) + result.gates.mean()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(g).all() for g in gradients)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() for p in model.parameters())
