"""Choose the next token of each sequence: temperature, top-k, top-p, and a draw that can be repeated.

    top-k keeps the logits at or above the k-th largest (ties at the border are all kept)
    top-p keeps, of those, token i if the p[j] above p[i] sum to less than top_p, p = softmax(logits / temperature) over
        what top-k kept; the likeliest is always kept
    token = argmax over the kept of logits / temperature + g; ties go to the lowest index

``g = -log(-log(1 - v))`` is Gumbel noise, which makes the argmax a draw from the softmax. ``v = (bits + 1/2) / 2**32``,
``bits`` the first word of Philox-4x32-10 with the seed as key at counter (token, position, 0): a draw depends on nothing
but its row's logits, seed and position. Winners have a small ``v``: with ``u = 1 - v`` rounded to float32 instead,
tokens of probability 1e-7 would come up too rarely, and ``u = 1`` would win whatever its logit.
Dims: B sequences, V vocabulary.
Source: Maddison et al. 2014 (arXiv:1411.0030), section 2; Holtzman et al. 2020 (arXiv:1904.09751), section 3.1; Salmon
et al. 2011 (doi:10.1145/2063384.2063405), section 3.3.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import float32_at_most
from deepfuse.ir.sizes import check_value

WORD = 0xFFFFFFFF
"""Mask of the low 32 bits."""


def sample_ref(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    x_BV = _ordered(logits)
    greedy_B1 = temperature[:, None] <= 0
    scaled_BV = _scaled(x_BV, temperature)
    score_BV = scaled_BV + gumbel(seed, position, x_BV.shape[1], x_BV.dtype)
    score_BV = score_BV.masked_fill(x_BV < _least_kept(x_BV, scaled_BV, top_k, top_p), float("-inf"))
    return torch.where(greedy_B1, x_BV, score_BV).argmax(-1)


def gumbel(seed: Tensor, position: Tensor, V: int, dtype: torch.dtype) -> Tensor:
    """Noise ``[B, V]`` of seeds and positions ``[B]``."""
    token_1V = torch.arange(V, device=seed.device)[None]
    position_B1, seed_B1 = position[:, None], seed[:, None]
    counter = (token_1V, position_B1 & WORD, (position_B1 >> 32) & WORD, torch.zeros_like(token_1V))
    bits_BV = philox(counter, (seed_B1 & WORD, (seed_B1 >> 32) & WORD))[0]
    v_BV = (bits_BV.to(dtype) + 0.5) * 2.0**-32
    # the largest rounds up to 1, whose noise would be -inf
    v_BV = v_BV.clamp(max=1 - torch.finfo(dtype).eps / 2)
    return -torch.log(-torch.log1p(-v_BV))


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10; 32-bit words in int64 tensors, in and out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 wraps, which leaves all 64 bits of the product right
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product1 >> 32) & WORD ^ c1 ^ k0, product1 & WORD
        c2, c3 = (product0 >> 32) & WORD ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _ordered(logits: Tensor) -> Tensor:
    """Logits in float32 at least, without NaN (which counts as -inf) and inf (as the largest finite)."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return x.nan_to_num(nan=float("-inf"), neginf=float("-inf")).contiguous()


def _scaled(x_BV: Tensor, temperature: Tensor) -> Tensor:
    # not below the least finite, so that a row of -inf stays -inf
    top_B1 = x_BV.amax(-1, keepdim=True).clamp(min=torch.finfo(x_BV.dtype).min)
    return (x_BV - top_B1) / torch.where(temperature > 0, temperature, 1.0).to(x_BV.dtype)[:, None]


def _least_kept(x_BV: Tensor, scaled_BV: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """``[B, 1]``, the smallest logit that both filters keep."""
    V = x_BV.shape[1]
    sorted_BV, order_BV = x_BV.sort(-1, descending=True)
    k_B1 = torch.where(top_k > 0, top_k, V).clamp(max=V)[:, None]
    by_top_k_BV = sorted_BV >= sorted_BV.gather(-1, k_B1 - 1)
    p_BV = scaled_BV.gather(-1, order_BV).masked_fill(~by_top_k_BV, float("-inf")).softmax(-1)
    # right for the first of equal logits, which decides for all of them
    likelier_BV = torch.nn.functional.pad(p_BV.cumsum(-1), (1, -1))
    # a little at least, which only the first has before it
    by_top_p_BV = (likelier_BV < top_p.clamp(min=1e-30)[:, None]) | (top_p >= 1)[:, None]
    return sorted_BV.masked_fill(~(by_top_k_BV & by_top_p_BV), float("inf")).amin(-1, keepdim=True)


def _without_idle_filters(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """The reference less what no row asks for; reading that is free on a CPU."""
    greedy_B, filtered = temperature <= 0, bool(((top_k > 0) | (top_p < 1)).any())
    if filtered and not greedy_B.all():
        return sample_ref(logits, temperature, top_k, top_p, seed, position)
    x_BV = _ordered(logits)
    if greedy_B.all():
        return x_BV.argmax(-1)
    score_BV = _scaled(x_BV, temperature) + gumbel(seed, position, x_BV.shape[1], x_BV.dtype)
    return torch.where(greedy_B[:, None], x_BV, score_BV).argmax(-1)


@triton.jit
def _threshold(row_ptr, V, top, scale, wanted, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Largest number such that the logits from it upwards weigh at least ``wanted``.

    A logit weighs 1 or, by mass, its unnormalised probability. The search goes through the floats in order, as integers,
    two bits a pass. Sums in a fixed order never grow when terms become 0, so it is exact.
    """
    ordinal = tl.full([], 0, tl.uint32)
    step = tl.full([], 1 << 30, tl.uint32)
    zeros = tl.full([BLOCK], 0.0, tl.float32)
    for _ in range(16):
        from1 = _float(ordinal + step)
        from2 = _float(ordinal + step * 2)
        from3 = _float(ordinal + step * 3)
        sum1 = zeros
        sum2 = zeros
        sum3 = zeros
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
            # the minimum is for infinity; NaN fails the comparisons
            weight = tl.exp2(tl.minimum((x - top) * scale, 0.0)) if BY_MASS else 1.0
            sum1 += tl.where(x >= from1, weight, 0.0)
            sum2 += tl.where(x >= from2, weight, 0.0)
            sum3 += tl.where(x >= from3, weight, 0.0)
        steps = (
            (tl.sum(sum1, 0) >= wanted).to(tl.uint32)
            + (tl.sum(sum2, 0) >= wanted).to(tl.uint32)
            + (tl.sum(sum3, 0) >= wanted).to(tl.uint32)
        )
        ordinal += step * steps
        step = step >> 2
    return _float(ordinal)


@triton.jit
def _float(ordinal):
    """The float of this place in the order of all floats; what comes before -inf counts as it, what after inf is NaN."""
    ordinal = tl.maximum(ordinal, 0x007FFFFF)
    bits = tl.where((ordinal >> 31) == 1, ordinal ^ 0x80000000, ordinal ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _first(best, best_v, V):
    return tl.min(tl.where(best == tl.max(best, 0), best_v, V), 0)


@triton.jit
def _sample_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    seed_ptr,
    position_ptr,
    token_ptr,
    logits_stride,
    V,
    BLOCK: tl.constexpr,
):
    """One program per row; it reads the row for the maximum, 16 times for each filter in use, and for the draw."""
    LARGEST: tl.constexpr = 3.4028234663852886e38
    b = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + b * logits_stride
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_v = lane
    for start in range(0, V, BLOCK):
        v = start + lane
        x = tl.load(row_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        # false for NaN
        better = x > best
        best_v = tl.where(better, v, best_v)
        best = tl.where(better, x, best)
    token = _first(best, best_v, V)

    temperature = tl.load(temperature_ptr + b).to(tl.float32)
    if temperature > 0:
        top = tl.minimum(tl.maximum(tl.max(best, 0), -LARGEST), LARGEST)
        # for the power of 2 that is the exponential; finite, as it meets zeros
        scale = tl.minimum(1.4426950408889634 / temperature, LARGEST)
        top_k = tl.load(top_k_ptr + b)
        top_p = tl.load(top_p_ptr + b).to(tl.float32)
        floor = tl.full([], float("-inf"), tl.float32)
        if (top_k > 0) & (top_k < V):
            floor = _threshold(row_ptr, V, top, scale, top_k.to(tl.float32), False, BLOCK)
        if top_p < 1:
            mass = tl.full([BLOCK], 0.0, tl.float32)
            for start in range(0, V, BLOCK):
                v = start + lane
                x = tl.load(row_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
                mass += tl.where(x >= floor, tl.exp2(tl.minimum((x - top) * scale, 0.0)), 0.0)
            # a little at least, which the likeliest have
            wanted = tl.maximum(top_p, 1e-30) * tl.sum(mass, 0)
            floor = tl.maximum(floor, _threshold(row_ptr, V, top, scale, wanted, True, BLOCK))

        seed = tl.load(seed_ptr + b)
        position = tl.load(position_ptr + b)
        position_low = (position & 0xFFFFFFFF).to(tl.uint32)
        position_high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_v = lane
        for start in range(0, V, BLOCK):
            v = start + lane
            x = tl.load(row_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
            bits, _, _, _ = tl.philox(seed, v.to(tl.uint32), position_low, position_high, position_low * 0)
            score = (tl.minimum(x, LARGEST) - top) / temperature + _gumbel(bits)
            better = (x >= floor) & (score > best)
            best_v = tl.where(better, v, best_v)
            best = tl.where(better, score, best)
        token = _first(best, best_v, V)
    tl.store(token_ptr + b, token.to(tl.int64))


@triton.jit
def _gumbel(bits):
    # 1 - 2**-24, the largest float32 below 1
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    # the hardware's logarithm is exact to 2**-22 near 1, too little for a small v: there -log(1 - v) is
    # 2 atanh(v / (2 - v)), and four terms of that series are enough below 1/4
    s = v / (2.0 - v)
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7))))
    return -tl.log(tl.where(v < 0.25, series, -tl.log(1.0 - v)))


def _launch(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    B, V = logits.shape
    token = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B == 0:
        return token
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    per_row = [t.contiguous() for t in (temperature, top_k, top_p, seed, position)]
    # one processor reads a row, with all the warps it can have: 4 elements a thread do not spill then
    block = min(triton.next_power_of_2(V), 4096)
    num_warps = max(block // 128, 1)
    _sample_kernel[(B,)](logits, *per_row, token, logits.stride(0), V, BLOCK=block, num_warps=num_warps)
    return token


def _triton_supports(logits: Tensor, *rest: Tensor) -> str | None:
    # ranks are counted in float32
    return float32_at_most(logits) or (None if logits.shape[1] <= 2**24 else "vocabulary is larger than 2**24")


def _check(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor) -> None:
    per_row = (temperature, top_k, top_p, seed, position)
    if logits.ndim != 2 or logits.shape[1] < 1 or any(t.ndim != 1 for t in per_row):
        raise ValueError(
            "sample: want logits [B, V] with V >= 1 and temperature, top_k, top_p, seed and position [B], got "
            f"{[list(t.shape) for t in (logits, *per_row)]}"
        )
    B = logits.shape[0]
    for rows in (t.shape[0] for t in per_row):
        check_value(
            rows == B, functools.partial("sample: want {} temperatures, seeds and so on, got {}".format, B, rows)
        )
    if not logits.is_floating_point() or any(t.dtype != torch.int64 for t in (top_k, seed, position)):
        raise TypeError(
            "sample: want floating-point logits and int64 top_k, seed and position, got "
            f"{[t.dtype for t in (logits, top_k, seed, position)]}"
        )


def _fake(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def _cost(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor) -> Cost:
    # scale, exponential and sum of the filters, noise, comparison
    B = logits.shape[0]
    return Cost(
        flops=10 * logits.numel(), bytes=tensor_bytes(logits, temperature, top_k, top_p, seed, position) + 8 * B
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    # temperature, top-k and top-p of each row: greedy; no filter; every filter; no row; more than a block of the kernel
    for settings, V in [
        ([(0.0, 0, 1.0)], 1),
        ([(0.0, 0, 1.0), (1.0, 0, 1.0)], 100),
        ([(0.7, 5, 1.0), (1.3, 0, 0.8), (2.0, 30, 0.9), (1.0, 1000, 0.0), (0.0, 1, 0.1)], 100),
        ([], 8),
        ([(0.8, 50, 0.95)], 9000),
    ]:
        columns = list(zip(*settings, strict=True)) or [(), (), ()]
        B = len(settings)
        yield (
            torch.randn(B, V, device=device).mul(3).to(dtype),
            torch.tensor(columns[0], device=device, dtype=torch.float32),
            torch.tensor(columns[1], device=device, dtype=torch.int64),
            torch.tensor(columns[2], device=device, dtype=torch.float32),
            torch.randint(-(2**63), 2**63 - 1, (B,), device=device),
            torch.randint(0, 2**40, (B,), device=device),
        )


sample = define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, Tensor position) -> Tensor",
    reference=sample_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
)
"""Draw one token a row.

Args:
    logits: ``[B, V]``, any floating dtype, computed in float32; NaN counts as -inf, and a row without any other logit
        gives token 0.
    temperature: ``[B]`` float32, finite; 0 (or less) is greedy: the largest logit, whatever the filters.
    top_k: ``[B]`` int64; 0 (or less) is off.
    top_p: ``[B]`` float32; 1 (or more) is off.
    seed: ``[B]`` int64.
    position: ``[B]`` int64: the same seed draws anew at each position.

Returns:
    ``[B]`` int64.

Raises:
    ValueError: shapes do not fit.
    TypeError: ``logits`` are not floating point, or ``top_k``, ``seed`` or ``position`` not int64.
"""

sample.provide("torch", _without_idle_filters, priority={"cpu": 5})
sample.provide("triton", _launch, priority={"cuda": 10}, supports=_triton_supports)
