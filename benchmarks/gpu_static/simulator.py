"""An SM that runs one loop: what it takes when many warps share it, and what one warp takes alone.

Four schedulers issue one instruction a cycle each, in order within a warp, from the warp that they
issued from last or else the next one that can. A warp waits for the stall and the scoreboards that
ptxas wrote (sass.py); an instruction also waits for its unit. No cache of instructions and no
conflicts between banks are modelled, so it is rather optimistic. Latencies and rates: NVIDIA's
documents and published microbenchmarks; none was measured here.
"""

import random
import re
from collections import Counter
from typing import NamedTuple

from .sass import NO_SCOREBOARD, Instruction

SCHEDULERS = 4
BARRIER = 14  # cycles
NEAR = 35  # cycles of a load from a row that the loop's turn has touched before
SHARED_ROW = 3  # loads by one register in a turn: they read one row
QUEUES = {"special": 4, "memory": 8}  # instructions that wait for a unit without holding others up
TURNS, WARM = 12, 3  # of each warp on average: simulated, and of these left out at the start


class Memory(NamedTuple):
    """Cycles of a load from global memory: one of a kind, and the first of a shared row, which
    other blocks have read before.
    """

    single: int
    row: int


L2, HBM = Memory(270, 270), Memory(600, 300)


class Cost(NamedTuple):
    unit: str
    cycles: int  # for which it occupies the unit
    latency: int | None  # None: `Memory` says


# By the start of the opcode, first match.
_COSTS = [
    (r"MUFU|[IF]2[IF]\b|FRND", Cost("special", 8, 20)),
    (r"LDG|LD\.|LD$", Cost("memory", 1, None)),
    (r"STG|ST\.|ST$|RED|ATOM", Cost("memory", 1, 12)),
    (r"LDL|STL", Cost("memory", 1, 35)),
    (r"LDSM", Cost("memory", 1, 30)),
    (r"LDS.*\.128", Cost("memory", 2, 28)),
    (r"LDS", Cost("memory", 1, 28)),
    (r"STS.*\.128", Cost("memory", 4, 12)),
    (r"STS.*\.64", Cost("memory", 2, 12)),
    (r"STS", Cost("memory", 1, 12)),
    (r"SHFL", Cost("memory", 1, 24)),
    (r"BAR", Cost("barrier", 0, BARRIER)),
    (r"HMMA", Cost("matrix", 4, 24)),
    (r"S2R|S2UR|R2UR|VOTE|LDC", Cost("integer", 2, 24)),
    (r"F(FMA|MUL|ADD)2", Cost("float both", 2, 4)),  # two results, on both halves
    (r"FFMA|FMUL|FADD|H(FMA|MUL|ADD)2|FSWZ", Cost("float", 2, 4)),
    (r"IMAD", Cost("float first", 2, 4)),
    (r"BRA|EXIT|BSYNC|BSSY|NOP|WARPSYNC|BREAK|DEPBAR|RET|CALL|YIELD|BMOV", Cost("control", 0, 4)),
    (r"U", Cost("uniform", 2, 6)),
    (r"", Cost("integer", 2, 4)),
]


def cost(instruction: Instruction) -> Cost:
    return next(c for start, c in _COSTS if re.match(start, instruction.opcode))


def rows(body: list[Instruction]) -> list[str | None]:
    """Which row each load reads, by its register; None for other instructions and single loads."""
    loads = [i.base if cost(i).latency is None else None for i in body]
    counts = Counter(loads)
    return [base if base is not None and counts[base] >= SHARED_ROW else None for base in loads]


class Result(NamedTuple):
    turn: float  # cycles from one turn of the loop to the next, of one warp
    sm: float  # of the SM for each warp's turn: `turn` / warps


class _Units:
    """When each unit is free again."""

    def __init__(self, float_halves: int, memory: Memory):
        self.memory = memory
        self.free = [Counter() for _ in range(SCHEDULERS)]
        self.halves = [[0] * float_halves for _ in range(SCHEDULERS)]
        self.memory_pipe = 0  # of the SM
        self.rows: dict[tuple, int] = {}  # when a warp's row arrives

    def start(self, scheduler: int, c: Cost, row: tuple | None, now: int) -> tuple[bool, int]:
        """(True, latency) if an instruction starts, else (False, when to try again)."""
        free = self.free[scheduler]
        if c.unit in ("control", "barrier"):
            return True, c.latency
        if c.unit.startswith("float"):
            return self._start_float(scheduler, c, now)
        if c.unit == "memory":
            return self._start_memory(free, c, row, now)
        waiting = QUEUES.get(c.unit, 0) * c.cycles
        if free[c.unit] - now > waiting:
            return False, free[c.unit] - waiting
        begin = max(now, free[c.unit])
        free[c.unit] = begin + c.cycles
        return True, begin - now + c.latency

    def _start_float(self, scheduler: int, c: Cost, now: int) -> tuple[bool, int]:
        halves = self.halves[scheduler]
        wanted = {
            "float": [min(range(len(halves)), key=halves.__getitem__)],
            "float first": [0],
            "float both": list(range(len(halves))),
        }[c.unit]
        busy = max(halves[half] for half in wanted)
        if busy > now:
            return False, busy
        for half in wanted:
            halves[half] = now + c.cycles
        return True, c.latency

    def _start_memory(
        self, free: Counter, c: Cost, row: tuple | None, now: int
    ) -> tuple[bool, int]:
        queue = QUEUES["memory"]
        if free["memory"] - now > 2 * queue or self.memory_pipe - now > SCHEDULERS * queue:
            return False, now + 1
        begin = max(now, free["memory"], self.memory_pipe)
        free["memory"] = begin + 2
        self.memory_pipe = begin + c.cycles
        latency = c.latency
        if latency is None and row is None:
            latency = self.memory.single
        elif latency is None and row in self.rows:
            latency = max(NEAR, self.rows[row] - begin)
        elif latency is None:
            latency = self.memory.row
            self.rows[row] = begin + latency
        return True, begin - now + latency


class _Warp:
    def __init__(self, number: int, block: int, ready: int):
        self.number, self.block, self.ready = number, block, ready
        self.place = 0  # instructions issued
        self.scoreboards = [0] * 6


def simulate(
    body: list[Instruction],
    warps: int,
    memory: Memory,
    warps_per_block: int = 1,
    float_halves: int = 2,
) -> Result:
    """Runs a loop's `body` on `warps` resident warps, which start at random times and all go on to
    the end.

    float_halves: 16 float32 lanes of a scheduler each: 1 on sm_80, 2 on newer ones.
    """
    chance = random.Random(0)
    spread = memory.single + 400 if warps > 1 else 1
    starts = [chance.randrange(spread) for _ in range(-(-warps // warps_per_block))]
    all_warps = [_Warp(w, w // warps_per_block, starts[w // warps_per_block]) for w in range(warps)]
    own = [[w for w in all_warps if w.number % SCHEDULERS == s] for s in range(SCHEDULERS)]
    costs, shared = [cost(i) for i in body], rows(body)
    units = _Units(float_halves, memory)
    arrived: dict[tuple[int, int], list[_Warp]] = {}
    latest: list[_Warp | None] = [None] * SCHEDULERS
    now, ends = 0, []  # of turns
    while len(ends) < TURNS * warps:
        soonest, issued = now + 1000, False
        for scheduler, candidates in enumerate(own):
            for warp in sorted(candidates, key=lambda w: w is not latest[scheduler]):
                if warp.ready > now:
                    soonest = min(soonest, warp.ready)
                    continue
                turn, index = divmod(warp.place, len(body))
                instruction, c = body[index], costs[index]
                until = max(
                    (warp.scoreboards[b] for b in range(6) if instruction.waits >> b & 1), default=0
                )
                if until > now:
                    soonest = min(soonest, until)
                    continue
                row = None if shared[index] is None else (warp.number, turn, shared[index])
                started, value = units.start(scheduler, c, row, now)
                if not started:
                    soonest = min(soonest, value)
                    continue
                _issue(warp, instruction, c, value, now)
                if c.unit == "barrier":
                    _meet(warp, all_warps, arrived, warps_per_block, now)
                latest[scheduler], issued = warp, True
                if warp.place % len(body) == 0:
                    ends.append(now)
                break
        now = now + 1 if issued else max(now + 1, soonest)
    sm = (ends[-1] - ends[WARM * warps - 1]) / (len(ends) - WARM * warps)
    return Result(sm * warps, sm)


def _issue(warp: _Warp, instruction: Instruction, c: Cost, latency: int, now: int) -> None:
    boards = warp.scoreboards
    if instruction.written != NO_SCOREBOARD:
        boards[instruction.written] = max(boards[instruction.written], now + latency)
    if instruction.read != NO_SCOREBOARD:  # operands are read when the unit takes the instruction
        boards[instruction.read] = max(boards[instruction.read], now + min(latency, 14))
    warp.ready = now + max(instruction.stall, latency if c.unit == "barrier" else 1)
    warp.place += 1


def _meet(
    warp: _Warp, all_warps: list[_Warp], arrived: dict, warps_per_block: int, now: int
) -> None:
    """The warps of a block wait at a barrier for the last of them."""
    together = [w for w in all_warps if w.block == warp.block]
    if len(together) == 1:
        return
    there = arrived.setdefault((warp.block, warp.place), [])
    there.append(warp)
    release = warp.ready
    for w in there:
        w.ready = release if len(there) == len(together) else 10**12
