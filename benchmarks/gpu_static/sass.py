"""Machine code (SASS): instructions with what ptxas tells the hardware about each, and loops.

From Volta on, 23 bits of every instruction say how long to wait before the next one (stall), which
of a warp's six scoreboards it raises until its result is there (`written`) or its operands are read
(`read`), and for which it waits.
"""

import re
from pathlib import Path
from typing import NamedTuple

from .compiling import tool

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x([0-9a-f]{16}) \*/")
_SECOND_WORD = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_TARGET = re.compile(r"\((\.L_x_\d+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
NO_SCOREBOARD = 7
SHORTEST_LOOP = 4  # a branch to itself is where a kernel's code is padded


class Instruction(NamedTuple):
    text: str
    stall: int = 1
    written: int = NO_SCOREBOARD
    read: int = NO_SCOREBOARD
    waits: int = 0  # a bit for each scoreboard

    @property
    def opcode(self) -> str:
        """With its modifiers, without predicate and operands."""
        return _PREDICATE.sub("", self.text).split()[0]

    @property
    def base(self) -> str | None:
        """The register that holds the address of a load or store."""
        found = re.search(r"\[(R\d+)", self.text)
        return found.group(1) if found else None


class Program(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]  # which instruction each stands before

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) instruction of every loop: from a branch back to where it goes. Several
        branches to one place are one loop.
        """
        ends: dict[int, int] = {}
        for last, instruction in enumerate(self.instructions):
            if not instruction.opcode.startswith("BRA"):
                continue
            target = _TARGET.search(instruction.text)
            first = self.labels.get(target.group(1), last) if target else last
            if last - first >= SHORTEST_LOOP:
                ends[first] = last
        return sorted(ends.items())


def read(cubin: Path) -> Program:
    return parse(tool("nvdisasm", "-hex", "-c", cubin))


def parse(text: str) -> Program:
    """nvdisasm's output with `-hex`: two words of 64 bits for each instruction."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(found.group(2).strip()))
        elif (word := _SECOND_WORD.match(line)) and instructions:
            control = int(word.group(1), 16) >> 41
            instructions[-1] = instructions[-1]._replace(
                stall=control & 15,
                written=control >> 5 & 7,
                read=control >> 8 & 7,
                waits=control >> 11 & 63,
            )
    return Program(instructions, labels)


def innermost(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that contain no other."""
    return [
        (first, last)
        for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]
