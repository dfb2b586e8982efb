"""Which prefill graphs a model over processes gets for many tokens, from graphs of a fake process group: nothing is run."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.config import Config
from deepfuse.blocks.expert_parallel import to_expert_parallel
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.parallel import Parallel
from deepfuse.ir.device import CPU
from deepfuse.ir.link import Link
from deepfuse.ir.private import traced
from deepfuse.passes.balanced_sizes import BalancedSizes
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import Runner
from deepfuse.runtime.axes import Axes
from deepfuse.runtime.choose_overlap import Choice
from deepfuse.runtime.compile_cache import BuildFolder
from deepfuse.runtime.large_prefill import decided, keep, large_prefill
from deepfuse.runtime.latent_cache import LatentCache
from deepfuse.runtime.overlap_form import Form, LargePrefill
from deepfuse.runtime.processes import Processes
from deepfuse.runtime.prompt_halves import halves_of
from deepfuse.runtime.steps import example_prefill, example_prefill_in_halves, prefill, prefill_in_halves
from mesh_worker import SMALL, WIDE

# torch 2.11: Dynamo
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
TALL = replace(WIDE, num_hidden_layers=2, num_attention_heads=32, moe_intermediate_size=128, n_shared_experts=None)
"""Layers whose attention takes about as long as the way to experts over :data:`LINK`, and that have little else."""
LINK = Link(name="slow", bandwidth=2e8, latency=1e-5)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


def found(config: Config, batch: int = 2, tokens: int = 1024, **parallel: Any) -> Any:
    axis = Axis("expert", "0", 2, 0)
    model = CausalLM(config).eval()
    to_expert_parallel(model, axis)
    processes = Processes(axes=Axes(expert=axis, size=2), parallel=Parallel(**parallel))
    cache = LatentCache(
        config, dtype=torch.float32, device=torch.device("cpu"), max_batch_size=batch, max_seq_len=tokens
    )
    runner = Runner(default(), {"providers": {}, "device": CPU, "max_seq_len": tokens, "link": LINK})
    return large_prefill(model, cache.layers, runner, processes, None, batch)


@pytest.mark.slow
def test_halves_are_for_calls_that_have_them_and_chunks_for_others(tmp_path: Any, monkeypatch: Any) -> None:
    large, why = found(TALL)
    halves, chunks = large
    assert halves.form == Form(halves=True) and halves.graph == "prefill_halves"
    assert chunks.form.chunks > 1 and chunks.graph == "prefill_large"
    assert halves.tokens < 1024 and chunks.tokens < 1024
    told = {line.partition(":")[0]: line for line in why}
    assert {"shared expert", "chunked x2", "chunked x4", "two-batch"} < told.keys()
    each = halves.tokens // 2
    assert why[-2:] == (
        f"two-batch where each process has two halves of {each} tokens or more; else as follows",
        f"{chunks.form} from {chunks.tokens} tokens on; fewer as the model is",
    )
    of_graphs = decided(large, why)
    assert [(name, of.form) for name, of in of_graphs.items()] == [
        ("prefill", "shared expert"),
        ("prefill_halves", "two-batch"),
        ("prefill_large", str(chunks.form)),
    ]
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path))
    folder = BuildFolder("key")
    keep(folder, large, why)
    kept = large_prefill(None, [], None, None, folder, 2)  # type: ignore[arg-type]
    assert kept == (large, why)


@pytest.mark.parametrize(
    ("settings", "halves"), [({}, True), ({"batch": 1}, False), ({"mode": "capacity"}, False)], ids=str
)
def test_no_halves_where_calls_have_none_or_fill_them_up(settings: Any, halves: bool, monkeypatch: Any) -> None:
    asked: list[Form] = []
    monkeypatch.setattr(
        "deepfuse.runtime.large_prefill.choose",
        lambda model, step, forms, *_, **__: asked.extend(forms) or Choice(Form()),
    )
    assert found(TALL, **settings) == ((), ())
    assert [form.chunks for form in asked if not form.halves] == [2, 4]
    assert any(form.halves for form in asked) == halves


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"overlap": "halves"}, ((LargePrefill(Form(halves=True), 2),), ())),
        (
            {"overlap": "halves", "batch": 1},
            ((), ("refused: two-batch wants two sequences, and max_batch_size is 1",)),
        ),
        ({"overlap": "shared"}, ((), ())),
        ({"chunks": 2}, ((), ())),
    ],
    ids=str,
)
def test_what_is_asked_for_is_not_chosen(settings: dict[str, Any], wanted: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("deepfuse.runtime.choose_overlap.traced", None)
    assert found(TALL, **settings) == wanted


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ([], (0, (0, 0))),
        ([9], (0, (0, 0))),
        ([4, 4], (1, (4, 4))),
        ([6, 4], (1, (4, 6))),
        ([7, 4], (0, (0, 0))),
        ([1, 2, 3, 4], (3, (4, 6))),
        ([4, 3, 2, 1], (1, (4, 6))),
        ([1] * 7, (3, (3, 4))),
    ],
)
def test_halves_are_of_whole_prompts_and_about_as_many_tokens(lengths: list[int], wanted: Any) -> None:
    assert halves_of([[0] * n for n in lengths]) == wanted


@pytest.mark.parametrize(("in_halves", "tokens", "starts"), [(False, 10, 3), (True, 5, 2)])
def test_costs_are_of_two_sequences_together_or_in_halves(in_halves: bool, tokens: int, starts: int) -> None:
    steps = (prefill, example_prefill), (prefill_in_halves, example_prefill_in_halves)
    (fn, given), device = steps[in_halves], torch.device("cpu")
    model = CausalLM(SMALL).eval()
    cache = LatentCache(SMALL, dtype=torch.float32, device=device, max_batch_size=1, max_seq_len=64)
    with torch.no_grad():
        (gm,) = traced(fn, (model, cache.layers, *given(device)))
    sizes = BalancedSizes(gm.graph, 10)
    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    integers = [v for v in inputs if isinstance(v, torch.Tensor) and not v.is_floating_point()]
    assert {tuple(sizes.tensor(v).shape) for v in integers} == {(3, tokens), (starts,), (tokens,)}
    results = [v for v in gm.graph.output_node().all_input_nodes if v.meta["val"].ndim == 2]
    assert [tuple(sizes.tensor(v.meta["val"]).shape) for v in results] == [(10, SMALL.vocab_size)]
