import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from deepfuse.ir import op as module
from deepfuse.ir.cost import Cost
from deepfuse.ir.op import Op, define, device_type
from deepfuse.ir.tolerance import DEFAULT_TOLERANCE, EXACT

NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPS", {})


def double(x: Tensor, by: int) -> Tensor:
    return x * 2 + by


def _check(x: Tensor, by: int) -> None:
    if by < 0:
        raise ValueError(f"double: want by >= 0, got {by}")


def _define(signature: str = "(Tensor x, int by) -> Tensor", *, name: str = "", **overrides) -> Op:
    """An op of a name that is new, since torch cannot forget one."""
    parts = {
        "reference": double,
        "check": _check,
        "fake": lambda x, by: torch.empty_like(x),
        "cost": lambda x, by: Cost(flops=2 * x.numel(), bytes=8 * x.numel()),
        "samples": lambda device, dtype: [(torch.ones(3, device=device, dtype=dtype), 1)],
    }
    return define((name or f"test_op_{next(NUMBERS)}") + signature, **parts | overrides)


def _packet(op: Op) -> torch._ops.OpOverloadPacket:
    return getattr(torch.ops.deepfuse, op.name)


def test_an_op_is_called_through_torch_and_in_the_table():
    op = _define()
    assert module.OPS == {op.name: op}
    assert op.schema == f"deepfuse::{op.name}(Tensor x, int by) -> Tensor"
    assert op(torch.ones(2), 1).tolist() == _packet(op)(torch.ones(2), 1).tolist() == [3, 3]
    torch.library.opcheck(op.overload, (torch.ones(3), 1))


def test_a_name_is_defined_once():
    name = _define().name
    with pytest.raises(ValueError, match=f"op '{name}' is already defined; was its module imported under two names"):
        _define(name=name)


def test_the_reference_has_the_parameters_of_the_schema():
    with pytest.raises(ValueError, match=r"want a reference with parameters \['x', 'scale'\], got \(x: .*by: int"):
        _define("(Tensor x, int scale) -> Tensor")


def test_a_name_that_was_refused_can_be_defined_again():
    name = f"test_op_{next(NUMBERS)}"
    with pytest.raises(ValueError, match="want a reference with parameters"):
        _define("(Tensor x, int scale) -> Tensor", name=name)
    assert name not in module.OPS
    assert _define(name=name)(torch.ones(2), 1).tolist() == [3, 3]


def test_every_way_to_call_checks_the_arguments():
    op = _define()
    op.provide("fast", double, priority={"cpu": 1})
    with FakeTensorMode():
        fake = torch.ones(2)
    for x in (torch.ones(2), fake):
        for call in (op, op.overload, _packet(op).fast, op.fake):
            with pytest.raises(ValueError, match="double: want by >= 0, got -1"):
                call(x, -1)


def test_fake_tensors_get_the_shape_rule_and_nothing_runs():
    def reference(x: Tensor, by: int) -> Tensor:
        raise AssertionError("ran")

    op = _define(reference=reference, fake=lambda x, by: x.new_empty(x.shape[0], by))
    with FakeTensorMode():
        assert op(torch.ones(2), 7).shape == (2, 7)


def test_a_call_runs_the_best_provider_and_each_opaque_one_has_an_overload():
    op, calls = _define(), []

    def provide(name: str, **how) -> None:
        def run(x: Tensor, by: int) -> Tensor:
            calls.append(name)
            return double(x, by)

        op.provide(name, run, **how)

    provide("slow", priority={"cpu": 1})
    provide("fast", priority={"cpu": 2}, supports=lambda x, by: None if by else "by is 0")
    provide("inline", priority={"cpu": 9}, inline=True)
    op(torch.ones(2), 1)
    op(torch.ones(2), 0)
    _packet(op).slow(torch.ones(2), 1)
    assert calls == ["fast", "slow", "slow"]
    assert op.choose((torch.ones(2), 1), compiled=True).provider.name == "inline"
    assert op.choose((torch.ones(2), 1), forced="slow").provider.name == "slow"
    assert set(_packet(op).overloads()) == {"default", "reference", "slow", "fast"}


def test_provider_names_differ():
    op = _define()
    with pytest.raises(ValueError, match=f"{op.name}: want provider names that differ, got 'reference' twice"):
        op.provide("reference", double, priority={"cpu": 1})


def test_torch_counts_the_flops_of_every_overload():
    ops = []
    # many, since a packet's hash changes with each overload, and a stale entry of the registry is found by chance
    for _ in range(40):
        ops.append(_define())
        ops[-1].provide("fast", double, priority={"cpu": 1})
        ops[-1].provide("faster", double, priority={"cpu": 2})
    for op in ops:
        packet = _packet(op)
        with FlopCounterMode(display=False) as counter:
            for call in (op, packet, packet.default, packet.reference, packet.fast, packet.faster):
                call(torch.ones(5), 1)
        assert counter.get_total_flops() == 6 * 10


def test_the_gradient_is_the_one_given():
    op = _define(setup_context=lambda ctx, inputs, output: None, backward=lambda ctx, dy: (7 * dy, None))
    assert op.differentiable and not _define().differentiable
    x = torch.ones(2, requires_grad=True)
    op(x, 1).sum().backward()
    assert x.grad.tolist() == [7, 7]


def test_mutation_is_read_off_the_schema():
    def shift(x: Tensor, by: int) -> None:
        x.add_(by)

    op = _define("(Tensor(a!) x, int by) -> ()", reference=shift, fake=lambda x, by: None, inline_reference=False)
    assert op.mutates and not _define().mutates
    x = torch.zeros(2)
    op(x, 3)
    assert x.tolist() == [3, 3]


def test_tolerances_are_the_defaults_but_where_given():
    op = _define(tolerance={torch.float32: EXACT})
    assert op.tolerance_for(torch.float32) == EXACT
    assert op.tolerance_for(torch.bfloat16) == DEFAULT_TOLERANCE[torch.bfloat16]


def test_the_first_tensor_tells_the_device():
    assert device_type((1, None, torch.ones(2, device="meta"), torch.ones(2))) == "meta"
