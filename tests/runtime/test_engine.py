"""One prefill graph and one decode graph a bucket serve every size, and none is made after the build.

What they compute is compared with the modules run eagerly; the modules with transformers in tests/blocks.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from deepfuse.ir.private import dynamo_counters
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.runtime import engine as engine_module
from deepfuse.runtime.engine import buckets
from deepfuse.runtime.lockstep import Call
from deepfuse.runtime.steps import prefill_inputs
from tiny_model import MAX_BATCH_SIZE, MAX_SEQ_LEN, ONE_LAYER, build, eager_logits, random_weights, tiny_model

LENGTHS = (1, 2, 3, 5, 17, 31, 63, 64, 65, 100, 128)
"""One token, ten other lengths, and those around the end of a page."""
# float32, summed in another order: see oracle.TOLERANCE; logits are below 5 here
CLOSE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture
def engine():
    return tiny_model().engine


class Steps:
    """Prefills prompts and decodes tokens behind them; gives the logits of each step, ``[B, steps + 1, V]``."""

    def __init__(self, engine):
        self.engine, self.places = engine, []

    def __call__(self, prompts, following):
        places = [self.engine.cache.allocate(len(p) + len(f)) for p, f in zip(prompts, following, strict=True)]
        self.places += places
        logits = [self.engine.prefill(prompts, places, last_only=True)]
        logits += [self.engine.decode(list(column), places) for column in zip(*following, strict=True)]
        return torch.stack(logits, 1)

    def release(self):
        for place in self.places:
            self.engine.cache.release(place)


@pytest.fixture
def steps(engine):
    steps = Steps(engine)
    yield steps
    steps.release()


def tokens(*shape):
    return torch.randint(2, 300, shape).tolist()


@pytest.mark.parametrize(
    ("largest", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])]
)
def test_buckets_are_powers_of_two_and_the_largest(largest, expected):
    assert list(buckets(largest)) == expected


def test_one_graph_for_prefill_and_one_for_each_bucket(engine):
    assert [graph.name for graph in engine.runner.journal.graphs] == ["prefill", "decode_1", "decode_2", "decode_4"]


def test_nothing_is_compiled_after_the_build(engine, steps):
    report = tiny_model().report
    before = dynamo_counters()
    decoded = 0
    for batch in range(1, MAX_BATCH_SIZE + 1):
        for length in LENGTHS:
            steps_behind = 5
            prompts = [tokens(max(length - row, 1)) for row in range(batch)]
            steps(prompts, tokens(batch, steps_behind))
            decoded += steps_behind
            steps.release()
    assert decoded >= 200
    assert report.recompiles == 0 and report.graph_breaks == 0
    assert dynamo_counters() == before


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_modes_of_a_caller_change_nothing(engine, mode):
    model, ids = tiny_model(), torch.tensor([tokens(5), tokens(5)])
    logits, answer = model(ids), model.generate(ids[0].tolist(), max_new_tokens=3, temperature=0.0)
    with mode():
        assert torch.equal(model(ids.clone()), logits)
        assert model.generate(ids[0].tolist(), max_new_tokens=3, temperature=0.0) == answer
    assert torch.equal(model(ids), logits)
    assert model.report.recompiles == 0


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_of_every_length(engine, length):
    prompt = tokens(length)
    expected = eager_logits(tiny_model(), prompt)
    torch.testing.assert_close(engine.prefill([prompt], [None], last_only=False), expected, **CLOSE)
    torch.testing.assert_close(engine.prefill([prompt], [None], last_only=True), expected[-1:], **CLOSE)


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 1), (torch.bfloat16, 16)], ids=str)
def test_prefills_in_bfloat16_are_padded_to_whole_tiles(dtype, multiple, monkeypatch):
    engine = build(random_weights(ONE_LAYER).to(dtype)).engine
    lengths, made = [], engine._prefills["prefill"]
    monkeypatch.setitem(engine._prefills, "prefill", lambda *args: lengths.append(args[2].shape[1]) or made(*args))
    for prompts in (tokens(1, 1), tokens(1, 16), [*tokens(1, 17), *tokens(1, 3)]):
        each = [engine.prefill([p], [None], last_only=False) for p in prompts]
        together = engine.prefill(prompts, [None] * len(prompts), last_only=False)
        # the norm of what eight bits of a product's factors come to, in one layer
        assert (together - torch.cat(each)).norm() <= 2**-7 * together.norm()
        total = sum(map(len, prompts))
        assert together.shape[0] == total and lengths[-1] == -(-total // multiple) * multiple


@pytest.mark.parametrize("batch", range(1, MAX_BATCH_SIZE + 1))
def test_steps_of_every_batch_size_with_unequal_lengths(engine, steps, batch):
    # one begins with one token, one ends a page while it decodes
    prompts = [tokens(n) for n in (PAGE_SIZE - 3, 1, 2 * PAGE_SIZE, 30)[:batch]]
    following = tokens(batch, 6)
    logits = steps(prompts, following)
    for row in range(batch):
        expected = eager_logits(tiny_model(), prompts[row] + following[row])[-7:]
        torch.testing.assert_close(logits[row], expected, **CLOSE)


def test_a_sequence_as_long_as_the_cache(engine, steps):
    prompt, following = tokens(MAX_SEQ_LEN - 2), tokens(1, 2)
    logits = steps([prompt], following)
    torch.testing.assert_close(logits[0], eager_logits(tiny_model(), prompt + following[0])[-3:], **CLOSE)


def test_what_lies_in_unused_slots_does_not_matter(engine, steps):
    prompt, following = tokens(40), tokens(3, 4)
    expected = steps([prompt] * 3, following)
    steps.release()
    kept = [layer.clone() for layer in engine.cache.layers]
    try:
        for layer in engine.cache.layers:
            layer.fill_(torch.nan)
        assert torch.equal(steps([prompt] * 3, following), expected)
    finally:
        for layer, values in zip(engine.cache.layers, kept, strict=True):
            layer.copy_(values)


def test_a_call_without_places_leaves_the_cache_alone(engine):
    place = engine.cache.allocate(PAGE_SIZE)
    engine.prefill([tokens(PAGE_SIZE)], [place], last_only=True)
    before = [layer[1:].clone() for layer in engine.cache.layers]
    engine.prefill([tokens(7), tokens(90)], [None, None], last_only=True)
    for layer, values in zip(engine.cache.layers, before, strict=True):
        assert values.any() and torch.equal(layer[1:], values)
    engine.cache.release(place)


def test_places_know_their_length(engine):
    place = engine.cache.allocate(10)
    engine.prefill([tokens(6)], [place], last_only=True)
    assert place.length == 6
    engine.decode(tokens(1), [place])
    assert place.length == 7
    engine.cache.release(place)
    assert place.length == 0


def test_no_gradients_are_kept(engine):
    assert not engine.prefill([tokens(3)], [None], last_only=True).requires_grad


def test_a_graph_made_later_is_counted():
    """The count that other tests want to be 0 is one that moves."""
    model = build(random_weights(ONE_LAYER))
    assert model.report.recompiles == 0
    tokens_3T, q_start, rows = prefill_inputs([[1, 2]], [None], model.engine.device, last_only=True)
    with torch.no_grad():
        model.engine._prefills["prefill"](model.engine.model, model.engine.cache.layers, tokens_3T, q_start, rows.int())
    assert model.report.recompiles == 1


@pytest.mark.compile
def test_nothing_is_compiled_after_a_compiled_build(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path))
    model = build(random_weights(ONE_LAYER), compile=True, max_batch_size=3, max_seq_len=300)
    before = dynamo_counters()
    for batch in (1, 2, 3):
        for length in LENGTHS:
            prompts = [tokens(max(length - row, 1)) for row in range(batch)]
            logits = model.engine.prefill(prompts, [None] * batch, last_only=True)
            for row, prompt in enumerate(prompts):
                torch.testing.assert_close(logits[row], eager_logits(model, prompt)[-1], **CLOSE)
    prompts = [tokens(20), tokens(1), tokens(64)]
    # 200 steps in a batch that shrinks from 3 to 1
    text = model.generate(prompts, max_new_tokens=200, temperature=0.0, stop_token_ids=())
    assert dynamo_counters() == before and model.report.recompiles == 0
    for prompt, generated in zip(prompts, text, strict=True):
        logits = eager_logits(model, prompt + generated)[len(prompt) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(generated)[:, None])[:, 0]
        # each is the likeliest, or as likely as that within rounding
        assert ((logits.amax(-1) - chosen) <= CLOSE["atol"]).all()


def test_all_that_a_process_waits_for_in_a_call_is_watched(monkeypatch):
    """So that an error of a collective names who is to blame; also of those that compare prompts."""
    model, phases = tiny_model(), []

    @contextlib.contextmanager
    def watched(phase, step):
        phases.append(phase)
        yield
        phases.append("")

    def within(*args):
        assert phases[-1] != ""
        return Call(*args[:2]) if isinstance(args[0], int) else None

    monkeypatch.setattr(engine_module, "watched", watched)
    lockstep = SimpleNamespace(alone=True, equal=False, agree=within, check_same=within)
    monkeypatch.setattr(model.engine, "lockstep", lockstep)
    model.generate([[5, 9]], max_new_tokens=2, stop_token_ids=())
    assert [phase for phase in phases if phase] == ["checking", "prefill", "decode", "padding"]
