"""Logits of the router: as exact as float32 sums are, from operands of any dtype."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deepfuse.ops import router_logits as module
from deepfuse.ops.linear import MATVEC_ROWS
from deepfuse.ops.router_logits import FEW_TOKENS, router_logits, router_logits_ref
from deepfuse.profiling.kernel_count import count_kernels

PROVIDERS = {p.name: p.fn for p in router_logits.providers}
TRITON = PROVIDERS["triton"]
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
on_kernel_device = pytest.mark.usefixtures("kernel_device")


def assert_summed_in_float32(logits, x, weight):
    """Each term is rounded when it is made and added at most so often: in its tile's column, and over the columns."""
    assert logits.dtype == FLOAT
    exact, sizes = x.double() @ weight.double().t(), x.double().abs() @ weight.double().t().abs()
    D = x.shape[1]
    roundings = 1 + math.ceil(D / 256) + math.ceil(math.log2(1024))
    assert ((logits.double() - exact).abs() <= roundings * 2**-24 * sizes).all()


@on_kernel_device
# what a program takes of tokens and experts, and one more; columns of a part of a tile, and of several
@pytest.mark.parametrize(("T", "E", "D"), [(1, 2, 64), (2, 3, 1100), (4, 5, 1025), (5, 9, 600), (16, 6, 520)])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (HALF, HALF), (FLOAT, FLOAT), (BF16, FLOAT), (FLOAT, BF16)], ids=str)
def test_kernel_sums_in_float32(T, E, D, dtypes):
    x, weight = torch.randn(T, D).to(dtypes[0]), torch.randn(E, D).to(dtypes[1])
    assert_summed_in_float32(TRITON(x, weight), x, weight)


@pytest.mark.parametrize("name", ["reference", "matvec"])
def test_others_sum_in_float32(name):
    x, weight = torch.randn(3, 500, dtype=BF16), torch.randn(4, 500, dtype=BF16)
    # adds in an order of its library's choice: at worst one after the other
    bound = 500 * 2**-24 * (x.double().abs() @ weight.double().t().abs())
    logits = PROVIDERS[name](x, weight)
    assert logits.dtype == FLOAT
    assert ((logits.double() - x.double() @ weight.double().t()).abs() <= bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
@pytest.mark.parametrize("T", [17, 300])
def test_tensor_cores_sum_in_float32(T, dtype):
    x, weight = (torch.randn(n, 7168, device="cuda").to(dtype) for n in (T, 256))
    logits = PROVIDERS["torch"](x, weight)
    assert logits.dtype == FLOAT
    # at worst one after the other, and cut off instead of rounded
    sizes = x.double().abs() @ weight.double().t().abs()
    assert ((logits.double() - x.double() @ weight.double().t()).abs() <= 7168 * 2**-23 * sizes).all()


@on_kernel_device
def test_kernel_takes_views():
    wide, turned = torch.randn(4, 100, dtype=BF16), torch.randn(40, 6, dtype=BF16)
    for x, weight in ((wide[:, 30:70], turned.t()), (turned[:, :3].t(), wide[::2, :40])):
        assert_summed_in_float32(TRITON(x, weight), x, weight)


@on_kernel_device
def test_what_is_no_number_stays_in_its_row():
    x, weight = torch.randn(3, 20), torch.randn(5, 20)
    x[1, 7], weight[4, 3] = float("nan"), float("inf")
    logits = TRITON(x, weight)
    want = torch.zeros(3, 5, dtype=torch.bool)
    want[1], want[:, 4] = True, True
    assert torch.equal(~logits.isfinite(), want)


@on_kernel_device
def test_nothing_to_sum_is_zero():
    assert torch.equal(TRITON(torch.ones(2, 0), torch.ones(3, 0)), torch.zeros(2, 3))
    assert TRITON(torch.ones(0, 4), torch.ones(3, 4)).shape == (0, 3)


@pytest.mark.parametrize(
    ("device", "T", "dtypes", "name"),
    [
        ("cuda", FEW_TOKENS, (BF16, BF16), "triton"),
        ("cuda", FEW_TOKENS, (BF16, FLOAT), "triton"),
        ("cuda", FEW_TOKENS + 1, (BF16, BF16), "torch"),
        ("cuda", FEW_TOKENS + 1, (BF16, FLOAT), "reference"),
        ("cuda", FEW_TOKENS + 1, (FLOAT, FLOAT), "reference"),
        ("cuda", 1, (torch.float64, BF16), "reference"),
        ("cuda", 1, (BF16, torch.float64), "reference"),
        ("cpu", MATVEC_ROWS, (BF16, BF16), "matvec"),
        ("cpu", MATVEC_ROWS + 1, (BF16, BF16), "reference"),
    ],
)
def test_who_serves_it(device, T, dtypes, name):
    with FakeTensorMode():
        x, weight = (
            torch.empty(T, 64, dtype=dtypes[0], device=device),
            torch.empty(8, 64, dtype=dtypes[1], device=device),
        )
    choice = router_logits.choose((x, weight), compiled=True)
    assert choice.provider.name == name
    if name == "triton":
        assert count_kernels(module._launch, (x, weight)) == ["_router_logits_kernel"]


def test_float64_is_the_oracle():
    x, weight = torch.randn(2, 5, dtype=BF16), torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(router_logits_ref(x, weight), x.double() @ weight.t())


def test_refuses_what_does_not_fit():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"want x \[T, D\] and weight \[E, D\], got \[2, 4\] and \[3, 5\]"):
        router_logits(x, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"got \[4\] and \[3, 4\]"):
        router_logits(x[0], torch.ones(3, 4))
    with pytest.raises(TypeError, match="want weight in float16, .* got torch.int64"):
        router_logits(x, torch.ones(3, 4).long())
    with pytest.raises(TypeError, match="want x in float16, .* got torch.float8_e4m3fn"):
        router_logits(x.to(torch.float8_e4m3fn), torch.ones(3, 4))
