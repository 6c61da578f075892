"""Operations per image, in two conventions that are never mixed.

`paper`: multiply-adds of convolutions and linear layers, of ONE scan direction per layer, times the
mean gate, without router heads, norms and activations, as in the release. `exact`: both directions,
each with its own gate, the router heads, and the convolution without its W - 1 padded outputs. A
fused multiply-add counts once; the scan's recurrence counts 9 E N per token in both.

l tokens of a layer (class tokens included), d width, E = 2 d, N states, R step rank, W convolution
width.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .backbone import VisionMamba
from .heads import MapHead
from .mixer import CONV_WIDTH


class Flops(NamedTuple):
    """Operations per image."""

    paper: float
    exact: float


def sequence_lengths(
    model: VisionMamba, kept: Sequence[int | Tensor] | None = None
) -> list[int | Tensor]:
    """Tokens that each layer sees at evaluation, class tokens included.

    kept: patches that each stage keeps, numbers or tensors; the model's own by default.
    """
    patches, lengths = model.num_patches, []
    kept = model.kept_counts() if kept is None else kept
    stages = dict(zip(model.pruning_layers, kept, strict=True))
    for index in range(model.depth):
        patches = stages.get(index, patches)
        lengths.append(patches + model.layout.num_tokens)
    return lengths


def _linear(module: nn.Module, tokens: int | Tensor) -> int | Tensor:
    """Multiply-adds of all linear layers inside a module, each applied to `tokens` tokens."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return tokens * sum(layer.in_features * layer.out_features for layer in layers)


def decoder_operations(model: VisionMamba) -> int:
    """Multiply-adds of one image in a head that reads maps, without its auxiliary part; else 0.

    Convolutions and linear layers; norms, pooling and resizing are not counted.
    """
    head = model.head
    if not isinstance(head, MapHead):
        return 0
    if head.operations is not None:
        return head.operations
    counted = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            positions = output.numel() // output.shape[-1]
        else:
            image = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            positions = image.shape[-2:].numel()
        counted.append(positions * module.weight.numel())

    counting = copy.deepcopy(head).to("meta").eval()
    for module in counting.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(count)
    size = 1, model.embed_dim, *model.patch_embed.grid
    counting([torch.zeros(size, device="meta") for _ in head.layers])
    head.operations = sum(counted)
    return head.operations


def _direction(model: VisionMamba, length: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """`paper` and `exact` operations of one scan direction of one layer."""
    E, N, R = 2 * model.embed_dim, model.d_state, model.layers[0].mixer.dt_proj.in_features
    projections = length * E * (R + 2 * N) + length * R * E
    scan_and_skip = 9 * length * E * N + 2 * length * E
    exact = length * E * CONV_WIDTH + projections + scan_and_skip
    return exact + (CONV_WIDTH - 1) * E * CONV_WIDTH, exact


def count_flops(model: VisionMamba, gates: float | Sequence | Tensor | None = None) -> Flops:
    """Operations of one image at evaluation.

    gates: mean gates [depth, 2] (forward, backward), one number for all, or None for 1.
    """
    gates = torch.as_tensor(1.0 if gates is None else gates, dtype=torch.float64, device="cpu")
    paper, exact = _count(model, gates.expand(model.depth, 2), model.kept_counts())
    return Flops(float(paper), float(exact))


def flops_per_image(model: VisionMamba, gates: Tensor, kept: Sequence[Tensor] = ()) -> Flops:
    """Operations of each image at evaluation, [B] float64 on the CPU.

    The mean over images equals `count_flops` at the mean gates where all keep as many tokens.

    gates: [depth, B, 2]; kept: patches [B] that each stage kept, for a model with thresholds of
    tokens; by default the fixed numbers also there.
    """
    counts: Sequence[int | Tensor] = model.kept_counts()
    if model.reduction.thresholds and kept:
        counts = [stage.double().cpu() for stage in kept]
    return Flops(*_count(model, gates.double().cpu(), counts))


def token_operations(model: VisionMamba, gates: Tensor, kept: Sequence[Tensor] = ()) -> Tensor:
    """`exact` operations of each image [B] but for a decoder, which has every patch's place to fill
    whatever is kept; arguments as of `flops_per_image`.
    """
    return flops_per_image(model, gates, kept).exact - decoder_operations(model)


def _count(
    model: VisionMamba, gates: Tensor, kept: Sequence[int | Tensor]
) -> tuple[Tensor, Tensor]:
    """`paper` and `exact` operations: gates [depth, ..., 2], kept [...] for each stage -> [...]."""
    proj = model.patch_embed.proj
    paper = model.num_patches * proj.weight.numel()
    if isinstance(model.head, MapHead):
        paper += decoder_operations(model)
    else:
        paper += _linear(model.head, 1)
    if model.family.registers and not isinstance(model.head, MapHead):
        paper += _linear(model.neck, model.layout.num_tokens)
    lengths = sequence_lengths(model, kept)
    if hasattr(model, "score_predictors"):
        for layer, predictor in zip(model.pruning_layers, model.score_predictors, strict=True):
            paper = paper + _linear(predictor, lengths[layer - 1] - model.layout.num_tokens)
    exact = paper
    entering = model.num_patches
    for leaving in kept:
        exact = exact + model.reduction.operations(entering, leaving, model)
        entering = leaving
    for layer, length, gate in zip(model.layers, lengths, gates, strict=True):
        projections = _linear(layer.mixer.in_proj, length) + _linear(layer.mixer.out_proj, length)
        one_paper, one_exact = _direction(model, length)
        paper = paper + projections + one_paper * gate.mean(-1)
        exact = exact + projections + one_exact * gate.sum(-1)
        if layer.mixer.block_head is not None:
            exact = exact + _linear(layer.mixer.block_head, 1)
    return paper, exact
