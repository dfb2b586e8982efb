"""What must hold for every op, driven by the op table: a new op is tested by its samples alone."""

import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import deepfuse.ops
from accuracy import assert_as_accurate, same_bits
from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.op import OPS, Op
from deepfuse.ir.provider import REFERENCE, Provider
from deepfuse.ir.tolerance import EXACT
from deepfuse.ops import import_ops
from deepfuse.ops.append_latent_fp8 import is_in_fp8, row_parts
from uninitialized import uninitialized_memory_is_nan

import_ops()

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
WITHOUT_KERNEL = {
    "linear": "cuBLAS serves it",
}
"""Ops without a Triton kernel, and why."""
WITHOUT_OP = {
    "absorbed_weight": "W^UK and W^UV where they lie, for the ops that multiply by them",
    "attention_arguments": "what mla_attention and its gradient are given",
    "dot": "a step of the kernels of matrix products",
    "fp8_rounding": "steps of the kernels that quantize",
    "expert_order": "a step of the kernels that move rows to their experts",
    "fp8_grouped_matmul_gluon": "a provider of fp8_grouped_matmul",
    "fp8_matmul_gluon": "a provider of fp8_matmul",
    "fp8_matmul_scaled_mm": "a provider of fp8_matmul",
    "fp8_matmul_triton": "a provider of fp8_matmul",
    "grouped_matmul_onednn": "a provider of grouped_matmul and of its weight gradient",
    "groups": "the rows of each group, for references",
    "k_major": "how products of FP8 want their operands to lie",
    "mla_decode_splits": "the kernels of the absorbed attention's forms",
}
"""Modules of several ops' common ground, and what it is."""

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
# float64 is for the reference, which is the oracle in it: kernels that would round it refuse
every_dtype = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=["float32", "bfloat16", "float64"])
every_device = pytest.mark.parametrize(
    "device_type", ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
)


@every_op
@every_dtype
@every_device
def test_providers_agree_with_the_reference(op: Op, dtype: torch.dtype, device_type: str):
    for args in op.samples(torch.device(device_type), dtype):
        _assert_providers_agree(op, args, device_type)


@every_op
def test_every_provider_takes_some_sample(op: Op):
    samples = [args for dtype in DTYPES for args in op.samples(CPU, dtype)]
    assert [p.name for p in op.providers if all(p.supports(*args) is not None for args in samples)] == []


@every_op
def test_opcheck(op: Op, monkeypatch: pytest.MonkeyPatch):
    # with which it compares arguments before and after the call; torch's does not take FP8
    monkeypatch.setattr(torch, "allclose", lambda before, after, equal_nan: same_bits(before, after))
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for args in op.samples(CPU, torch.float32):
        leaves = _leaves(args, torch.float32) if op.differentiable else args
        torch.library.opcheck(op.overload, leaves, test_utils=checks)
        # the last traces forward and backward with symbolic sizes, of which one sample is as good as another
        checks = checks[:3]


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.differentiable], ids=lambda op: op.name)
def test_gradient_is_the_derivative(op: Op):
    samples = [args for args in op.samples(CPU, torch.float64) if all(t.numel() for t in _tensors(args))]
    args = min(samples, key=lambda args: sum(t.numel() for t in _tensors(args)))
    assert torch.autograd.gradcheck(op, _leaves(args, torch.float64), fast_mode=True)


@every_op
def test_cost_is_whole_numbers_and_torch_counts_the_same(op: Op):
    for args in op.samples(CPU, torch.float32):
        cost = op.cost(*args)
        assert type(cost.flops) is int and cost.flops >= 0
        assert type(cost.bytes) is int and cost.bytes >= 0
        with FlopCounterMode(display=False) as counter:
            op(*args)
        assert counter.get_total_flops() == cost.flops


def test_every_module_in_ops_defines_an_op():
    modules = {module.name for module in pkgutil.iter_modules(deepfuse.ops.__path__)}
    assert modules - set(WITHOUT_OP) == {op.reference.__module__.removeprefix("deepfuse.ops.") for op in OPS.values()}
    assert set(WITHOUT_OP) <= modules


def test_every_op_has_a_triton_kernel_or_a_reason_for_none():
    assert {op.name for op in OPS.values() if "triton" not in [p.name for p in op.providers]} == set(WITHOUT_KERNEL)


SHAPES: dict[str, Callable[[int, int, int], tuple[Any, ...]]] = {
    "rms_norm": lambda T, D, _: ((T, D), (D,), 1e-6),
    "add_rms_norm": lambda T, D, _: ((T, D), (T, D), (D,), 1e-6),
    "swiglu": lambda T, D, _: ((T, D), (T, D)),
    "linear": lambda T, K, N: ((T, K), (N, K), (N,)),
    "router_logits": lambda T, D, E: ((T, D), (E, D)),
    "rotary": lambda T, P, H: ((T, H, 2 * P + 2), (T, P + 1), (T, P + 1), P % 3 == 0),
}
"""Arguments, tensors by their shape, from a number of rows and two widths."""
widths = st.sampled_from([0, 1, 2, 3, 16, 33])


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=15)
@given(T=st.integers(0, 5), A=widths, B=widths, dtype=st.sampled_from(DTYPES))
def test_any_size_will_do(name: str, T: int, A: int, B: int, dtype: torch.dtype):
    args = tuple(torch.randn(a, dtype=dtype) if isinstance(a, tuple) else a for a in SHAPES[name](T, A, B))
    _assert_providers_agree(OPS[name], args, "cpu")


def _assert_providers_agree(op: Op, args: tuple[Any, ...], device_type: str) -> None:
    expected = _call(op, op.reference, args)
    exact = _call(op, op.reference, pytree.tree_map_only((Tensor, torch.dtype), _widened, args))
    # not float8: its numbers are sums of few powers of two, with which float32 computes as with any others
    dtypes = [t.dtype for t in _tensors(args) if t.is_floating_point() and t.itemsize > 1]
    dtype = min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
    for provider in op.providers:
        if not _runs_on(provider, device_type) or provider.supports(*args) is not None:
            continue
        with uninitialized_memory_is_nan():
            actual = _call(op, provider.fn, args)
        where = f"{op.name}, {provider.name}"
        for a, f in zip(_tensors(actual[0]), _tensors(op.fake(*args)), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (f.shape, f.dtype, f.stride()), where
        for values in zip(*map(_tensors, (actual, expected, exact)), strict=True):
            _assert_near(op, dtype, *values, where)


def _runs_on(provider: Provider, device_type: str) -> bool:
    if provider.name.startswith("triton") and device_type == "cpu":
        return interpreted()
    return device_type in provider.priority and provider.name != REFERENCE


def _call(op: Op, fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Outputs, and the arguments after the call."""
    before = pytree.tree_map_only(Tensor, torch.clone, args)
    if op.mutates:
        returned = fn(*before)
        if torch.float8_e4m3fn in op.tolerance and is_in_fp8(before[0]):
            # what is rounded to FP8 may fall to the next value, which the bytes do not tell
            before = (*row_parts(before[0].flatten(0, 1), before[1].shape[1]), *before[1:])
        return returned, before
    # not a copy, which would lose the strides
    outputs = fn(*args)
    assert all(same_bits(a, b) for a, b in zip(_tensors(args), _tensors(before), strict=True)), op.name
    return outputs, ()


def _assert_near(op: Op, dtype: torch.dtype, actual: Tensor, expected: Tensor, exact: Tensor, where: str) -> None:
    """``dtype`` is that of the op's floating-point arguments, the narrowest if they differ."""
    if not actual.is_floating_point():
        bounds = EXACT
    elif actual.dtype in op.tolerance or actual.itemsize > 2:
        bounds = op.tolerance_for(actual.dtype)
        if dtype.itemsize < actual.itemsize:
            # statistics of narrow numbers, such as the logarithm of a sum, may have been taken with their precision
            bounds = replace(bounds, atol=op.tolerance_for(dtype).atol)
    else:
        assert_as_accurate(actual, expected, exact.double())
        return
    if actual.itemsize == 1 and bounds != EXACT:
        # assert_close compares float8 bit by bit only
        actual, expected = actual.float(), expected.float()
    torch.testing.assert_close(
        actual, expected, atol=bounds.atol, rtol=bounds.rtol, msg=lambda text: f"{where}: {text}"
    )


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _widened(t: Tensor | torch.dtype) -> Tensor | torch.dtype:
    """A tensor in float64, and the dtype of a result likewise; not FP8, which an op is asked for by name."""
    if isinstance(t, torch.dtype):
        return torch.float64 if t.is_floating_point and t.itemsize > 1 else t
    return t.double() if t.is_floating_point() else t


def _leaves(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments as autograd's leaves, strides kept."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.dtype == dtype), args)
