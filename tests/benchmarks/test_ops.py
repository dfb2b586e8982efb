"""The suite ``ops``: every provider of every op runs with the arguments that it makes."""

import sys

import pytest
import torch

from benchmark_scripts import load_script
from deepfuse.ir.op import OPS, Op
from deepfuse.ops import import_ops
from deepfuse.profiling.deepseek_v3_arguments import Widths, arguments_of
from small_cases import DEVICE, ON_DEVICE, new_bench, without_clock

pytestmark = ON_DEVICE
ops = load_script("ops")
cases, arguments = sys.modules["cases"], sys.modules["arguments"]
SMALL = Widths(D=128, H=2, C=128, Q=64, R=8, N=128, E=16, K=2, F=64, V=50, P=1)
import_ops()


def test_every_provider_runs(monkeypatch):
    without_clock(monkeypatch, cases)
    # compiling is PyTorch's business
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    bench = new_bench()
    cases.run_parts(bench, ops.parts(bench, SMALL, (2,)))
    assert bench.results.left_out == {}
    ran: dict[str, set[str]] = {}
    for row in bench.results.rows:
        ran.setdefault(row.name.split(",")[0], set()).update(row.figures)
    for op in OPS.values():
        here = {p.name for p in op.providers if DEVICE.type in p.priority or p.name == "triton"}
        # made for a single row, or for many
        few = {"matvec", "compare", "gather", "stream"} if DEVICE.type == "cpu" else {"gluon", "torch"}
        assert here - ran[op.name] <= few, op.name


def test_ops_have_arguments_of_their_own_size():
    row = next(iter(ops.cases(OPS["linear"], ops._calls(SMALL, (3,))["linear"], DEVICE, ops.called))).make()
    assert row.facts == {"arguments": "bfloat16[3, 128] bfloat16[128, 128] None"}
    assert row.cost == OPS["linear"].cost(*ops._calls(SMALL, (3,))["linear"][0][1])


@pytest.mark.parametrize("name", sorted(arguments_of(2, SMALL)))
def test_arguments_are_as_they_were_asked_for(name):
    for given in arguments_of(2, SMALL)[name]:
        made = arguments.real(OPS[name], given, DEVICE)
        OPS[name].check(*made)
        for ours, asked in zip(made, given, strict=True):
            if isinstance(asked, torch.Tensor):
                assert (ours.dtype, ours.shape[1:], ours.stride()) == (asked.dtype, asked.shape[1:], asked.stride())
                # a cache may have got pages
                assert len(ours) >= len(asked)
            else:
                assert ours == asked


def test_integers_of_an_unknown_name_are_refused():
    op = type("Toy", (), {"name": "toy", "reference": staticmethod(lambda x, places: None)})
    meta = torch.empty(3, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="arguments: want integers out of offsets, .*, got places of toy"):
        arguments.real(op, (meta.float(), meta), DEVICE)


def test_what_is_text_for_inductor_is_compiled_alone(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compiled.append((fn, options)) or fn)
    op: Op = OPS["linear"]
    made = arguments.real(op, ops._calls(SMALL, (1,))["linear"][0][1], DEVICE)
    assert list(ops.compiled(op, made, DEVICE)) == ["reference", "matvec"]
    assert compiled == [(p.fn, {"fullgraph": True, "dynamic": False}) for p in op.providers]
