"""Reading recorded cases of the published implementation: `$GOLDEN_DIR`, default `../shared/golden`
beside the project.

Every size comes from a case's JSON; nothing is known here about the cases at hand.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import FAMILIES, DynamicVisionMamba, VisionMamba
from models.weights import load_weights
from ops import selective_scan

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[3] / "shared" / "golden")


class Case(NamedTuple):
    info: dict[str, Any]
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names start with `prefix`, by the rest of their names."""
        return {
            key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }

    @property
    def inputs(self) -> Tensor:
        """Images [B, 3, H, W] or clips [B, 3, T, H, W]."""
        return next(
            self.tensors[f"input.{kind}"]
            for kind in ("images", "clips")
            if f"input.{kind}" in self.tensors
        )


def names(*prefixes: str) -> list[str]:
    """Cases whose file names start with one of the prefixes."""
    return sorted(path.stem for path in GOLDEN_DIR.glob("*.json") if path.stem.startswith(prefixes))


def backends() -> list:
    """Parameters for every backend; those that do not run on a CPU carry the `gpu` mark."""
    return [
        name if selective_scan.runs_on(name, "cpu") else pytest.param(name, marks=pytest.mark.gpu)
        for name in selective_scan.PREFERENCE
    ]


def use_backend(name: str, monkeypatch) -> str:
    """Force a backend for this test; -> the device to run on. Skips where there is none."""
    monkeypatch.setenv("DYVM_BACKEND", name)
    if selective_scan.runs_on(name, "cpu"):
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip(f"{name}: needs a CUDA GPU")
    if not selective_scan.runs_on(name, "cuda"):
        pytest.skip(f"{name}: not available here")
    monkeypatch.setattr(
        torch.backends.cudnn, "allow_tf32", False
    )  # float32 means float32 in the patch embedding too
    return "cuda"


def load(name: str, device: str = "cpu") -> Case:
    tensors = GOLDEN_DIR / f"{name}.safetensors"
    info = json.loads((GOLDEN_DIR / f"{name}.json").read_text())
    return Case(info, load_file(tensors, device=device) if tensors.exists() else {})


def subcases(case: Case):
    """(description, tensors) of each subcase."""
    return [
        (info, case.group(f"{info.get('name', f'case{i}')}."))
        for i, info in enumerate(case.info["subcases"])
    ]


def build(info: dict[str, Any], dynamic: bool) -> VisionMamba:
    """The model that a case's configuration describes, with the given number of input channels and
    classes.
    """
    config = info["config"]
    sizes = dict(
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        stride=config.get("stride"),
        in_chans=config["channels"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        d_state=config["d_state"],
        num_classes=config["num_classes"],
    )
    if "num_frames" in config:
        sizes |= dict(num_frames=config["num_frames"], tubelet_size=config["tubelet_size"])
    if "num_cls_tokens" in config:
        sizes |= dict(
            num_registers=config["num_cls_tokens"], register_reduction=config["cls_reduce"]
        )
    family = FAMILIES[info["family"]]
    if not dynamic:
        return VisionMamba(family, **sizes)
    return DynamicVisionMamba(
        family, pruning_layers=config["pruning_loc"], token_keep=config["token_ratio"], **sizes
    )


def build_loaded(case: Case, weights_key: str, dynamic: bool, device: str = "cpu") -> VisionMamba:
    """`build` with the case's weights, `override.*` tensors put in their place."""
    model = build(case.info, dynamic)
    file = case.info[weights_key]
    state = load_file(GOLDEN_DIR / file)
    if weights_key == "weights_file":
        state |= case.group("override.")
    load_weights(model, {"model": state}, file)
    return model.to(device)


def close(actual: Tensor, expected: Tensor, atol: float, rtol: float, what: str) -> None:
    torch.testing.assert_close(
        actual.detach().reshape(expected.shape),
        expected,
        atol=atol,
        rtol=rtol,
        msg=lambda text: f"{what}: {text}",
    )


def gradient_close(actual: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """Largest error within `relative` of the largest entry, plus 1e-6; an absent gradient counts as
    zero.
    """
    actual = torch.zeros_like(expected) if actual is None else actual.reshape(expected.shape)
    error, limit = (
        (actual - expected).abs().max().item(),
        relative * expected.abs().max().item() + 1e-6,
    )
    assert error <= limit, f"{what}: error {error:.3g} above {limit:.3g}"


class LayerRecorder:
    """Records by hooks what the recorded cases call mid.*: per-layer outputs, router logits,
    predictor outputs.
    """

    def __init__(self, model: VisionMamba):
        self.seen: dict[str, Tensor] = {}
        for i, layer in enumerate(model.layers):
            layer.register_forward_hook(self._record(f"hidden.layer{i}", 0))
            layer.register_forward_hook(self._record(f"residual.layer{i}", 1))
            if layer.mixer.block_head is not None:
                layer.mixer.block_head.register_forward_hook(
                    self._record(f"router_logits.layer{i}")
                )
        for s, predictor in enumerate(getattr(model, "score_predictors", ())):
            predictor.register_forward_hook(self._record(f"pred_logprob.stage{s}"))

    def _record(self, name: str, index=None):
        def hook(module, inputs, output):
            self.seen[name] = output if index is None else output[index]

        return hook

    def compare(self, case: Case, atol: float = 1e-4, rtol: float = 1e-4) -> int:
        """Compare all that was recorded on both sides; -> how many tensors."""
        expected = {key: value for key, value in case.group("mid.").items() if key in self.seen}
        for name, value in expected.items():
            close(self.seen[name], value, atol, rtol, name)
        return len(expected)
