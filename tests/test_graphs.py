"""CUDA graphs of evaluation: when a shape is captured, what happens when that fails, and the same
results on a GPU.
"""

import logging

import pytest
import timm
import torch

import models  # noqa: F401  (registers the models)
from ops import cuda_graphs as graphs
from utils.precision import autocast

SHAPES = [(4, 3, 8, 8), (4, 3, 8, 8), (4, 3, 8, 8), (1, 3, 8, 8), (4, 3, 8, 8), (1, 3, 8, 8)]


class Replayed:
    """What `capture` returns, without a GPU."""

    current = True

    def __init__(self, call):
        self.call = call

    def __call__(self, images):
        return self.call(images)

    def is_current(self):
        return self.current


def run(forward, monkeypatch, fails: bool = False) -> list[str]:
    """What `GraphedForward` did for a sequence of shapes: "plain", "capture", "replay"."""
    done = []

    def plain(images):
        done.append("plain")
        return forward(images)

    def capture(forward, images):
        done.append("capture")
        if fails:
            raise RuntimeError(
                "operation not permitted when stream is capturing\nCUDA kernel errors might be ..."
            )
        return Replayed(lambda images: done.append("replay"))

    monkeypatch.setattr(graphs, "capture", capture)
    graphed = graphs.GraphedForward(plain)
    for shape in SHAPES:
        graphed(torch.zeros(shape))
    return done


def test_a_shape_is_captured_the_second_time_it_comes(monkeypatch):
    assert run(lambda images: None, monkeypatch) == [
        "plain",
        "capture",
        "replay",
        "replay",
        "plain",
        "replay",
        "capture",
        "replay",
    ]


def test_a_failing_capture_is_said_once_and_not_tried_again(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        assert run(lambda images: None, monkeypatch, fails=True) == [
            "plain",
            "capture",
            *["plain"] * 5,
        ]
    messages = [record.message for record in caplog.records]
    assert messages == [
        "evaluation goes on without a CUDA graph, capturing one failed: operation not permitted "
        "when stream is capturing"
    ]


def test_after_a_change_of_weights_a_shape_is_captured_anew(monkeypatch):
    done, images = [], torch.zeros(4, 3, 8, 8)

    def capture(forward, images):
        done.append("capture")
        return Replayed(lambda images: done.append("replay"))

    monkeypatch.setattr(graphs, "capture", capture)
    graphed = graphs.GraphedForward(lambda images: done.append("plain"))
    for _ in range(3):
        graphed(images)
    monkeypatch.setattr(Replayed, "current", False)
    graphed(images)
    monkeypatch.setattr(Replayed, "current", True)
    for _ in range(2):
        graphed(images)
    again = ["plain", "capture", "replay", "replay"]
    assert done == again + again


def test_errors_of_the_forward_pass_are_raised(monkeypatch):
    def wrong(images):
        raise ValueError("images are 8 x 8")

    with pytest.raises(ValueError, match="8 x 8"):
        run(wrong, monkeypatch)


def test_no_graph_on_a_cpu_or_when_not_wanted():
    def forward(images):
        return None

    assert graphs.graphed(forward, torch.device("cpu")) is forward
    assert graphs.graphed(forward, torch.device("cuda"), wanted=False) is forward
    assert isinstance(graphs.graphed(forward, torch.device("cuda")), graphs.GraphedForward)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_graph_of_a_model_that_gives_a_tensor():
    images = torch.randn(2, 3, 8, 8, device="cuda")
    double = graphs.capture(lambda images: 2 * images, images)
    assert torch.equal(double(images + 1), 2 * (images + 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("name", ["vim_micro", "dyvm_vim_micro"])
def test_a_graph_gives_what_the_forward_pass_gives(name, amp, caplog):
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(device).eval()

    def forward(images):
        with autocast(device, amp):
            return model(images)

    graphed = graphs.GraphedForward(forward)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for size in (5, 5, 5, 2, 2, 5):
            images = torch.randn(size, 3, 32, 32, device=device)
            expected, actual = forward(images), graphed(images)
            torch.testing.assert_close(actual.logits, expected.logits)
            assert torch.equal(actual.gates, expected.gates)
            assert all(map(torch.equal, actual.kept, expected.kept))
        for weight in (model.head.bias, model.layers[0].mixer.A_log):
            weight.add_(1)  # weights that change in place are seen
            for _ in range(3):
                torch.testing.assert_close(graphed(images).logits, forward(images).logits)
        model.head.bias.data.add_(1)  # no one counts that
        model.train().eval()
        for _ in range(3):
            torch.testing.assert_close(graphed(images).logits, forward(images).logits)
    assert not caplog.records and len(graphed._replays) == 2
