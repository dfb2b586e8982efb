"""What ops should take beside what they took, on a device of round numbers."""

import pytest
import torch

from deepfuse.ir.device import CPU
from deepfuse.passes.sites import Site
from deepfuse.profiling.roofline import limits_of, roofline, roofline_table
from deepfuse.profiling.run import Run
from deepfuse.profiling.size_expression import evaluated
from deepfuse.profiling.timeline import Part, Span, Step

LIMITS = {"bytes": 1e9, "float32": 1e9, "bfloat16": 4e9}
"""A byte and an operation a nanosecond."""


def site(number, op, flops=None, size=None, dtype="float32"):
    return Site(number, f"layers.0.{op}", op, dtype, flops, size)


LINEAR, AGAIN = site(0, "linear", "2000*u0", "1000"), site(1, "linear", "2000*u0", "1000")
NORM, ADD = site(2, "rms_norm", "100", "3000*u0"), site(3, "add", "100", "2000")
HALF, COPY = site(4, "matmul", "8000", "1000", "bfloat16"), site(5, "copy")


def run(own, us, sizes=({"u0": 1},), limits=LIMITS):
    """Parts of one kernel with these own sites, which took so many microseconds in each step."""
    made = Run(model="m", dtype="float32", device="cpu", threads=1, torch="2", date="2026-01-01", limits=limits)
    made.parts["decode_1"] = [[Part("cpp_fused_0", tuple(sites), ()) for sites in own]]
    for of_step in sizes:
        spans, now = [], 0
        for part, time in enumerate(us):
            spans.append(Span(0, part, now, now + time * 1000))
            now += time * 1000
        made.steps.append(Step("decode_1", 0, now, 0, now, spans, of_step))
    return made


def test_the_larger_of_arithmetic_and_memory():
    rows = {row.name: row for row in roofline(run([[LINEAR], [NORM], [HALF]], [5, 4, 3]))}
    # 2000 operations in 2 us; 3000 bytes in 3 us; 8000 operations of bfloat16 in 2 us
    assert (rows["linear"].bound_us, rows["linear"].limit) == (2.0, "arithmetic")
    assert (rows["rms_norm"].bound_us, rows["rms_norm"].limit) == (3.0, "memory")
    assert (rows["matmul"].bound_us, rows["matmul"].limit) == (2.0, "arithmetic")
    assert rows["linear"].flops == 2000 and rows["rms_norm"].bytes == 3000
    assert [rows[n].lost_us for n in ("linear", "rms_norm", "matmul")] == [3.0, 1.0, 1.0]


def test_the_most_time_lost_comes_first_and_what_has_no_cost_last():
    rows = roofline(run([[COPY], [NORM], [LINEAR]], [50, 4, 5]))
    assert [row.name for row in rows] == ["linear", "rms_norm", "copy"]
    assert rows[-1].us == 50.0 and rows[-1].lost_us is None and rows[-1].limit == ""


def test_calls_of_an_op_are_added_and_parts_of_a_call_are_not():
    (row,) = roofline(run([[LINEAR], [LINEAR], [AGAIN]], [3, 1, 5]))
    assert (row.us, row.bound_us, row.flops) == (9.0, 4.0, 4000)


def test_ops_that_share_a_loop_are_one_row():
    # the norm has loops of its own and one with the addition
    rows = roofline(run([[NORM], [NORM, ADD], [LINEAR]], [3, 4, 5]))
    shared = next(row for row in rows if "+" in row.name)
    assert shared.name == "rms_norm + add" and (shared.us, shared.bound_us) == (7.0, 5.0)
    places = {row.name for row in roofline(run([[NORM], [NORM, ADD]], [3, 4]), "place")}
    assert places == {"layers.0.rms_norm.rms_norm + layers.0.add.add"}


def test_sizes_are_those_of_the_step():
    rows = roofline(run([[NORM]], [9], sizes=[{"u0": 1}, {"u0": 2}, {"u0": 3}]))
    assert rows[0].bound_us == 6.0, "the median step"
    assert roofline(run([[NORM]], [9], sizes=[{}]))[0].bound_us is None


def test_the_table():
    table = roofline_table(run([[COPY], [LINEAR]], [50, 5]))
    assert [list(column.cells) for column in table.columns][1:5] == [
        ["linear", "copy"],
        ["5.0", "50.0"],
        ["2.0", ""],
        ["3.0", ""],
    ]


def test_what_it_cannot_do():
    with pytest.raises(ValueError, match="want a run that knows its device's limits, got one without"):
        roofline(run([[NORM]], [1], limits={}))
    with pytest.raises(ValueError, match="want rows by 'op' or 'place', got 'block'"):
        roofline(run([[NORM]], [1]), "block")


def test_limits_of_a_device():
    limits = limits_of(CPU)
    assert limits["bytes"] == CPU.memory_bandwidth and limits["bfloat16"] == CPU.flops[torch.bfloat16]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("2*u0 + u1//3", 7),
        ("-u0 + 4", 1),
        ("120*(((u0**2)//Max(0, u1 - Min(1, u1))))", 360),
        ("2*Mod(u1, 2)", 0),
        ("CeilDiv(u1, u0)", 2),
        (None, None),
        ("", None),
        ("u9", None),
        ("u0//0", None),
        ("u0**1000000", None),
        ("__import__('os').getcwd()", None),
        ("Max(u0, key=u1)", None),
        ("'a' + 'b'", None),
        ("Floor(u0)", None),
    ],
)
def test_costs_are_read_and_nothing_else_is(text, value):
    assert evaluated(text, {"u0": 3, "u1": 4}) == value
