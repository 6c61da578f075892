"""Where class and register tokens stand among the patch tokens.

A layout is a rule: given the number of patch tokens of an image, where are its class tokens? The
same rule holds at the input, after each pruning stage at evaluation (for the number of patches
kept) and in training (for the number that this image kept; its dropped tokens are behind). Slots
are a tuple of ints if all images agree, else [B, n].

B images, M patch tokens, n class or register tokens, L = M + n tokens, d width. Source: Vim (arXiv
2401.09417), VideoMamba (2403.06977), Mamba-R (2405.14858).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.operators import plain_on_cpu

ClassSlots = tuple[int, ...] | Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Rule for `num_tokens` class tokens, for a number of patches or a tensor of counts [B]."""

    num_tokens: int

    def _slot(self, index: int, patches):
        raise NotImplementedError

    def class_slots(self, patches: int | Tensor) -> ClassSlots:
        """Ascending sequence indexes of the class tokens: a tuple for an int, else [B, n]."""
        if isinstance(patches, int):
            return tuple(self._slot(i, patches) for i in range(self.num_tokens))
        if not self.num_tokens:
            return patches.new_zeros(patches.shape[0], 0)
        return torch.stack([self._slot(i, patches) for i in range(self.num_tokens)], dim=-1)


class MiddleClassToken(TokenLayout):
    """Vim: one class token at index M // 2."""

    def __init__(self):
        super().__init__(1)

    def _slot(self, index: int, patches):
        return patches // 2


class HeadClassToken(TokenLayout):
    """VideoMamba: one class token at index 0."""

    def __init__(self):
        super().__init__(1)

    def _slot(self, index: int, patches):
        return patches * 0


class NoClassToken(TokenLayout):
    """Patches only, as for dense prediction."""

    def __init__(self):
        super().__init__(0)


class SpreadRegisters(TokenLayout):
    """MambaReg: n registers spread evenly; register i at (q + 1)(i + 1) - 1, q = M // (n + 1)."""

    def _slot(self, index: int, patches):
        return (patches // (self.num_tokens + 1) + 1) * (index + 1) - 1


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Chosen tokens of each image: [B, T] or [B, T, d], index [B, S] -> [B, S] or [B, S, d]."""
    if tokens.dim() == 2:
        return tokens.gather(1, index)
    batch, count, width = tokens.shape
    # Copying whole rows of a flat table is several times faster than gathering single elements.
    rows = index + torch.arange(batch, device=index.device).unsqueeze(1) * count
    return (
        tokens.reshape(batch * count, width)
        .index_select(0, rows.flatten())
        .view(batch, index.shape[1], width)
    )


def masked_sum(tokens: Tensor, weight: Tensor) -> Tensor:
    """Sum of tokens [B, T, d] with weights [B, T, 1] -> [B, 1, d].

    At evaluation on a CPU what lies behind an image's last token of any weight changes no bit of
    its sum: how much that is depends on the images beside it, and how PyTorch adds on how much it
    is.
    """
    tokens = tokens * weight
    own = not torch.is_grad_enabled() and plain_on_cpu(tokens, weight)
    if own and not bool(weight[:, -1:].all()):
        slots = torch.arange(1, weight.shape[1] + 1, device=weight.device)
        counts = (slots * (weight[..., 0] != 0)).amax(dim=1).tolist()
        images = zip(tokens.split(1), counts, strict=True)
        return torch.cat([image[:, :count].sum(dim=1, keepdim=True) for image, count in images])
    return tokens.sum(dim=1, keepdim=True)


@dataclass
class RouterMean:
    """How the mean of masked tokens is taken, for routers of models without class token.

    DyVM's release divides by their number + 1 in training (`extra`), and sums over dropped tokens
    too, which are 0 there (`zeroed`, see `reduction.freeze`).
    """

    extra: int = 0
    zeroed: bool = False

    def __call__(self, sequence: Tensor, mask: Tensor | None) -> Tensor:
        """sequence [B, L, d], mask [B, L] with gradient -> [B, 1, d]; 0 where nothing is left."""
        if mask is None:
            return sequence.sum(dim=1, keepdim=True) / (sequence.shape[1] + self.extra)
        weight = mask.unsqueeze(-1)
        total = sequence.sum(dim=1, keepdim=True) if self.zeroed else masked_sum(sequence, weight)
        count = weight.sum(dim=1, keepdim=True) + self.extra
        return (total / count.clamp_min(1)).to(sequence.dtype)


def read(
    sequence: Tensor,
    class_slots: ClassSlots,
    mask: Tensor | None = None,
    mean: RouterMean | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """What a router reads of a sequence [B, L, d]: class tokens [B, n, d] or the mean [B, 1, d].

    Class tokens are read without touching the others; the mean is over all tokens if there are
    none, or those that `mask` [B, L] keeps, or the first `lengths` [B].
    """
    if class_count(class_slots):
        return class_tokens_of(sequence, class_slots)
    if lengths is not None:
        mask = existing(lengths, sequence)
    if mask is None and mean is None:
        return sequence.mean(dim=1, keepdim=True)
    return (mean or RouterMean())(sequence, mask)


def existing(lengths: Tensor, sequence: Tensor) -> Tensor:
    """Mask [B, L] of the tokens of sequence [B, L, d] that exist, from their numbers [B]."""
    slots = torch.arange(sequence.shape[1], device=sequence.device)
    return (slots < lengths.unsqueeze(1)).to(sequence.dtype)


def class_count(class_slots: ClassSlots) -> int:
    """Number of class tokens."""
    return class_slots.shape[-1] if isinstance(class_slots, Tensor) else len(class_slots)


def class_tokens_of(sequence: Tensor, class_slots: ClassSlots) -> Tensor:
    """The class tokens [B, n, d] of a sequence [B, L, d]; n may be 0."""
    if isinstance(class_slots, Tensor):
        return take(sequence, class_slots)
    if not class_slots:
        return sequence[:, :0]
    return torch.stack([sequence[:, slot] for slot in class_slots], dim=1)


def _joined(pieces: list[Tensor]) -> Tensor:
    """Pieces of a sequence in a row. A single one is made contiguous where it stands: compilers
    disagree about the strides of a `cat` of one.
    """
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=1)


def insert(patches: Tensor, class_tokens: Tensor, class_slots: ClassSlots) -> Tensor:
    """patches [B, M, d], class tokens [B, n, d] -> sequence [B, L, d]; also without d."""
    if isinstance(class_slots, Tensor):
        slots = torch.arange(patches.shape[1] + class_tokens.shape[1], device=patches.device)
        before = (class_slots.unsqueeze(-2) < slots.unsqueeze(-1)).sum(-1)
        is_class = (class_slots.unsqueeze(-2) == slots.unsqueeze(-1)).any(-1)
        index = torch.where(is_class, patches.shape[1] + before, slots - before)
        return take(torch.cat([patches, class_tokens], dim=1), index)
    pieces, start = [], 0
    for i, slot in enumerate(class_slots):
        pieces += [patches[:, start : slot - i], class_tokens[:, i : i + 1]]
        start = slot - i
    return _joined([*pieces, patches[:, start:]])


def extract(sequence: Tensor, class_slots: ClassSlots) -> tuple[Tensor, Tensor]:
    """Undo `insert`: sequence [B, L, d] -> patches [B, M, d], class tokens [B, n, d]."""
    if isinstance(class_slots, Tensor):
        patches = take(sequence, patch_slots(class_slots, sequence.shape[1]))
        return patches, take(sequence, class_slots)
    bounds = [-1, *class_slots, sequence.shape[1]]
    pieces = [
        sequence[:, left + 1 : right] for left, right in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return _joined(pieces), class_tokens_of(sequence, class_slots)


def reordered(
    order: Tensor, class_slots: ClassSlots, new_class_slots: ClassSlots, length: int
) -> Tensor:
    """Where each slot of a re-arranged sequence comes from.

    order [B, M]: patch slot -> where that patch stood among the patches; class tokens move from
    `class_slots` to `new_class_slots`; length: of the old sequence. -> index [B, M + n] into it,
    for `take`.
    """
    slots = torch.arange(length, device=order.device).expand(order.shape[0], -1)
    from_patches, from_class_tokens = extract(slots, class_slots)
    return insert(take(from_patches, order), from_class_tokens, new_class_slots)


def patch_slots(class_slots: Tensor, length: int) -> Tensor:
    """Sequence indexes of the patch tokens: class_slots [B, n] -> [B, length - n], ascending."""
    count = class_slots.shape[-1]
    patches = torch.arange(length - count, device=class_slots.device)
    # Class token i is before patch p if fewer than p + 1 patches are before class token i.
    patches_before = class_slots - torch.arange(count, device=class_slots.device)
    return patches + (patches_before.unsqueeze(-2) <= patches.unsqueeze(-1)).sum(-1)
