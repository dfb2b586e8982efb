import pytest
import torch

from accuracy import assert_as_accurate
from deepfuse.ops.linear import MATVEC_ROWS, linear, linear_ref

MATVEC = next(p for p in linear.providers if p.name == "matvec")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(1,), (MATVEC_ROWS,), (2, 2), ()], ids=str)
def test_matvec_error_is_at_most_twice_that_of_pytorch(leading, dtype):
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in [(*leading, 512), (20, 512), (20,)])
    exact = linear_ref(x.double(), weight.double(), bias.double())
    y = MATVEC.fn(x, weight, bias)
    assert y.shape == (*leading, 20)
    assert_as_accurate(y, linear_ref(x, weight, bias), exact)


def test_matvec_is_for_few_rows_in_compiled_graphs():
    weight = torch.randn(3, 8)
    for shape, reason in [
        ((MATVEC_ROWS, 8), None),
        ((MATVEC_ROWS + 1, 8), "rows"),
        ((2, 3, 8), "rows"),
        ((0, 8), "rows"),
    ]:
        refusal = MATVEC.supports(torch.randn(shape), weight, None)
        assert refusal is None if reason is None else reason in refusal
    args = (torch.randn(1, 8), weight, None)
    assert linear.choose(args).provider.name == "reference"
    assert linear.choose(args, compiled=True).provider is MATVEC


def test_matvec_does_not_take_a_number_of_rows_that_is_not_known():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.randn(2, 8), symbolic_context=context)
    assert MATVEC.supports(x, mode.from_tensor(torch.randn(3, 8)), None) is not None
    assert not mode.shape_env.guards


def test_gradient_without_bias_and_with_leading_dimensions():
    x, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    dy = torch.randn(2, 3, 4)
    actual = torch.autograd.grad(linear(x, weight, None), (x, weight), dy)
    expected = torch.autograd.grad(linear_ref(x, weight, None), (x, weight), dy)
    torch.testing.assert_close(actual, expected)


def test_refuses_what_does_not_fit():
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"x \[\.\.\., K\] and weight \[N, K\], got \[2, 4\] and \[4, 3\]"):
        linear(x, weight.t(), None)
    with pytest.raises(TypeError, match="one dtype, got torch.float32 and torch.bfloat16"):
        linear(x, weight.bfloat16(), None)
    with pytest.raises(ValueError, match=r"bias \[N\] = \[3\], got \[4\]"):
        linear(x, weight, torch.ones(4))
