"""Times of whole models from figures of single kernels: what the hardware needs at least, phase by
phase, everything in a CUDA graph and nothing overlapping.

A phase takes the longest of its memory traffic, its arithmetic and its launches. The scans take
what the simulator says of them, in whole waves of blocks. DeiT has no losses here; in practice it
reaches 65 to 90 % of this.

B images, L tokens, d width, E inner channels, N states, R step rank; times in microseconds.
"""

import math
from typing import Any, NamedTuple


class Card(NamedTuple):
    capability: int
    processors: int  # SMs
    clock: float  # Hz
    bandwidth: float  # bytes a second that kernels reach
    products: float  # FLOP a second of large matrix products in bf16, as reached


# 60 % of the products that an H200 was measured to reach: these are far from square. The others
# reach the same shares of their data sheets: nine tenths of the bandwidth, half of the products.
CARDS = {
    "A100": Card(80, 108, 1.41e9, 1.8e12, 156e12),  # 80 GB
    "H100": Card(90, 132, 1.98e9, 3.0e12, 500e12),
    "H200": Card(90, 132, 1.98e9, 4.3e12, 500e12),
    "B200": Card(100, 148, 1.92e9, 7.2e12, 1125e12),
}
THIN = 0.6  # share of the products' rate that those with few columns reach
LAUNCH = {1: 2.2}  # of a kernel in a graph, by batch
LAUNCH_ELSE = 2.5
# Kernels of a layer's forward pass that only prepare routing, counted in the host code: 6 with the
# class token in one place for all images, 9 in the other three stages of four. In training there
# are 12 more, for weights.
SMALL_LAUNCHES = {"Vim-S": 0, "DyVM-S": 8}
WEIGHTS_IN_TRAINING = 12
DEPTH, WIDTH, CHANNELS, STATES, RANK, PATCH, HIDDEN = 24, 384, 768, 16, 24, 16, 3 * 16 * 16
STAGES, TOKEN_KEEP, BLOCK_KEEP = 4, 0.7, 0.8
PARAMETERS = {"Vim-S": 26e6, "DeiT-S": 22e6}
# A mamba-ssm path of Vim-S at 224 pixels on an H200, an image: counted instructions of its kernels
# at the peak rate, and its traffic. Less than it really takes.
MAMBA_SSM = {"forward": 254.0, "train": 745.0}


class Scan(NamedTuple):
    """What is known of one of a scan's kernels: `kernels.figures`, and its grid."""

    sm_cycles: dict[str, float]  # of an SM for a warp step, by where the data come from
    alone: float  # cycles of a warp step where nothing else runs
    resident: int  # warps of an SM
    warps: float  # for an image
    joined: bool = False  # it leaves the directions to a kernel that adds and gates them


Scans = list[Scan]  # the kernels of one pass, one after the other; each walks all tokens


def scan_time(scan: Scan, card: Card, batch: int, tokens: int, share: float = 1.0) -> float:
    """Both directions of all images; share: of the directions that run."""
    steps = 2 * tokens * CHANNELS / 32 / scan.warps  # of a warp
    cycles_of_step = (
        (scan.sm_cycles["L2"] + scan.sm_cycles["HBM"]) / 2 if batch >= 256 else scan.sm_cycles["L2"]
    )
    warps = max(1, round(batch * scan.warps * share))
    waves, rest = divmod(warps, card.processors * scan.resident)
    cycles = waves * steps * scan.resident * cycles_of_step
    if rest:
        cycles += steps * max(scan.alone, math.ceil(rest / card.processors) * cycles_of_step)
    return cycles / card.clock * 1e6


def product(card: Card, m: int, n: int, k: int, rate: float = 1.0, count: int = 1) -> float:
    """`count` matrix products [m, k] x [k, n] in bf16."""
    traffic = 2 * (m * k + k * n + m * n)
    return count * max(2 * m * n * k / (rate * card.products), traffic / card.bandwidth) * 1e6


def scans_time(scans: Scans, card: Card, batch: int, tokens: int, share: float = 1.0) -> float:
    return sum(scan_time(scan, card, batch, tokens, share) for scan in scans)


def layer(
    card: Card, scans: Scans, batch: int, tokens: int, launch: float, share: float
) -> dict[str, float]:
    """Phases of one layer's forward pass."""
    rows, d, E = batch * tokens, WIDTH, CHANNELS

    def moved(bytes_: float) -> float:
        return rows * bytes_ / card.bandwidth * 1e6

    return {
        "norm": max(moved(12 * d), launch),
        "in_proj, out_proj": max(
            product(card, rows, 4 * d, d) + product(card, rows, d, 2 * d), 2 * launch
        ),
        "conv": max(moved(6.6 * E), launch),
        "x_proj, dt_proj": max(
            product(card, rows, RANK + 2 * STATES, E, THIN, 2)
            + product(card, rows, E, RANK, THIN, 2),
            2 * launch,
        ),
        "scan": max(
            scans_time(scans, card, batch, tokens, share),
            moved(16 * E) * share,
            len(scans) * launch,
        ),
        "join": max(moved(12 * E), launch) if any(scan.joined for scan in scans) else 0.0,
    }


def layer_backward(
    card: Card, scans: Scans, batch: int, tokens: int, launch: float
) -> dict[str, float]:
    """Phases of one layer's backward pass, without a mask."""
    rows, d, E = batch * tokens, WIDTH, CHANNELS
    once = layer(card, scans, batch, tokens, launch, 1.0)

    def moved(bytes_: float) -> float:
        return max(rows * bytes_ / card.bandwidth * 1e6, launch)

    blocks = E // 32
    return {
        "products": 2 * once["in_proj, out_proj"] + 2 * once["x_proj, dt_proj"],
        "computed again": once["conv"] + once["x_proj, dt_proj"] / 2,
        "scan": max(scans_time(scans, card, batch, tokens), moved(28 * E)),
        "gradients of B, C": moved(2 * blocks * 2 * 2 * STATES * 2),
        "conv": moved(8 * E),
        "gate": moved(10 * E),
        "norm": moved(20 * d),
    }


def total(phases: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in phases for name in part)
    return {name: sum(part.get(name, 0.0) for part in phases) for name in names}


def launch_time(batch: int) -> float:
    return LAUNCH.get(batch, LAUNCH_ELSE)


def stem(card: Card, batch: int, patches: int, launch: float) -> float:
    rows = batch * patches
    moved = rows * WIDTH * 14 / card.bandwidth * 1e6
    return max(1.5 * product(card, rows, WIDTH, HIDDEN) + moved, 8 * launch)


def predictors(card: Card, batch: int, patches: int, launch: float) -> float:
    """The score predictors of all stages, and what they decide."""
    return 2 * stem(card, batch, patches, launch) + 60 * launch


def vim(
    card: Card, scans: Scans, batch: int, pixels: int, dynamic: bool, small: int
) -> dict[str, float]:
    """Phases of Vim-S' or DyVM-S' forward pass; small: `SMALL_LAUNCHES`."""
    patches, launch = (pixels // PATCH) ** 2, launch_time(batch)
    layers = []
    for stage in range(STAGES):
        keep = TOKEN_KEEP**stage if dynamic else 1.0
        share = BLOCK_KEEP if dynamic else 1.0
        phases = layer(card, scans, batch, int(patches * keep) + 1, launch, share)
        layers += DEPTH // STAGES * [phases | {"small kernels": small * launch}]
    first = stem(card, batch, patches, launch)
    stages = predictors(card, batch, patches, launch) if dynamic else 0.0
    return total(layers) | {"stem, stages": first + stages}


def deit(card: Card, batch: int, pixels: int) -> float:
    """DeiT-S' forward pass, compiled, 8 kernels a layer."""
    patches, launch = (pixels // PATCH) ** 2, launch_time(batch)
    tokens, d = patches + 1, WIDTH
    rows = batch * tokens
    products = (
        product(card, rows, 3 * d, d)
        + product(card, rows, d, d)
        + 2 * product(card, rows, 4 * d, d)
    )
    attention = max(
        4 * batch * d * tokens**2 / (0.55 * card.products), rows * d * 8 / card.bandwidth
    )
    elementwise = (2 * rows * d * 12 + rows * 4 * d * 4) / card.bandwidth
    one = max(products + (attention + elementwise) * 1e6, 8 * launch)
    return 12 * one + max(2 * product(card, batch * patches, d, HIDDEN), 10 * launch)


def optimizer(card: Card, model: str) -> float:
    """AdamW: three tensors of float32 read and written, the gradient read."""
    return PARAMETERS[model] * 28 / card.bandwidth * 1e6


def train(card: Card, forward: Scans, backward: Scans, batch: int, pixels: int) -> dict[str, float]:
    """Phases of a training step of Vim-S; forward: the scan that keeps states."""
    launch = launch_time(batch)
    small = SMALL_LAUNCHES["Vim-S"] + WEIGHTS_IN_TRAINING
    there = vim(card, forward, batch, pixels, False, small)
    tokens = (pixels // PATCH) ** 2 + 1
    back = total(DEPTH * [layer_backward(card, backward, batch, tokens, launch)])
    return (
        {f"forward: {name}": time for name, time in there.items()}
        | {f"backward: {name}": time for name, time in back.items()}
        | {"optimizer": optimizer(card, "Vim-S")}
    )


def dyvm_train(
    card: Card, evaluation: Scans, forward: Scans, backward: Scans, batch: int, pixels: int
) -> dict[str, float]:
    """Phases of a training step of DyVM-S: the teacher's forward pass, and a student that keeps all
    tokens, masked, and scans in both directions; evaluation: the teacher's scan. Losses are left
    out; a predictor's or router's backward pass counts as two forward ones.
    """
    launch, patches = launch_time(batch), (pixels // PATCH) ** 2
    rows = batch * (patches + 1)

    def moved(bytes_: float) -> float:
        return max(rows * bytes_ / card.bandwidth * 1e6, launch)

    # After each of the optimizer's steps the teacher makes its weights anew, too.
    teacher = vim(card, evaluation, batch, pixels, False, WEIGHTS_IN_TRAINING)
    return train(card, forward, backward, batch, pixels) | {
        "routers": 3 * DEPTH * SMALL_LAUNCHES["DyVM-S"] * launch,
        # The gradient of the class tokens that they read is one of all tokens, added to the others.
        "gradients of class tokens": DEPTH * moved(4 * 2 * 2 * CHANNELS),
        "score predictors": 3 * predictors(card, batch, patches, launch),
        "tokens moved": 2 * (STAGES - 1) * moved(26 * WIDTH),
        "teacher": sum(teacher.values()),
    }


class Kernels(NamedTuple):
    """The scan's kernels of one compute capability."""

    evaluation: dict[int, Scans]  # by batch
    forward: Scans  # of training at batch 256, keeping states
    backward: Scans


def models(kernels: dict[int, Kernels]) -> list[dict[str, Any]]:
    """[{"card", "pixels", "batch", "model", "pass", "ms", "images_per_s", "phases_ms"}].

    kernels: by compute capability; cards of others are left out, and so are training steps
    without a backward pass.
    """
    rows = []

    def add(card: str, pixels: int, batch: int, model: str, kind: str, phases: dict) -> None:
        us = sum(phases.values())
        rows.append(
            {
                "card": card,
                "pixels": pixels,
                "batch": batch,
                "model": model,
                "pass": kind,
                "ms": us / 1e3,
                "images_per_s": batch / us * 1e6,
                "phases_ms": {name: time / 1e3 for name, time in phases.items()},
            }
        )

    for name, card in CARDS.items():
        if card.capability not in kernels:
            continue
        own = kernels[card.capability]
        for pixels, batch in ((224, 1), (224, 32), (224, 256), (512, 256)):
            add(name, pixels, batch, "DeiT-S", "forward", {"all": deit(card, batch, pixels)})
            for model, dynamic in (("Vim-S", False), ("DyVM-S", True)):
                small = SMALL_LAUNCHES[model]
                phases = vim(card, own.evaluation[batch], batch, pixels, dynamic, small)
                add(name, pixels, batch, model, "forward", phases)
        if own.forward and own.backward:
            step = {"all": 3 * deit(card, 256, 224), "optimizer": optimizer(card, "DeiT-S")}
            add(name, 224, 256, "DeiT-S", "train", step)
            step = train(card, own.forward, own.backward, 256, 224)
            add(name, 224, 256, "Vim-S", "train", step)
            scans = own.evaluation[256], own.forward, own.backward
            add(name, 224, 256, "DyVM-S", "train", dyvm_train(card, *scans, 256, 224))
    return rows
