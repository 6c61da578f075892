"""Precisions that a device lacks: one clear line; benchmarks take fp16 for bf16."""

import pytest
import torch

from benchmarks import flags
from utils.errors import UsageError, UserError
from utils.precision import autocast, bf16_refusal, check_amp

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(params=[(7, 5), (8, 0)], ids=["Turing", "Ampere"])
def old(request, monkeypatch):
    """Whether the machine's GPU has no bf16; there are both."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    return request.param < (8, 0)


def test_a_gpu_without_bf16(old):
    told = (
        "bf16 needs a GPU of compute capability 8.0 or newer, and Tesla T4 has 7.5; use fp16 there"
    )
    assert bf16_refusal(CUDA) == (told if old else None)
    assert bf16_refusal(CPU) is None
    if old:
        with pytest.raises(UserError, match="compute capability 8.0"):
            autocast(CUDA, "bf16")
    for device, amp in ((CPU, "bf16"), (CUDA, "fp16"), (CUDA, "off"), ("cpu", "bf16")):
        autocast(device, amp)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_benchmarks_default(old, device):
    parser = flags.build_parser("any.py", "")
    flags.add_precision(parser)
    expected = {"cpu": "fp32", "cuda": "fp16" if old else "bf16"}[device]
    assert flags.parse(parser, ["--device", device]).precision == expected


def test_on_this_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bf16_refusal(CUDA) is None


def test_fp16_is_for_gpus():
    for device, amp in ((CUDA, "fp16"), (CUDA, "bf16"), (CPU, "bf16"), (CPU, "off")):
        check_amp(device, amp)
    with pytest.raises(UsageError, match="--amp fp16 needs a GPU; on a CPU use --amp bf16 or off"):
        check_amp(CPU, "fp16")
