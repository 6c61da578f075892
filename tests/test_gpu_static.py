"""The GPU kernels read without a GPU: the model of an SM on loops with known answers, the rules by
which a kernel is read, and the command itself.
"""

import json
import os
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from benchmarks.gpu_static import bounds, compare, kernels, report, sass, simulator
from benchmarks.gpu_static.compiling import Resources
from benchmarks.gpu_static.sass import Instruction, Program
from ops import triton_support
from utils.errors import UsageError

MEMORY = simulator.Memory(single=300, row=200)
compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile"
)


def arithmetic(count: int, stall: int = 1) -> list[Instruction]:
    return [Instruction(f"FFMA R{i}, R1, R2, R{i}", stall) for i in range(count)]


@pytest.mark.parametrize("float_halves, expected", [(2, 10.0), (1, 20.0)])
def test_arithmetic_is_bound_by_issue_or_by_its_unit(float_halves, expected):
    """40 instructions on 4 schedulers: one a cycle, or one in two cycles on 16 lanes."""
    found = simulator.simulate(arithmetic(40), 16, MEMORY, float_halves=float_halves)
    assert found.sm == pytest.approx(expected, rel=0.02)
    assert found.turn == pytest.approx(16 * expected, rel=0.02)


@pytest.mark.parametrize("warps", [8, 32])
def test_special_functions_are_bound_by_their_unit(warps):
    """4 lanes a scheduler: 8 cycles for each of 10."""
    body = [Instruction(f"MUFU.EX2 R{i}, R{i}") for i in range(10)] + arithmetic(10)
    assert simulator.simulate(body, warps, MEMORY).sm == pytest.approx(20, rel=0.02)


def test_a_chain_takes_its_latencies():
    """One warp, whose every instruction waits for the one before: as ptxas says, by stalls and by
    scoreboards.
    """
    assert simulator.simulate(arithmetic(20, stall=4), 1, MEMORY).turn == 80
    load = Instruction("LDG.E R4, desc[UR4][R2.64]", written=0)
    use = Instruction("FADD R5, R4, R5", stall=4, waits=1)
    assert simulator.simulate([load, use], 1, MEMORY).turn == 300 + 4
    special = Instruction("MUFU.RCP R5, R5", written=2, waits=1 << 2)
    assert simulator.simulate(3 * [special], 1, MEMORY).turn == 3 * 20
    assert simulator.simulate([load, use], 4, MEMORY).turn == pytest.approx(304, rel=0.03)


def test_loads_from_one_row_come_with_the_first():
    loads = [Instruction(f"LDG.E R{8 + i}, [R2.64+{4 * i:#x}]", written=0) for i in range(3)]
    use = Instruction("FADD R5, R4, R5", waits=1)
    assert simulator.rows([*loads, use]) == ["R2", "R2", "R2", None]
    alone = simulator.simulate([*loads, use], 1, MEMORY).turn
    assert 200 <= alone <= 205
    assert 300 <= simulator.simulate([*loads[:2], use], 1, MEMORY).turn <= 305


def test_warps_of_a_block_meet_at_a_barrier():
    """Of five warps two share a scheduler, and take twice as long as the others would alone."""
    body = [Instruction("BAR.SYNC.DEFER_BLOCKING 0x0")]
    body += [Instruction(f"MUFU.EX2 R{i}, R{i}") for i in range(4)]
    together = simulator.simulate(body, 5, MEMORY, warps_per_block=5).turn
    apart = simulator.simulate(body, 5, MEMORY).turn
    assert together >= 2 * 4 * 8 and apart < 0.9 * together
    assert simulator.simulate(body[:1], 2, MEMORY, warps_per_block=2).turn == simulator.BARRIER


LISTING = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;              /* 0x0000000000007919 */
                                                                   /* 0x000e2200000e0000 */
.L_x_1:
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;    /* 0x0000000402047981 */
                                                                   /* 0x000ea2000c1e1900 */
        /*0020*/              @!P0 FADD R5, R4, R5 ;               /* 0x0000000504057221 */
                                                                   /* 0x004fc80000000000 */
        /*0030*/                   MUFU.EX2 R6, R5 ;               /* 0x0000000500067308 */
                                                                   /* 0x000e240000000800 */
        /*0040*/                   FFMA R7, R6, R5, R7 ;           /* 0x0000000506077223 */
                                                                   /* 0x001fca0000000007 */
        /*0050*/               @P1 BRA `(.L_x_1) ;                 /* 0xfffffffc00b01947 */
                                                                   /* 0x000fea000383ffff */
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);                  /* 0xfffffffc00fc7947 */
                                                                   /* 0x000fc0000383ffff */
"""


def test_a_listing_is_read():
    program = sass.parse(LISTING)
    assert [i.opcode for i in program.instructions] == [
        "S2R", "LDG.E", "FADD", "MUFU.EX2", "FFMA", "BRA", "BRA",
    ]  # fmt: skip
    load, add, special, use = program.instructions[1:5]
    assert (load.written, load.base) == (2, "R2") and add.waits == 1 << 2 and add.stall == 4
    assert special.written == 0 and use.waits == 1 and use.stall == 5
    assert program.loops() == [(1, 5)]  # the padding behind is none
    assert kernels.counted_loops(program) == [program.instructions[1:6]]


def test_which_loops_count():
    def loop(label, *opcodes):
        return [Instruction(f"{opcode} R1, R2") for opcode in opcodes] + [
            Instruction(f"@P0 BRA `({label})")
        ]

    plain = loop(".L_x_1", *["FADD"] * 9)
    small = loop(".L_x_2", *["MUFU.EX2"] * 4)
    outer = [*small, *loop(".L_x_3", "FADD")]
    listing = [*plain, *outer, Instruction("EXIT")]
    labels = {".L_x_1": 0, ".L_x_2": len(plain), ".L_x_3": len(plain)}
    assert kernels.counted_loops(Program(listing, labels)) == [outer]  # one place, one loop
    assert kernels.counted_loops(Program(plain, labels)) == [plain]
    straight = [Instruction("FADD R1, R2"), Instruction("EXIT")]
    assert kernels.counted_loops(Program(straight, {})) == [straight]


@pytest.mark.parametrize(
    "counts, expected",
    [
        ([17, 18], [(1, False), (1, False)]),
        ([34, 44], [(2, False), (2, False)]),
        ([72, 88], [(4, False), (4, False)]),
        ([5], [(0.25, False)]),
        ([64, 8, 83], [(4, False), (8, True), (4, False)]),
    ],
)
def test_steps_of_a_turn(counts, expected):
    assert kernels.steps_of([[Instruction("MUFU.EX2 R1, R2")] * n for n in counts], 16) == expected


def test_the_cost_of_a_step(monkeypatch, tmp_path):
    """64 instructions to reach 4 steps, 128 back through them, 40 for the sizes of 8 steps."""
    bodies = [
        [Instruction("MUFU.EX2 R1, R2")] * exponentials
        + [Instruction("FADD R1, R2, R3")] * (length - exponentials)
        for exponentials, length in ((64, 64), (80, 128), (8, 40))
    ]
    monkeypatch.setattr(kernels, "resources", lambda cubin: Resources(255, 0, 0))
    monkeypatch.setattr(kernels.sass, "read", lambda cubin: None)
    monkeypatch.setattr(kernels, "counted_loops", lambda program: bodies)
    found = kernels.figures("scan_backward", tmp_path, 1, 90, 16)
    assert found["instructions"] == 2 * (64 + 128) / 8 + 40 / 8
    assert found["special"] == 2 * (64 + 80) / 8 + 8 / 8
    assert found["warps_of_an_sm"] == 8 and found["issue_bound"] == found["instructions"] / 4


@pytest.mark.parametrize(
    "registers, warps, capability, expected",
    [(80, 1, 90, 24), (95, 1, 90, 20), (128, 1, 90, 16), (255, 1, 90, 8), (32, 4, 80, 64),
     (80, 1, 86, 16)],
)  # fmt: skip
def test_warps_of_an_sm(registers, warps, capability, expected):
    assert kernels.resident_warps(Resources(registers, 0, 0), warps, capability) == expected


def test_shared_memory_limits_the_warps():
    assert kernels.resident_warps(Resources(64, 0, 28 << 10), 1, 90) == 7


SCAN = bounds.Scan({"L2": 60.0, "HBM": 80.0}, alone=900.0, resident=20, warps=24)


def test_the_scans_time_is_that_of_whole_waves():
    card = bounds.CARDS["H100"]
    one = 2 * 197 * 900 / card.clock * 1e6
    assert bounds.scan_time(SCAN, card, 1, 197) == pytest.approx(one)
    assert bounds.scan_time(SCAN, card, 5, 197) == pytest.approx(one)  # a warp for each SM
    places = card.processors * SCAN.resident
    full = 2 * 197 * SCAN.resident * 60 / card.clock * 1e6
    batch = places // 24
    assert places == 24 * batch
    assert bounds.scan_time(SCAN, card, batch, 197) == pytest.approx(full)
    assert bounds.scan_time(SCAN, card, batch + 1, 197) == pytest.approx(full + one)
    split = SCAN._replace(warps=48)  # a program for each direction
    assert bounds.scan_time(split, card, 1, 197) == pytest.approx(one / 2)


def test_faster_kernels_make_faster_models():
    def speed(scan, model):
        rows = bounds.models({90: bounds.Kernels({b: [scan] for b in (1, 32, 256)}, [], [])})
        return next(r["images_per_s"] for r in rows if (r["model"], r["batch"]) == (model, 256))

    faster = SCAN._replace(sm_cycles={"L2": 30.0, "HBM": 40.0})
    assert speed(faster, "Vim-S") > 1.2 * speed(SCAN, "Vim-S")
    assert speed(faster, "DeiT-S") == speed(SCAN, "DeiT-S")
    assert speed(SCAN, "DyVM-S") > 1.3 * speed(SCAN, "Vim-S")


def test_a_dyvm_step_is_a_vim_step_and_its_teacher():
    rows = bounds.models({90: bounds.Kernels({b: [SCAN] for b in (1, 32, 256)}, [SCAN], [SCAN])})
    rows = [row for row in rows if (row["card"], row["pixels"]) == ("H100", 224)]
    ms = {(row["model"], row["pass"], row["batch"]): row["ms"] for row in rows}
    parts = ms["Vim-S", "train", 256] + ms["Vim-S", "forward", 256]
    assert parts < ms["DyVM-S", "train", 256] < 1.1 * parts


@compiles
def test_the_report_of_one_kernel(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(simulator, "TURNS", 5)  # for the sake of time
    output = tmp_path / "static.json"
    words = ["--architectures", "90", "--kernels", "scan_forward", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["report.py", *words])
    report.main()
    printed = capsys.readouterr().out
    assert printed.startswith("# Kernels of Vim-S in bf16: computed, not measured\n\n| kernel |")
    record = json.loads(output.read_text())
    assert record["what"] == "computed, not measured"
    assert {row["kernel"] for row in record["kernels"]} == {"scan_forward"}
    phases = {phase: warps for row in record["kernels"] for phase, warps in row["phases"].items()}
    assert phases == {"evaluation 256": 24, "training 256": 24}
    for row in record["kernels"]:
        assert 0 < row["registers"] <= 255 and row["special"] >= 17
        assert max(row["issue_bound"], 2 * row["special"]) <= 1.01 * row["sm_cycles"]["L2"]
        assert row["alone"] > row["sm_cycles"]["L2"]
    assert "models" not in record  # whole ones need the kernels for few images


@compiles
def test_few_images_are_scanned_in_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr(simulator, "TURNS", 5)  # for the sake of time
    output = tmp_path / "static.json"
    words = ["--architectures", "90", "--kernels", "piece_ends", "scan_pieces"]
    monkeypatch.setattr(sys, "argv", ["report.py", *words, "--output", str(output)])
    report.main()
    for row in json.loads(output.read_text())["kernels"]:
        # what comes in from other pieces is no step
        assert row["unit"] == "step" and {loop["steps"] for loop in row["loops"]} == {4.0}
        assert 17 <= row["special"] < 20


@compiles
def test_the_kernel_in_cuda(monkeypatch, tmp_path):
    monkeypatch.setattr(simulator, "TURNS", 5)  # for the sake of time
    output = tmp_path / "static.json"
    words = ["--architectures", "90", "--kernels", report.CUDA, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["report.py", *words])
    report.main()
    (row,) = json.loads(output.read_text())["kernels"]
    assert row["kernel"] == report.CUDA and row["phases"] == {"training 256": 48}
    assert row["stack"] == 0 and row["barriers"] == 0


def test_wrong_flags(monkeypatch):
    for words, complaint in (
        (["--architectures", "42"], "--architectures 42: known are 80, 86"),
        (["--kernels", "b"], "launches no such kernel"),
    ):
        monkeypatch.setattr(sys, "argv", ["report.py", *words])
        monkeypatch.setattr(triton_support, "interpreted", lambda: False)
        with pytest.raises(UsageError, match=complaint):
            report.main()


def test_the_tables_of_the_docs_are_those_of_the_records(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py"])
    compare.main()
    tables = capsys.readouterr().out.strip().split("\n\n")
    text = (compare.RESULTS.parents[1] / "docs/gpu.md").read_text()
    assert len(tables) == 2 and all(f"\n\n{table}\n\n" in text for table in tables)


def test_what_cannot_be_compared(monkeypatch, tmp_path):
    (tmp_path / "record.json").write_text('{"kernels": []}')
    for file in ("record.json", "missing.json"):
        monkeypatch.setattr(sys, "argv", ["compare.py", "--now", str(tmp_path / file)])
        with pytest.raises(UsageError, match=f"--now .*{file} is no record of whole models"):
            compare.main()


def test_the_record_that_the_goals_read():
    from benchmarks import goals

    record = json.loads(goals.COMPUTED.read_text())
    assert record["what"] == "computed, not measured"
    found = {(row["kernel"], row["capability"]) for row in record["kernels"]}
    names = ("scan_forward", "scan_backward", "conv_forward", "conv_backward", "gate_backward")
    assert {(name, sm) for name in names for sm in (80, 90, 100)} <= found
    computed = goals.Computed(record, "H200")
    assert all(0 < goal.compute(computed) < 10 for goal in goals.GOALS if goal.compute)
