"""The selective scan refuses arguments that disagree, and a forced backend that cannot take them,
by name.
"""

import pytest
import torch
from helpers.scans import params_of

from ops import selective_scan
from ops.selective_scan import BackendError, BranchParams, bidirectional_ssm, ssm_branch


@pytest.mark.parametrize(
    "change, message",
    [
        ({"xz": torch.zeros(2, 16)}, "xz must be"),
        ({"xz": torch.zeros(2, 5, 16, dtype=torch.int64)}, "xz must be"),
        ({"xz": torch.zeros(2, 5, 18)}, "2E = 16"),
        ({"xz": None}, "xz must be a floating-point tensor .* not NoneType"),
        ({"params": {"A": torch.zeros(8)}}, r"A must be a matrix, not torch.float32 \[8\]"),
        ({"params": {"conv_weight": torch.tensor(1.0)}}, "conv_weight must be a matrix"),
        (
            {"params": {"conv_bias": None}},
            "conv_bias must be a floating-point tensor, not NoneType",
        ),
        (
            {"params": {"A": torch.zeros(8, 4, dtype=torch.int64)}},
            "A must be a floating-point tensor, not torch.int64",
        ),
        (
            {"params": {"D": torch.zeros(8, dtype=torch.complex64)}},
            "D must be a floating-point tensor",
        ),
        (
            {"mask": torch.ones(2, 5, dtype=torch.complex64)},
            "mask must be a tensor of real numbers",
        ),
        ({"lengths": [3, 5]}, "lengths must be a tensor of real numbers, not list"),
        ({"mask": torch.ones(2, 4)}, r"mask must have shape \[2, 5\]"),
        ({"active": torch.ones(3, dtype=torch.bool)}, r"active must have shape \[2\]"),
        ({"lengths": torch.ones(2)}, "lengths must be integers"),
        ({"mask": torch.ones(2, 5, device="meta")}, "mask is on meta, xz on cpu"),
        ({"params": {"conv_bias": torch.zeros(9)}}, r"conv_bias must have shape \[8\]"),
        (
            {"params": {"x_proj_weight": torch.zeros(8, 8)}},
            r"x_proj_weight must have shape \[9, 8\]",
        ),
        ({"params": {"D": torch.zeros(8, device="meta")}}, "D is on meta, xz on cpu"),
    ],
)
def test_arguments_that_disagree(change, message):
    params = BranchParams(*(p.float() for p in params_of(8, 4, 1)))
    arguments = {"xz": torch.zeros(2, 5, 16), **change}
    arguments["params"] = params._replace(**change.get("params", {}))
    with pytest.raises(ValueError, match=message):
        ssm_branch(**arguments)


def test_weights_that_are_no_branch_params():
    xz, params = torch.zeros(2, 5, 16), BranchParams(*(p.float() for p in params_of(8, 4, 1)))
    for wrong in (None, tuple(params[:5])):
        with pytest.raises(ValueError, match=f"must be BranchParams, not {type(wrong).__name__}"):
            ssm_branch(xz, wrong)
        with pytest.raises(ValueError, match=f"must be BranchParams, not {type(wrong).__name__}"):
            bidirectional_ssm(xz, params, wrong)


def test_directions_that_disagree():
    xz, params = torch.zeros(2, 5, 16), BranchParams(*(p.float() for p in params_of(8, 4, 1)))
    other = BranchParams(*(p.float() for p in params_of(8, 5, 1)))
    with pytest.raises(ValueError, match="forward and .* backward"):
        bidirectional_ssm(xz, params, other)
    with pytest.raises(ValueError, match=r"gates must have shape \[2, 2\]"):
        bidirectional_ssm(xz, params, params, gates=torch.ones(2))
    with pytest.raises(ValueError, match="gates must be a tensor of real numbers, not list"):
        bidirectional_ssm(xz, params, params, gates=[[1, 1], [1, 1]])


@pytest.mark.parametrize(
    "name, dtype, width, message",
    [
        ("fpga", torch.float32, 4, "DYVM_BACKEND=fpga: no such backend"),
        ("cpu", torch.float64, 4, "DYVM_BACKEND=cpu: takes float32"),
        ("cpu", torch.float32, 3, "DYVM_BACKEND=cpu: takes a convolution of width 4"),
    ],
)
def test_forced_backend_that_cannot(monkeypatch, name, dtype, width, message):
    monkeypatch.setenv("DYVM_BACKEND", name)
    params = BranchParams(*(p.to(dtype) for p in params_of(8, 4, 1, width=width)))
    with pytest.raises(BackendError, match=message):
        ssm_branch(torch.zeros(1, 3, 16, dtype=dtype), params)


def test_unforced_choice_takes_what_fits(monkeypatch):
    monkeypatch.delenv("DYVM_BACKEND", raising=False)
    xz = torch.zeros(1, 3, 16, dtype=torch.float64)
    assert selective_scan.backend_for(xz, params_of(8, 4, 1)) == "torch"
