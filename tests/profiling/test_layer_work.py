"""What a rank has to do, read off captured graphs: hand-computed figures, and lines that hold at other sizes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deepfuse.blocks.presets import PRESETS
from deepfuse.ir.device import CPU, H800
from deepfuse.profiling.fake_step import Workload
from deepfuse.profiling.layer_work import LOOPS, Captured, OpWork, RankWork, _peak_bytes, captured, experts_alone
from graphs import trace

TINY = PRESETS["v3-tiny"]()
PROMPTS = Workload("prompts", 2, 32)


@pytest.fixture(scope="module")
def work() -> RankWork:
    return RankWork(TINY, PROMPTS, "prefill", fp8=False, device=CPU)


def amounts(ops: list[OpWork] | tuple[OpWork, ...]) -> list[tuple[str, float, float]]:
    return [(o.op, pytest.approx(o.cost.flops), pytest.approx(o.cost.bytes)) for o in ops]


def test_parts_of_each_kind_of_layer(work: RankWork) -> None:
    assert {kind: {p for k, p in work.base.ops if k == kind} for kind in ("dense", "sparse", "")} == {
        "dense": {"attention", "norm", "dense"},
        "sparse": {"attention", "norm", "router", "shared", "permute", "routed"},
        "": {"head"},
    }


def test_products_of_a_layer_by_hand(work: RankWork) -> None:
    T, D, I, K = 64, TINY.hidden_size, TINY.moe_intermediate_size, TINY.num_experts_per_tok
    shared, routed = (
        sum(op.cost.flops for op in work.base.ops["sparse", part] if "matmul" in op.op or op.op == "linear")
        for part in ("shared", "routed")
    )
    assert shared == 2 * T * 3 * D * I
    assert routed == K * shared
    assert work.base.weight_bytes["sparse", "routed"] == 4 * TINY.n_routed_experts * 3 * D * I  # type: ignore[operator]
    assert work.slot_bytes() == 4 * 3 * D * I


def test_a_step_of_other_size_lies_on_the_line(work: RankWork) -> None:
    other = captured(TINY, replace(PROMPTS, sequences=5), "prefill", fp8=False, device=CPU)
    for place, ops in other.ops.items():
        assert amounts(work.ops(place, 5)) == amounts(ops), place


def test_routed_experts_of_other_sizes_lie_on_the_line(work: RankWork) -> None:
    rows, slots = 700, 5
    other = captured(experts_alone(TINY, slots), Workload("rows", 1, rows), "prefill", fp8=False, device=CPU)
    for part in ("routed", "permute"):
        assert amounts(work.routed_ops(part, rows, slots)) == amounts(other.ops["sparse", part])


def test_fewer_rows_than_experts_read_as_many_weights(work: RankWork) -> None:
    few, many = (sum(op.cost.bytes for op in work.routed_ops("routed", 3, slots)) for slots in (3, 400))
    assert many == pytest.approx(few)


def test_what_is_alive_at_once() -> None:
    def at_once(fn: Callable[[Tensor], Tensor]) -> int:
        return _peak_bytes(trace(fn, torch.ones(10)).graph)

    # 40 bytes each: the first result dies behind the second, a view of it keeps it, and so does a later reader
    assert at_once(lambda x: x.exp().sin()) == 80
    assert at_once(lambda x: x.exp().sin().cos()) == 80
    assert at_once(lambda x: x.exp().view(2, 5).sin().cos()) == 80
    assert at_once(lambda x: (y := x.exp()) + y.sin().cos()) == 120


def test_what_is_alive_at_once_in_a_step(work: RankWork) -> None:
    # where experts' products are made: stream, its addition, rows, gate and up together, beside order and norms
    T, D = 64, TINY.hidden_size
    rows = T * TINY.num_experts_per_tok
    held = 4 * (2 * T * D + rows * (D + 2 * TINY.moe_intermediate_size))
    assert held <= work.base.activation_bytes <= 1.5 * held


def test_a_decode_step_in_fp8_is_what_the_passes_make_of_it() -> None:
    step = captured(TINY, Workload("decode", 8, 1, cached=128), "decode", fp8=True, device=H800)
    names = {place: {op.op for op in ops} for place, ops in step.ops.items()}
    assert {"mla_decode_project", "norm_rope_append", "fp8_matmul"} <= names["sparse", "attention"]
    assert names["sparse", "routed"] == {"fp8_grouped_matmul", "swiglu_quantize", LOOPS}
    dtypes = {op.dtype for op in step.ops["sparse", "routed"] if op.op == "fp8_grouped_matmul"}
    assert dtypes == {torch.float8_e4m3fn}


def test_what_is_computed_between_ops_is_loops(work: RankWork) -> None:
    T, D, H = 64, TINY.hidden_size, TINY.num_attention_heads
    width = TINY.qk_nope_head_dim + TINY.qk_rope_head_dim
    (attention,) = (op for op in work.base.ops["sparse", "attention"] if op.op == LOOPS)
    (norm,) = (op for op in work.base.ops["sparse", "norm"] if op.op == LOOPS)
    # both parts of each head's query are put side by side, at least; small ones for lengths and places besides
    assert attention.cost.bytes >= 2 * 4 * T * H * width and attention.launches >= 1
    # what the shared and the routed experts made is added up: two are read; of the last layer only the last tokens are written
    assert 2 * 4 * T * D < norm.cost.bytes < 3 * 4 * T * D and norm.launches == 1
    assert attention.cost.flops == 0


def test_a_training_step_has_gradients_and_what_they_read() -> None:
    tokens = 2 * 32
    step = captured(TINY, PROMPTS, "train", fp8=False, device=CPU)
    ops = {op.op for op in step.ops["sparse", "routed"]}
    assert {"grouped_matmul", "grouped_matmul_wgrad"} <= ops
    # forward, gradient of the input, gradient of the weight
    products = sum(op.cost.flops for op in step.ops["sparse", "routed"] if op.op.startswith("grouped_matmul"))
    assert products == 3 * 2 * tokens * TINY.num_experts_per_tok * 3 * TINY.hidden_size * TINY.moe_intermediate_size
    # rows that come for the experts, and what comes of their first product
    rows = tokens * TINY.num_experts_per_tok
    assert step.saved_bytes["sparse", "permute"] >= 4 * rows * TINY.hidden_size
    assert step.saved_bytes["sparse", "routed"] >= 4 * rows * 2 * TINY.moe_intermediate_size


def test_what_training_in_fp8_keeps_of_weights_is_a_ranks_own(work: RankWork, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (
        captured(experts_alone(TINY, slots), Workload("rows", 1, 256), "train", fp8=True, device=H800)
        for slots in (8, 16)
    )
    kept = many.saved_bytes["sparse", "routed"] - few.saved_bytes["sparse", "routed"]
    # three matrices in FP8 at least, and at most a second set the other way around; scales are small
    weights = 8 * 3 * TINY.hidden_size * TINY.moe_intermediate_size
    assert weights <= kept <= 2.1 * weights

    def of(size: int) -> Captured:
        return replace(few, saved_bytes={("sparse", "routed"): size})

    # 4096 rows and 8 slots; twice the rows; twice the slots
    monkeypatch.setattr(work, "_routed", (of(100), of(150), of(130)))
    assert work.routed_saved("routed", 4096, 24) == 160
    assert work.routed_saved("routed", 3 * 4096, 8) == 200
