"""An image's logits, tokens and router decisions do not depend on its batch, whatever a CPU can do.

The libraries choose their kernels by the CPU's instruction set, and differ in the order in which
they sum; their own variables cap it, so that one machine stands for others. Where a variable says
nothing to the CPU at hand, its case repeats the plain one.
"""

import subprocess
import sys

import pytest
from helpers.processes import ROOT, clean_environment

CAPS = [
    {},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX", "MKL_CBWR": "COMPATIBLE"},
]

CHECK = """
import torch
from timm import create_model

import models
from ops.linear import linear

torch.manual_seed(0)
sizes = {"embed_dim": 64, "depth": 2, "pruning_layers": (1,), "token_keep": (0.7,)}
# Of few tokens and of many.
cases = [
    ("dyvm_vim_micro", 32), ("dyvm_mambareg_small", 32), ("dyvm_videomamba_tiny", 32),
    ("dyvm_vim_micro", 224),
]
dynamic = [create_model(name, img_size=size, **sizes).eval() for name, size in cases]
# Each image keeps its own number of tokens, whose mean is read; PyTorch adds the last columns of
# such a width in an order that depends on the number of rows.
sizes |= {"embed_dim": 48, "depth": 3, "pruning_layers": (1, 2), "token_keep": (0.7, 0.5)}
for case in ("dyvm_vim_micro", 32), ("dyvm_vim_micro", 224):
    for class_token in False, True:
        model = create_model(case[0], img_size=case[1], class_token=class_token, **sizes).eval()
        model.set_token_thresholds((0.0, 0.0))
        cases.append((*case, class_token))
        dynamic.append(model)
for model in dynamic:
    for layer in model.layers:
        torch.nn.init.normal_(layer.mixer.block_head.weight, std=3)
        torch.nn.init.zeros_(layer.mixer.block_head.bias)
contrast = torch.linspace(0.1, 4, 23)[:, None, None, None]
given = {size: torch.randn(23, 3, size, size) * contrast for size in (32, 224)}
rows, weight = torch.randn(1400, 192), torch.randn(768, 192)
with torch.no_grad():
    for threads in 1, 2:
        torch.set_num_threads(threads)
        product = linear(rows, weight)
        for count in 1, 2, 5, 11, 31, 33, 67, 197, 257, 1379:
            assert torch.equal(linear(rows[:count], weight), product[:count]), (threads, count)
        routed = set()
        for case, model in zip(cases, dynamic, strict=True):
            images = given[case[1]]
            whole = model(images)
            routed |= set(whole.gates.flatten().tolist())
            counts = torch.stack(whole.counts, dim=1)
            assert model.reduction.thresholds == () or len(counts.unique(dim=0)) > 3, counts
            for part in slice(0, 1), slice(0, 3), slice(5, 12), slice(3, 22), slice(22, 23):
                found = model(images[part])
                for key in "logits", "tokens", "origin":
                    one, same = getattr(found, key), getattr(whole, key)[part]
                    if key != "logits":  # those behind the tokens of the longest image
                        same = same[:, : one.shape[1]]
                    if key == "tokens":
                        one, same = one * found.alive[..., None], same * found.alive[..., None]
                    assert torch.equal(one, same), (threads, case, part, key)
                assert torch.equal(found.gates, whole.gates[:, part]), (threads, case, part)
        assert routed == {0.0, 1.0}  # or the decisions show nothing
"""


@pytest.mark.parametrize("caps", CAPS, ids=lambda caps: ",".join(caps.values()) or "none")
def test_an_image_does_not_depend_on_its_batch(caps):
    child = subprocess.run(
        [sys.executable, "-c", CHECK],
        cwd=ROOT,
        env=clean_environment(**caps),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert child.returncode == 0, child.stderr
