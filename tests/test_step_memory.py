"""The peak memory of a training step, counted without a GPU."""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu_static import step_memory
from ops.selective_scan import BranchParams, bidirectional_ssm

KIB = 1024
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels need numbers"
)


@pytest.fixture
def counted():
    with FakeTensorMode(), step_memory.Memory() as memory:
        yield memory


def test_what_is_let_go_no_longer_counts(counted):
    held = torch.empty(KIB)

    def call():
        first = torch.empty(2 * KIB)
        second = first + 1
        del first
        third = second.view(2, -1)[0] + held  # a view takes no memory
        return third.sum()

    assert counted.peak(call) == 16 * KIB  # first and second, then second and third
    assert counted.now == 4 * KIB


def test_what_autograd_keeps_counts(counted):
    x = torch.empty(KIB, requires_grad=True)
    y = x.exp().sigmoid()
    assert counted.now == 4 * KIB + 8 * KIB  # both results are kept for the backward pass
    y = y.detach()
    assert counted.now == 8 * KIB
    del y
    assert counted.now == 4 * KIB


def test_a_scan_keeps_what_its_backward_pass_reads(counted):
    """In bf16 xz, (step, B, C) of both directions and the sum before the gate; in float32 the
    states after every 32 tokens.
    """
    images, tokens, channels, states, rank = 4, 197, 64, 16, 2
    sizes = (
        (channels, 4), (channels,), (rank + 2 * states, channels), (channels, rank), (channels,),
        (channels, states), (channels,),
    )  # fmt: skip
    xz = torch.empty(images, tokens, 2 * channels, dtype=torch.bfloat16, requires_grad=True)
    directions = [BranchParams(*map(torch.empty, sizes)) for _ in range(2)]
    before = counted.now
    with step_memory._as_on_a_gpu():
        y = bidirectional_ssm(xz, *directions)
        projected = 2 * 2 * images * tokens * (rank + 2 * states)
        part = 2 * images * tokens * channels
        kept = 4 * 2 * images * 6 * states * channels
        result = 2 * images * tokens * channels
        assert counted.now - before == pytest.approx(projected + part + kept + result, abs=4 * 512)
        backward = counted.peak(y.sum().backward)
    # u, the raw step size and their gradients, of both directions, and the gradient of xz
    least = 4 * 2 * 2 * images * tokens * channels + 2 * images * tokens * 2 * channels
    assert least < backward < 2 * least


def test_the_steps_of_a_small_model():
    two, four, eight = (step_memory.dyvm_step(images, "vim_micro") for images in (2, 4, 8))
    ours, release = eight
    assert (ours, release) == ("DyVM", "release-like, mamba_ssm")
    assert eight[ours] < 0.6 * eight[release]
    for name in eight:  # what does not grow with the batch falls out
        assert eight[name] - four[name] == pytest.approx(2 * (four[name] - two[name]), rel=0.02)


def test_the_teacher_takes_the_whole_batch(monkeypatch):
    seen = set()

    def note(xz, *rest):
        seen.add(xz.shape[0])
        return step_memory._scan._scan(xz, *rest)

    monkeypatch.setitem(step_memory.INSIDE, step_memory._scan.operator, note)
    monkeypatch.setattr(step_memory.mixer, "GROUP_BYTES", 1)  # a few at a time on a CPU
    step_memory.dyvm_step(6, "vim_micro")
    assert seen == {6}
