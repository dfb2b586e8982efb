"""The tuning sweep in small sizes: every knob turns what it names, and nothing wins that computes something else."""

import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from benchmark_scripts import load_script
from deepfuse.ir.cost import Cost
from deepfuse.ops import fp8_matmul_triton
from deepfuse.profiling.timing import Timing
from small_cases import ON_DEVICE, SMALL, new_bench, without_clock

pytestmark = ON_DEVICE
tuning = load_script("gpu_tuning")
cases, knobs = sys.modules["cases"], sys.modules["knobs"]


@pytest.mark.parametrize("kernel", knobs.KNOBS)
def test_every_knob_turns(kernel, monkeypatch, capsys):
    # the interpreter takes any configuration that the shapes allow: two of each are enough
    few = tuple(replace(knob, values=knob.values[:: max(len(knob.values) - 1, 1)]) for knob in knobs.KNOBS[kernel])
    if kernel == "fp8_matmul.triton":
        few = (replace(few[0], values=((64, 16, 4, 3), (64, 64, 4, 3))), few[1])
    monkeypatch.setattr(tuning, "KNOBS", {kernel: few})
    monkeypatch.setattr(tuning, "refused", lambda names, device: {})
    without_clock(monkeypatch, tuning)
    bench = new_bench()
    tuning.suite(bench, SMALL, 5)
    assert bench.results.left_out == {}
    tried = [text for row in bench.results.rows for text in row.facts["tried"]]
    # Gluon's kernels run on a GPU alone
    assert all(any(knob.name in text for text in tried) for knob in few) or kernel.endswith(".gluon")
    assert all(isinstance(us, float) for row in bench.results.rows for us in row.facts["tried"].values())
    assert "configurations" in capsys.readouterr().out


def test_a_knob_is_what_launch_code_calls_and_only_within():
    given = fp8_matmul_triton._tile
    with knobs.Knob("fp8_matmul_triton", "_tile", ()).set((64, 16, 4, 3)):
        assert fp8_matmul_triton._tile(1, 2) == (64, 16, 4, 3)
    assert fp8_matmul_triton._tile is given


def test_a_kernel_is_launched_with_other_options():
    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: (grid, args, options)

    launched = knobs._Launched(Kernel(), {"num_warps": 8})
    assert launched[3,](1, num_warps=4, K=2) == ((3,), (1,), {"num_warps": 8, "K": 2})


class Toy:
    """A kernel of one knob: what a value takes, and what it computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Mapping[int, float], results: Mapping[int, float]):
        self.seconds, self.results = seconds, results
        monkeypatch.setattr(fp8_matmul_triton, "_splits", lambda *args: 0)
        monkeypatch.setattr(tuning, "device_timing", self.time)
        monkeypatch.setattr(
            tuning, "KNOBS", {"toy.triton": (knobs.Knob("fp8_matmul_triton", "_splits", tuple(sorted(results))),)}
        )

    def call(self) -> torch.Tensor:
        value = fp8_matmul_triton._splits(0, 0)
        if value not in self.results:
            raise RuntimeError("out of resources")
        return torch.tensor([3.0, self.results[value]])

    def time(self, alternatives, **options):
        def seconds(fn):
            with pytest.MonkeyPatch.context() as patch:
                seen = []
                patch.setattr(self, "call", lambda: seen.append(fp8_matmul_triton._splits(0, 0)))
                fn()
            return self.seconds[seen[0]]

        return {name: Timing(*[seconds(fn)] * 3) for name, fn in alternatives.items()}

    def case(self):
        facts = {"M": 1}
        work = cases.Work(
            alternatives={"triton": lambda: self.call()}, cost=Cost(1, 1), dtype=torch.bfloat16, facts=facts
        )
        return cases.Case("toy 1", lambda: work)


def test_the_fastest_that_is_right_wins(monkeypatch):
    toy = Toy(monkeypatch, {0: 5e-6, 1: 4e-6, 2: 3e-6, 3: 1e-6}, {0: 4.0, 1: 4.0, 2: 4.0, 3: 4.5})
    bench = new_bench()
    tuning._tune(bench, "toy.triton", toy.case(), 5)
    (row,) = bench.results.rows
    assert row.figures == {"ours": (5.0,) * 3, "winner": (3.0,) * 3}
    assert row.facts["winner"] == "_splits 2"
    assert row.facts["tried"] == {
        "_splits 0": 5.0,
        "_splits 1": 4.0,
        "_splits 2": 3.0,
        "_splits 3": "other results, by 0.1 of their norm",
    }
    assert tuning.winners(bench.results).row_count == 1


def test_ours_wins_where_nothing_is_faster(monkeypatch):
    toy = Toy(monkeypatch, {0: 2e-6, 1: 4e-6}, {0: 4.0, 1: 4.0})
    bench = new_bench()
    tuning._tune(bench, "toy.triton", toy.case(), 5)
    assert bench.results.rows[0].facts["winner"] == "ours"
