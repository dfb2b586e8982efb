"""What Inductor computes between kernels: which calls share a loop, and the bytes it moves."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepfuse.profiling.fused_loops import fused_loops
from graphs import trace

N = 10
X, SQUARE = torch.ones(N, N), 4 * N * N


def loops(fn: Callable[..., object], *args: Tensor) -> list[tuple[int, int]]:
    """Calls and bytes of each."""
    return [(len(loop.nodes), loop.bytes) for loop in fused_loops(trace(fn, *args).graph)]


def test_calls_that_read_each_other_are_one_loop() -> None:
    # x is read, the last result written; what lies between is not
    assert loops(lambda x: x.exp().sin().cos(), X) == [(3, 2 * SQUARE)]
    # nor is the same read twice
    assert loops(lambda x: x.exp() + x, X) == [(2, 2 * SQUARE)]


def test_a_product_parts_loops() -> None:
    assert loops(lambda x: (x.exp() @ x).sin(), X) == [(1, 2 * SQUARE), (1, 2 * SQUARE)]


def test_what_lies_on_both_sides_of_a_product_is_no_loop_with_it() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.exp()
        return y @ x + y

    # y is written for the product, and read again beside what comes of it
    assert loops(fn, X) == [(1, 2 * SQUARE), (1, 3 * SQUARE)]


def test_what_waits_for_a_product_may_take_in_what_does_not() -> None:
    def fn(x: Tensor, z: Tensor) -> Tensor:
        return x @ x + z.sin()

    assert loops(fn, X, X) == [(2, 3 * SQUARE)]


def test_two_loops_with_a_product_between_are_not_joined_by_a_third() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.exp()
        z = (y @ x).sin()
        return y.cos() + z

    # cos goes with exp: the sum, which needs both, only with one of them
    assert [calls for calls, _ in loops(fn, X)] == [2, 2]


def test_a_constant_is_in_no_loop() -> None:
    def fn(x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(N, N)
        return zeros.index_put((i,), x.exp()), zeros.scatter(0, i[:, None], x.sin())

    places = torch.arange(N)
    # of each what it reads, where, and what it writes; nothing that is read by both ties them
    assert loops(fn, X, places) == [(2, 2 * SQUARE + 8 * N)] * 2


def test_of_a_table_as_much_is_read_as_comes_out() -> None:
    table, places = torch.ones(1000, N), torch.zeros(N, dtype=torch.int64)
    assert loops(lambda t, i: t[i], table, places) == [(1, 8 * N + 2 * SQUARE)]


def test_a_view_is_read_as_far_as_it_goes() -> None:
    assert loops(lambda x: x[:2].exp(), X) == [(1, 2 * 4 * 2 * N)]
