"""The form that is chosen for a trainer over processes, from graphs of a fake process group: nothing is run."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.chunked import Chunked
from deepfuse.blocks.config import Config
from deepfuse.blocks.expert_parallel import to_expert_parallel
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.parallel import Parallel
from deepfuse.ir.link import Link
from deepfuse.passes.pipeline import default
from deepfuse.runtime.axes import Axes
from deepfuse.runtime.overlap_form import Form, in_form, of_layers
from deepfuse.runtime.processes import Processes
from deepfuse.runtime.trainer import Trainer
from deepfuse.runtime.training import Training
from mesh_worker import LINK as SLOW
from mesh_worker import WIDE
from tiny_checkpoint import TINY, model_of

# torch 2.11: Dynamo
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
FAST = Link(name="fast", bandwidth=1e13, latency=0.0)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


class Alone(Processes):
    """One of two that are not there."""

    def tokens_axis(self) -> Axis | None:
        return self.axes.expert


def trainer(rank: int = 0, config: Config = WIDE, batch_size: int = 8, seq_len: int = 256, **parallel: Any) -> Trainer:
    axis = Axis("expert", "0", 2, rank)
    model = CausalLM(config)
    model.initialize()
    to_expert_parallel(model, axis, chunks=parallel.get("chunks", 1))
    processes = Alone(axes=Axes(expert=axis, size=2, rank=rank), parallel=Parallel(**{"link": SLOW, **parallel}))
    training = Training(steps=2, batch_size=batch_size, seq_len=seq_len, dtype=torch.float32)
    return Trainer(model, training, compile=False, processes=processes, pipeline=default())


@pytest.mark.slow
def test_the_form_is_the_fastest_predicted_and_every_rank_s() -> None:
    first, second = (trainer(rank) for rank in range(2))
    choice = first.forms[""]
    assert choice.form.chunks > 1 or choice.form.halves
    assert choice.decided == second.forms[""].decided
    whole, *_, chosen = choice.found.values()
    assert chosen.seconds < 0.99 * whole.seconds
    assert chosen.peak <= 1.15 * whole.peak
    assert chosen.exposed < whole.exposed
    assert choice.why[0].startswith(f"{choice.form}, as predicted of layers 0 and 1024 tokens")
    found = {line.partition(":")[0]: line for line in choice.why[1:]}
    assert {"shared expert", "chunked x2", str(choice.form)} <= set(found)
    assert all("exposed" in line for line in choice.why[1:] if "predicted" in line)
    # the form is that of the model, which shares its weights with the trainer's
    in_chunks = [m for m in first.in_form[""].modules() if isinstance(m, Chunked)]
    assert bool(in_chunks) == (choice.form.chunks > 1)
    mine = {id(p) for p in first.compute.parameters()}
    assert {id(p) for p in first.in_form[""].parameters()} == mine
    assert first.runner.settings["decided"] == {"train": choice.decided}


def test_nothing_is_captured_where_messages_are_mostly_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfuse.runtime.choose_overlap.traced", None)
    slow_to_begin = Link(name="slow to begin", bandwidth=1e8, latency=1e-3)
    made = trainer(batch_size=4, seq_len=32, link=slow_to_begin)
    (why,) = made.forms[""].why
    # 64 tokens of 2 choices and 8 rows more, of 1024 bytes, half of them to the other process: 0.7 ms
    assert why == "refused: 64 tokens, latency-bound: 1 ms of 1.7 ms of a message"
    assert made.forms[""].form == Form() and made.in_form[""] is made.compute


def test_no_other_form_is_looked_at_where_nothing_is_left_to_hide() -> None:
    made = trainer(link=FAST)
    assert made.forms[""].form == Form()
    assert made.forms[""].why[-1] == "no other form: nothing is left to hide" and len(made.forms[""].why) == 3


@pytest.mark.parametrize(
    ("parallel", "form"),
    [
        ({"overlap": "halves"}, Form(halves=True)),
        ({"overlap": "shared"}, Form()),
        ({"overlap": "none"}, Form()),
        ({"chunks": 2}, Form()),
    ],
)
def test_what_is_asked_for_is_not_chosen(parallel: dict[str, Any], form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfuse.runtime.choose_overlap.traced", None)
    made = trainer(**parallel)
    assert {choice.form for choice in made.forms.values()} == {form}
    assert (made.runner.settings["link"] is None) == (parallel.get("overlap") == "none")
    assert sum(isinstance(m, Chunked) for m in made.compute.modules()) == int("chunks" in parallel)


def test_a_model_in_another_form_shares_its_tensors() -> None:
    model = model_of(replace(TINY, num_hidden_layers=4))
    to_expert_parallel(model, Axis("expert", "0", 2, 0))
    assert in_form(model, Form()) is model and in_form(model, Form(halves=True)) is model
    chunked = in_form(model, Form(chunks=3))
    assert [m.chunks for m in chunked.modules() if isinstance(m, Chunked)] == [3, 3, 3, 3]
    assert not any(isinstance(m, Chunked) for m in model.modules())
    of_one, of_other = ([(n, id(p)) for n, p in m.named_parameters()] for m in (model, chunked))
    assert of_one == of_other
    assert {id(b) for b in chunked.buffers()} == {id(b) for b in model.buffers()}
    few = of_layers(model, [0, 2])
    assert len(few.model.layers) == 3 and few.config.num_hidden_layers == 2 and len(model.model.layers) == 5
    assert few.model.layers[1].mlp.gate.weight is model.model.layers[2].mlp.gate.weight
    assert few.model.layers[2].eh_proj.weight is model.model.layers[4].eh_proj.weight
    assert [few.config.feed_forward(i) for i in range(2)] == ["dense", "sparse"]
