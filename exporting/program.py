"""A model's evaluation as a program of PyTorch's own operators, by `torch.export`.

B images, C classes.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from models import VisionMamba
from ops import rms_norm, selective_scan
from ops.selective_scan import native
from utils.errors import UserError, first_line

INPUT, OUTPUT = "images", "logits"
TRACED = 2  # images of the batch that is traced: a batch of one would stay one
LARGEST_BATCH = 1 << 16


class Answer(nn.Module):
    """images -> logits alone."""

    def __init__(self, model: VisionMamba, checked: bool):
        super().__init__()
        self.model, self.checked = model, checked

    def forward(self, images: Tensor) -> Tensor:
        if self.checked:
            images = native.receive(images)
        return self.model(images).logits


def example_images(model: VisionMamba, count: int) -> Tensor:
    """Noise [B, 3, H, W], of clips [B, 3, T, H, W], in the size of a model; always the same."""
    frames = () if model.num_frames is None else (model.num_frames,)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *frames, *model.patch_embed.img_size, generator=generator)


@torch.no_grad()
def trace(model: VisionMamba, scan: str = "portable") -> ExportedProgram:
    """A model on the CPU, in evaluation mode -> a program for batches of any size.

    Top-k and gathering stay, so that dropped tokens are gone; a scan that no image of a batch
    wants is not run. The model's weights take no gradient from then on.

    scan: what the program has of it, see `ops.selective_scan.traced_with`. A "native" program
        refuses images of other sizes than the model's by itself; AOTInductor would not.
    """
    model.requires_grad_(False)
    images = example_images(model, TRACED)
    batch = Dim("batch", min=1, max=LARGEST_BATCH)
    with warnings.catch_warnings(), selective_scan.traced_with(scan):
        warnings.simplefilter("ignore")
        try:
            answer = Answer(model, checked=scan == "native").eval()
            return export(answer, (images,), dynamic_shapes=({0: batch},))
        except (RuntimeError, torch._dynamo.exc.UserError) as error:
            raise UserError(f"PyTorch cannot export this model: {first_line(error)}") from None


def _sort_by_topk(
    x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return x.topk(x.shape[dim], dim, largest=descending)


def _argsort_by_topk(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    return _sort_by_topk(x, stable=stable, dim=dim, descending=descending)[1]


# ONNX knows no stable sort; of equal values its TopK takes those in front first.
FOR_ONNX = {
    torch.ops.aten.sort.stable: _sort_by_topk,
    torch.ops.aten.argsort.stable: _argsort_by_topk,
}


def decompose(program: ExportedProgram, onnx: bool) -> ExportedProgram:
    """The program without this project's operators, or what ONNX lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return program.run_decompositions(rms_norm.DECOMPOSITIONS | (FOR_ONNX if onnx else {}))
