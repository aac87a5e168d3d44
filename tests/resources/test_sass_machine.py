"""The machine that executes SASS, on programs written by hand: loops, lanes that part, waits, and what it refuses."""

import pytest
import torch
from cubin import Instruction
from emulate import Launch
from sass.machine import LATENCIES, Program

SCOREBOARD = 7 << 5 | 7 << 8  # control bits that set none


def program(*lines):
    """Lines are "guard | text | control" with the last two as in Instruction; labels are addresses."""
    found = []
    for line in lines:
        text, _, control = line.partition(" ; ")
        guard, at, rest = text.partition(" @ ")
        found.append(Instruction(guard if at else "", rest if at else text, int(control or 0) or SCOREBOARD | 1, 0, ()))
    return Program(found)


def run(code, *tensors, threads=32, parameters=b"", **options):
    return code.run(Launch("", parameters, 1, threads, 1, 1024), tensors, **options)


def address(t):
    return t.data_ptr().to_bytes(8, "little")


def test_a_loop_is_counted_as_often_as_it_runs():
    code = program(
        "MOV R0, RZ",
        "IADD3 R0, R0, 0x1, RZ",
        "ISETP.GE.AND P0, PT, R0, 0x5, PT",
        "!P0 @ BRA @0x10",
        "EXIT",
    )
    assert run(code).counts[:, 0].tolist() == [1, 5, 5, 5, 1]


def test_lanes_that_part_issue_both_sides_and_meet_again():
    code = program(
        "S2R R0, SR_TID.X",
        "ISETP.GE.AND P0, PT, R0, 0xc, PT",
        "BSSY B0, @0x60",
        "P0 @ BRA @0x50",
        "IADD3 R0, R0, 0x64, RZ",
        "BSYNC B0",
        "LDC.64 R2, c[0x0][0x210]",
        "IMAD.WIDE.U32 R4, R0, 0x0, R2",
        "S2R R6, SR_TID.X",
        "IMAD.WIDE.U32 R4, R6, 0x4, R4",
        "STG.E desc[UR4][R4.64], R0",
        "EXIT",
    )
    out = torch.zeros(32, dtype=torch.int32)
    counts = run(code, out, parameters=address(out)).counts
    assert out.tolist() == [i + 100 if i < 12 else i for i in range(32)]
    assert counts[4:7, :2].tolist() == [[1, 12], [2, 32], [1, 32]]  # issued, lanes
    assert counts[10].tolist() == [1, 32, 0, 4, 0, 128, 0]


def test_lanes_of_a_branch_add_up_what_they_add_to_memory():
    """As the compiler does for an atomic addition of the same number by several lanes."""
    code = program(
        "S2R R0, SR_TID.X",
        "LDC.64 R2, c[0x0][0x210]",
        "IMAD.WIDE.U32 R4, R0, 0x10, R2",
        "LDC.64 R8, c[0x0][0x218]",
        "ISETP.LT.AND P2, PT, R0, 0x3, PT",
        "BSSY B0, @0x110",
        "P2 @ BRA @0x110",
        "VOTEU.ANY UR6, UPT, PT",
        "FLO.U32 R14, UR6",
        "POPC R15, UR6",
        "S2R R16, SR_LTMASK",
        "ISETP.EQ.U32.AND P0, PT, R14, R0, PT",
        "P0 @ ATOMG.E.ADD.STRONG.GPU PT, R15, desc[UR4][R8.64], R15",
        "STG.E desc[UR4][R4.64], R14",
        "STG.E desc[UR4][R4.64+0x4], R15",
        "STG.E desc[UR4][R4.64+0x8], R16",
        "LDG.E R17, desc[UR4][R8.64]",
        "BSYNC B0",
        "EXIT",
    )
    out, counter = torch.full((32, 4), -1, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    run(code, out, counter, parameters=address(out) + address(counter))
    assert counter.item() == 5 + 29
    assert out[:3].eq(-1).all() and out[3:, 0].eq(31).all()
    assert out[3:31, 1].eq(29).all() and out[31, 1] == 5
    assert out[3:, 2].tolist() == [(1 << lane) - 1 for lane in range(3, 32)]


def test_lanes_of_different_values_take_turns_in_a_uniform_register():
    """As the compiler does where lanes give an instruction an address that all of a warp must share."""
    code = program(
        "S2R R0, SR_TID.X",
        "LDC.64 R2, c[0x0][0x210]",
        "IMAD.WIDE.U32 R4, R0, 0x4, R2",
        "SHF.R.U32.HI R6, RZ, 0x3, R0",
        "MOV R7, RZ",
        "PLOP3.LUT P3, PT, PT, PT, PT, 0x80, 0x0",
        "P3 @ R2UR P0, UR7, R6",
        "P3 @ PLOP3.LUT P3, PT, P0, PT, PT, 0x80, 0x0",
        "IADD3 R7, R7, 0x1, RZ",
        "P3 @ BRA.U.ANY @0x60",
        "IMAD.U32 R8, RZ, RZ, UR7",
        "IMAD R7, R8, 0x10, R7",
        "STG.E desc[UR4][R4.64], R7",
        "EXIT",
    )
    out = torch.full((32,), -1, dtype=torch.int32)
    run(code, out, parameters=address(out))
    assert out.tolist() == [3 * 16 + 4] * 32


def test_a_barrier_waits_for_all_warps_and_an_exited_warp_is_not_waited_for():
    code = program(
        "S2R R0, SR_TID.X",
        "ISETP.GE.AND P0, PT, R0, 0x40, PT",
        "P0 @ EXIT",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "EXIT",
    )
    assert run(code, threads=128).counts[:, 0].tolist() == [4, 4, 4, 2, 2]


def test_time_is_that_of_the_longest_chain():
    """A load of cold memory, then one of shared memory whose address it gave; each sets a scoreboard for the next."""
    sets = lambda n, waits=0: (n << 5 | 7 << 8 | waits << 11) + 1  # noqa: E731
    out = torch.full((32,), 0x400, dtype=torch.int32)
    code = program(
        f"LDC.64 R2, c[0x0][0x210] ; {sets(0)}",
        f"LDG.E R4, desc[UR4][R2.64] ; {sets(1, 1)}",
        f"LDS R5, [R4] ; {sets(2, 2)}",
        f"IADD3 R5, R5, 0x1, RZ ; {sets(7, 4)}",
        "EXIT",
    )
    found = run(code, out, parameters=address(out), cold=[out])
    assert [link.wait for link in found.path] == ["constant", "global memory", "shared memory"]
    assert found.cycles == sum(LATENCIES[x] for x in ("constant", "dram", "shared")) + 2


def test_shared_memory_serves_one_wavefront_a_cycle():
    """Lanes 32 bytes apart are 8 to a bank: the second load begins when the first has been served."""
    sets = lambda n, waits=0: (n << 5 | 7 << 8 | waits << 11) + 1  # noqa: E731
    code = program(
        f"S2R R0, SR_TID.X ; {sets(0)}",
        f"SHF.L.U32 R1, R0, 0x5, RZ ; {sets(7, 1)}",
        f"LDS R4, [R1+0x400] ; {sets(1)}",
        f"LDS R5, [R1+0x400] ; {sets(2)}",
        f"IADD3 R5, R5, R4, RZ ; {sets(7, 6)}",
        "EXIT",
    )
    found = run(code)
    assert found.counts[2:4, 2].tolist() == [8, 8]
    begins = LATENCIES["special"] + 1  # of the first load
    assert found.cycles == begins + 8 + 7 * LATENCIES["wavefront"] + LATENCIES["shared"] + 2


@pytest.mark.parametrize(
    "lines, error",
    [
        (["TEX R0, R1"], "TEX R0, R1: has no meaning"),
        (["MOV R0, RZ", "MOV R1, RZ", "LDG.E R4, desc[UR4][R0.64]"], "outside global memory"),
        (["MOV R0, 0x800", "LDS R4, [R0]"], "outside shared memory"),
        (["S2R R0, SR_LANEID", "ISETP.GE.AND P0, PT, R0, 0x1, PT", "P0 @ BRA @0x50", "WARPSYNC.ALL", "EXIT",
          "BAR.SYNC.DEFER_BLOCKING 0x0", "EXIT"], "deadlock"),
    ],
)  # fmt: skip
def test_what_it_refuses(lines, error):
    with pytest.raises(RuntimeError, match=error):
        run(program(*lines))
