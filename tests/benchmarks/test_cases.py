"""Cases of a benchmark: what is said of each, and that one's failure leaves the others be."""

import sys

import pytest
import torch

from benchmark_scripts import load_script
from deepfuse.ir.cost import Cost
from deepfuse.ir.device import CPU as CPU_ROW
from deepfuse.profiling.device_timing import DeviceLost
from deepfuse.profiling.timing import Timing
from small_cases import DEVICE, new_bench, without_clock

CPU = torch.device("cpu")
load_script("gpu")
cases = sys.modules["cases"]


def case(name, **alternatives):
    return cases.Case(
        name, lambda: cases.Work(alternatives=alternatives, cost=Cost(2000, 400), dtype=torch.bfloat16, facts={"M": 3})
    )


def raises():
    raise RuntimeError("out of resources: shared memory\nand more")


def test_a_row_says_what_it_is_of_the_limits():
    work = case("a", fast=lambda: None, slow=lambda: None).make()
    limits = type(CPU_ROW)(
        name="",
        flops={torch.bfloat16: 1e9, torch.float32: 1e8},
        memory_bandwidth=1e9,
        memory_bytes=1,
        launch_seconds=0.0,
    )
    found = cases.facts(work, {"fast": Timing(4e-6, 0, 0), "slow": Timing(8e-6, 0, 0)}, limits)
    # 2000 operations at 1e9 a second take 2 us, 400 bytes 0.4
    assert found == {
        "M": 3,
        "flops": 2000,
        "bytes": 400,
        "ceiling": {"GB/s": 1.0, "TFLOP/s": 0.001},
        "limit": "arithmetic",
        "GB/s": {"fast": 0.1, "slow": 0.05},
        "TFLOP/s": {"fast": 0.0005, "slow": 0.00025},
        "share of limit": {"fast": 0.5, "slow": 0.25},
    }


def test_ceilings_are_rows_of_what_was_measured():
    bench = new_bench(CPU)
    ceilings = cases.Ceilings(CPU)
    found = ceilings.limits
    cases.run_parts(bench, [ceilings.part()])
    products, memory = bench.results.rows
    # the others of a CPU's row are nominal
    assert list(products.figures) == ["float32", "bfloat16"] and products.better == memory.better == "higher"
    assert products.figures["float32"][0] == pytest.approx(found.flops[torch.float32] / 1e12, rel=1e-3)
    assert memory.figures["read"][0] == pytest.approx(found.memory_bandwidth / 1e9, rel=1e-3)


def test_one_that_raises_is_kept_with_its_error_and_the_others_go_on(monkeypatch):
    without_clock(monkeypatch, cases)
    bench = new_bench(CPU)
    made = [
        case("a", ours=lambda: 1, theirs=raises),
        cases.Case("b", raises),
        case("c", ours=raises),
        case("d", ours=int),
    ]
    cases.measure(bench, made, CPU_ROW)
    assert {row.name: list(row.figures) for row in bench.results.rows} == {"a": ["ours"], "d": ["ours"]}
    error = "RuntimeError: out of resources: shared memory"
    assert bench.results.left_out == {"a: theirs": error, "b": error, "c: ours": error}
    # what comes through the next time is no longer left out
    again = new_bench(CPU)
    again.results = bench.results
    cases.measure(again, [case("a", ours=int, theirs=int)], CPU_ROW)
    assert "a: theirs" not in again.results.left_out and "b" in again.results.left_out


def test_a_part_that_raises_is_kept_with_its_error_and_the_others_go_on():
    bench = new_bench(CPU)
    cases.run_parts(bench, [("a", 1, lambda _: raises()), ("b", 1, lambda bench: bench.row("row", {"x": 1.0}))])
    assert bench.results.left_out == {"a": "RuntimeError: out of resources: shared memory"}
    assert [row.part for row in bench.results.rows] == ["b"]


def test_nothing_is_run_on_a_device_that_is_lost():
    def lost(bench):
        raise DeviceLost("it hangs")

    bench = new_bench(CPU, only="")
    cases.run_parts(bench, [("a", 1, lost), ("b", 1, lambda bench: bench.row("row", {"x": 1.0}))])
    assert bench.results.rows == ()
    assert bench.results.left_out == {"a": "DeviceLost: it hangs", "b": "the device was lost in a"}


def test_a_device_lost_in_a_case_ends_the_part(monkeypatch):
    monkeypatch.setattr(cases, "first_error", lambda fn, device: (_ for _ in ()).throw(DeviceLost("it hangs")))
    bench = new_bench(CPU)
    cases.run_parts(bench, [("a", 1, lambda bench: cases.measure(bench, [case("x"), case("y")], CPU_ROW))])
    assert bench.results.left_out == {"a": "DeviceLost: it hangs"}


def test_no_case_begins_beyond_the_budget():
    bench = new_bench(CPU, budget=cases.SPARE_SECONDS / 2)
    cases.measure(bench, [cases.Case("a", raises)], CPU_ROW)
    assert bench.results.left_out == {"a": "the budget is spent"}


def test_a_case_that_takes_long_has_few_rounds():
    import time

    assert cases._rounds({"a": lambda: time.sleep(0.03)}, 20, CPU) in range(5, 18)
    assert cases._rounds({"a": int}, 20, CPU) == 20


@pytest.mark.parametrize("name", ["route.reference", "rms_norm.none"])
def test_the_canary_wants_a_provider(name):
    with pytest.raises(ValueError, match=f"canary: want a provider that takes a sample on cpu, got {name}"):
        sys.modules["canary"].check(name, CPU)


def test_the_canary_sees_wrong_results(monkeypatch):
    canary = sys.modules["canary"]
    canary.check("fp8_matmul.triton", DEVICE)
    monkeypatch.setattr(canary, "providers", lambda op, args, device: {"triton": lambda: op.reference(*args) * 2})
    with pytest.raises(ValueError, match=r"want fp8_matmul.triton to give the reference's results, got others by"):
        canary.check("fp8_matmul.triton", DEVICE)


def test_the_canary_is_a_process_of_its_own():
    canary = sys.modules["canary"]
    assert canary.refused(["fp8_matmul.none"], CPU)["fp8_matmul.none"].startswith("its samples ended with status 1: ")
    slow = canary.refused(["fp8_matmul.triton"], CPU, seconds=0.01)
    assert slow == {"fp8_matmul.triton": "its samples took more than 0 s"}
