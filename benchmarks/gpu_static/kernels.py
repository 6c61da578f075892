"""Figures of one kernel per warp step: one token x 32 channels x 16 states x one direction.

Which loops count is a rule, so that it holds for other kernels too: the innermost loops that
compute exponentials (MUFU.EX2); of a kernel without one the innermost loop with the most
instructions; of a kernel without a loop the whole of it, as if one block followed another.

How many steps a turn of such a loop does follows from its exponentials: a step has one for each
state, for the decay, and a few for the step size's softplus and the gate, fewer than there are
states; so it is the power of two that leaves a step as many as there are states, or less than
twice that. Beside such loops one with fewer exponentials than states computes step sizes alone, one
for each. Loops of a kind are walked equally often (directions, or the ways there and back of a
backward pass), so that a step costs

    walks * (sum over loops of their turns' cost) / (sum over loops of their turns' steps)

for each kind. The backward pass walks each step twice, to reach a group's states and back through
them, but computes its size once. Where the other loops compute step sizes on their way, one with
the states' exponentials alone takes in what earlier pieces of time left: it runs once a piece, and
does not count.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ops.rms_norm_triton import backward as norm_backward
from ops.rms_norm_triton import forward as norm_forward
from ops.selective_scan import BranchParams

from . import sass, simulator
from .compiling import Launch, Resources, caught, resources
from .sass import Instruction
from .simulator import HBM, L2

WALKS = {"scan_backward": 2}
STEPPED = ("scan_", "piece_")  # kernels with steps, by the start of their names


class Chip(NamedTuple):
    """What a compute capability says of an SM."""

    warps: int  # resident at most
    blocks: int
    shared: int  # bytes
    float_halves: int


CHIPS = {
    80: Chip(64, 32, 164 << 10, 1),
    86: Chip(48, 16, 100 << 10, 2),
    89: Chip(48, 24, 100 << 10, 2),
    90: Chip(64, 32, 228 << 10, 2),
    100: Chip(64, 32, 228 << 10, 2),
    120: Chip(48, 24, 100 << 10, 2),
}
REGISTERS = 16384  # of each scheduler
BLOCK_OVERHEAD = 1024  # bytes of shared memory that the system takes for a block


class Phase(NamedTuple):
    """One call of the host code, which may choose kernels by the number of images."""

    kind: str  # evaluation, training
    images: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.kind} {self.images}"


# What is added up on the way takes a CPU long for many tokens, and does not depend on them.
PHASES = (
    Phase("evaluation", 1, 197),
    Phase("evaluation", 32, 197),
    Phase("evaluation", 256, 33),
    Phase("training", 256, 5),
)


def launches(
    channels: int, states: int, dtype: torch.dtype, phases: Iterable[Phase] = PHASES
) -> list[tuple[Phase, Launch]]:
    """All launches of a layer; both directions, no mask."""
    from ops.selective_scan import gpu

    width, rank = channels // 2, -(-channels // 32)
    sizes = (
        (channels, 4),
        (channels,),
        (rank + 2 * states, channels),
        (channels, rank),
        (channels,),
        (channels, states),
        (channels,),
    )
    found = []
    for phase in phases:
        train = phase.kind == "training"
        rows = phase.images, phase.tokens
        forward, backward = (
            BranchParams(*(torch.zeros(size, requires_grad=train) for size in sizes))
            for _ in range(2)
        )
        xz = torch.zeros(*rows, 2 * channels, dtype=dtype, requires_grad=train)
        hidden, residual = torch.zeros(*rows, width, dtype=dtype), torch.zeros(*rows, width)
        weight = torch.ones(width)
        with caught() as calls, torch.set_grad_enabled(train):
            y = gpu.bidirectional_ssm(xz, forward, backward)
            if train:
                y.sum().backward()
            normed, total, scale = norm_forward(hidden, residual, weight, 1e-5, dtype)
            if train:
                norm_backward(normed, total, total, scale, weight, dtype)
        found += [(phase, call) for call in calls]
    return found


def resident_warps(found: Resources, warps: int, capability: int) -> int:
    """Warps that share an SM: registers are given to a warp in blocks of 256, from those of its
    scheduler.
    """
    chip = CHIPS[capability]
    each = -(-found.registers * 32 // 256) * 256
    by_registers = REGISTERS // each * simulator.SCHEDULERS // warps
    by_shared = chip.shared // (found.shared + BLOCK_OVERHEAD)
    return min(chip.warps // warps, by_registers, chip.blocks, by_shared) * warps


def counted_loops(program: sass.Program) -> list[list[Instruction]]:
    """The bodies that count; see the module's rule."""
    bodies = [program.instructions[a : b + 1] for a, b in sass.innermost(program.loops())]
    if exponential := [body for body in bodies if exponentials(body)]:
        return exponential
    if bodies:
        return [max(bodies, key=len)]
    ends = (k for k, i in enumerate(program.instructions) if i.opcode.startswith("BRA"))
    return [program.instructions[: next(ends, len(program.instructions))]]


def exponentials(body: list[Instruction]) -> int:
    return sum(i.opcode.startswith("MUFU.EX2") for i in body)


def without_entries(bodies: list[list[Instruction]], states: int) -> list[list[Instruction]]:
    """Without the loop that takes in what earlier pieces of time left; see the module's rule."""
    counts = [exponentials(body) for body in bodies]
    if not any(count > states and count % states for count in counts):
        return bodies
    return [body for body, count in zip(bodies, counts, strict=True) if count != states]


def steps_of(bodies: list[list[Instruction]], states: int) -> list[tuple[float, bool]]:
    """(steps of a turn, whether it computes step sizes alone) of each loop, see the module's rule;
    a part of a step where a warp has fewer channels.
    """
    counts = [exponentials(body) for body in bodies]
    return [
        (float(count), True)
        if count < states <= max(counts)
        else (2.0 ** math.floor(math.log2(count / states)), False)
        for count in counts
    ]


def figures(name: str, cubin: Path, warps: int, capability: int, states: int) -> dict[str, Any]:
    """Of a cubin with one kernel, made by any compiler. Kernels without steps count turns."""
    found = resources(cubin)
    bodies = without_entries(counted_loops(sass.read(cubin)), states)
    stepped = name.startswith(STEPPED) and exponentials(bodies[0]) > 0
    walks = next((n for start, n in WALKS.items() if name.startswith(start)), 1)
    steps = steps_of(bodies, states) if stepped else [(1.0, False)] * len(bodies)
    resident = resident_warps(found, warps, capability)
    halves = CHIPS[capability].float_halves

    def per_step(costs: list[float]) -> float:
        whole = 0.0
        for sizes_alone, times in ((False, walks), (True, 1)):
            kind = [k for k, (_, alone) in enumerate(steps) if alone == sizes_alone]
            if kind:
                whole += times * sum(costs[k] for k in kind) / sum(steps[k][0] for k in kind)
        return whole

    def units(name: str) -> float:
        return per_step([sum(simulator.cost(i).unit == name for i in body) for body in bodies])

    def run(memory: simulator.Memory, count: int) -> list[simulator.Result]:
        return [simulator.simulate(body, count, memory, warps, halves) for body in bodies]

    instructions = per_step([len(body) for body in bodies])
    return {
        "kernel": name,
        "capability": capability,
        "unit": "step" if stepped else "turn",
        **found._asdict(),
        "warps_of_a_block": warps,
        "warps_of_an_sm": resident,
        "loops": [
            {"instructions": len(body), "steps": step, "sizes_alone": alone}
            for body, (step, alone) in zip(bodies, steps, strict=True)
        ],
        "instructions": instructions,
        "special": units("special"),
        "memory": units("memory"),
        "barriers": units("barrier"),
        "issue_bound": instructions / simulator.SCHEDULERS,
        "sm_cycles": {
            label: per_step([result.sm for result in run(memory, resident)])
            for label, memory in (("L2", L2), ("HBM", HBM))
        },
        "alone": per_step([result.turn for result in run(L2, warps)]),
    }
