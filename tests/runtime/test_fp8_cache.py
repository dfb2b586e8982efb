"""The latent cache in FP8, from build to generation.

What the graphs compute is compared with the modules run eagerly over a cache of numbers, into which a token's latent and
key go as FP8 would give them back.
"""

from dataclasses import replace

import pytest
import torch

import deepfuse as df
from deepfuse.blocks import attention
from deepfuse.ops.append_latent import PAGE_SIZE, append_latent
from deepfuse.ops.append_latent_fp8 import packed_rows, unpacked_rows
from deepfuse.runtime import build as build_module
from deepfuse.runtime import latent_cache
from deepfuse.runtime.latent_cache import FP8, LatentCache, cache_bytes, latent_bytes_per_token
from tiny_checkpoint import TINY
from tiny_model import CONFIG, MAX_BATCH_SIZE, MAX_SEQ_LEN, ONE_LAYER, build, checkpoint, random_weights, tiny_model

C, R, LAYERS = CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim, CONFIG.num_hidden_layers
# float32, summed in another order: see oracle.TOLERANCE; logits are below 5 here
CLOSE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def fp8_model():
    return build(checkpoint(), max_batch_size=MAX_BATCH_SIZE, max_seq_len=MAX_SEQ_LEN, cache_dtype="fp8")


def tokens(*shape):
    return torch.randint(2, 300, shape).tolist()


def generated(model, prompts, following):
    """Logits of the last token of each prompt and of each token behind it, ``[B, steps + 1, V]``."""
    engine = model.engine
    places = [engine.cache.allocate(len(p) + len(f)) for p, f in zip(prompts, following, strict=True)]
    logits = [engine.prefill(prompts, places, last_only=True)]
    logits += [engine.decode(list(column), places) for column in zip(*following, strict=True)]
    for place in places:
        engine.cache.release(place)
    return torch.stack(logits, 1)


def rounded_append(cache, latent, k_rope, slots):
    append_latent(cache, *unpacked_rows(packed_rows(latent, k_rope), C, latent.dtype), slots)


@torch.no_grad()
def eagerly(causal_lm, prompt, following):
    """``generated`` of one sequence by the modules themselves: pages 1, 2, ... of a cache of numbers."""
    pages = len(prompt + following) // PAGE_SIZE + 1
    caches = [torch.zeros(1 + pages, PAGE_SIZE, C + R) for _ in range(LAYERS)]
    table = torch.arange(1, 1 + pages)[None]

    def call(ids, first, **decode):
        positions = torch.arange(first, first + len(ids))
        q_start = torch.tensor([0, len(ids)], dtype=torch.int32)
        slots = PAGE_SIZE + positions
        return causal_lm(torch.tensor(ids), positions, q_start, slots=slots, caches=caches, **decode)[-1]

    logits = [call(prompt, 0)]
    for place, token in enumerate(following, start=len(prompt)):
        seqlens = torch.tensor([place + 1], dtype=torch.int32)
        logits.append(call([token], place, block_table=table, seqlens=seqlens))
    return torch.stack(logits)


@pytest.mark.parametrize("batch", range(1, MAX_BATCH_SIZE + 1))
def test_steps_of_every_batch_size_read_what_fp8_gives_back(fp8_model, batch, monkeypatch):
    # one begins with one token, one ends a page while it decodes; three sequences are padded to four
    prompts = [tokens(n) for n in (PAGE_SIZE - 3, 1, 2 * PAGE_SIZE, 30)[:batch]]
    following = tokens(batch, 6)
    logits = generated(fp8_model, prompts, following)
    monkeypatch.setattr(attention, "append", rounded_append)
    for row in range(batch):
        expected = eagerly(fp8_model.engine.model, prompts[row], following[row])
        torch.testing.assert_close(logits[row], expected, **CLOSE)


def test_logits_are_near_those_of_the_plain_cache():
    """Prefill does not read the cache. A step does, and E4M3 moves a number by up to 2**-4 of it (half a unit).

    So the values that a layer's attention mixes move by 2**-4 of their norm at most, and by about a third of that, as
    roundings are spread evenly and independent. Its weights move by what their scores move by, which is of the same
    size where scores are about one, as with these weights. Each of the two layers adds its part: 2 * 2 * 2**-4 / 3 of
    the logits' norm, were the stream nothing but attention. (A router takes other experts for a score that moved, so
    these layers have none.)
    """
    causal_lm = random_weights(replace(CONFIG, n_routed_experts=None))
    options = {"max_batch_size": 2, "max_seq_len": 128}
    models = [build(causal_lm, cache_dtype=cache_dtype, **options) for cache_dtype in ("auto", "fp8")]
    prompts, following = [tokens(50), tokens(90)], tokens(2, 8)
    plain, fp8 = (generated(model, prompts, following) for model in models)
    assert torch.equal(fp8[:, 0], plain[:, 0])
    error = (fp8[:, 1:] - plain[:, 1:]).norm(dim=-1) / plain[:, 1:].norm(dim=-1)
    assert (error > 0).all() and error.max() < 2 * 2 * 2**-4 / 3, error


def test_absorbed_and_expanded_attention_agree(fp8_model):
    """Both read the same rounded rows; each of the two is a sum in another order."""
    expanded = build(
        checkpoint(),
        max_batch_size=MAX_BATCH_SIZE,
        max_seq_len=MAX_SEQ_LEN,
        cache_dtype="fp8",
        passes=df.passes.default().without("absorb_mla"),
    )
    assert "gather_latent_fp8" in expanded.graph("before:lower", "decode_1")
    assert "mla_decode_fp8" in fp8_model.graph("before:lower", "decode_1")
    assert "gather_latent" not in fp8_model.graph("before:lower", "decode_1")
    prompts, following = [tokens(70), tokens(3)], tokens(2, 5)
    torch.testing.assert_close(
        generated(fp8_model, prompts, following), generated(expanded, prompts, following), **CLOSE
    )


def test_what_lies_in_unused_slots_does_not_matter(fp8_model):
    prompt, following = tokens(40), tokens(3, 4)
    expected = generated(fp8_model, [prompt] * 3, following)
    for layer in fp8_model.engine.cache.layers:
        layer.fill_(255)  # NaN in each of the three formats
    assert torch.equal(generated(fp8_model, [prompt] * 3, following), expected)


def test_a_call_without_places_leaves_the_cache_alone(fp8_model):
    before = [layer[1:].clone() for layer in fp8_model.engine.cache.layers]
    fp8_model(torch.tensor([tokens(7)]))
    assert all(torch.equal(layer[1:], rows) for layer, rows in zip(fp8_model.engine.cache.layers, before, strict=True))


@pytest.mark.parametrize("quantize", [None, "fp8"], ids=["float32", "fp8"])
def test_text_is_generated_with_every_pass_checked(quantize):
    model = build(checkpoint(), quantize=quantize, cache_dtype="fp8", verify=True, strict=True)
    assert len(model.generate("the quick", max_new_tokens=5, stop_token_ids=())) > 0


def test_the_report_says_what_a_token_takes(fp8_model):
    # 24 values, one scale of 4 bytes and 8 keys of 2, in each of two layers; before, 32 numbers of 4 bytes
    report = fp8_model.report.to_json()
    assert (report["cache_dtype"], report["cache_bytes_per_token"]) == ("fp8", 2 * (24 + 4 + 16))
    assert "88 bytes per token, 10.9x less than multi-head, fp8" in str(fp8_model.report)
    assert tiny_model().report.cache_dtype == "float32"
    assert [layer.shape[-1] for layer in fp8_model.engine.cache.layers] == [44, 44]


def test_graphs_of_the_two_formats_are_kept_apart(monkeypatch):
    keys, key = [], build_module.graph_key
    monkeypatch.setattr(build_module, "graph_key", lambda *args: keys.append(key(*args)) or keys[-1])
    causal_lm = random_weights(ONE_LAYER)
    for cache_dtype in ("auto", "fp8", "auto"):
        build(causal_lm, cache_dtype=cache_dtype)
    assert keys[0] == keys[2] != keys[1]


def test_bytes_per_token_of_deepseek_v3():
    v3 = df.PRESETS["v3-671b"]()
    assert latent_bytes_per_token(v3, FP8) == 61 * 656


def test_a_cache_takes_the_bytes_it_was_said_to():
    room = {"max_batch_size": 3, "max_seq_len": 65}
    cache = LatentCache(TINY, dtype=FP8, device=torch.device("cpu"), **room)
    assert sum(layer.nbytes for layer in cache.layers) == cache_bytes(TINY, FP8, **room)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build(ONE_LAYER, cache_dtype="bf16"), "want cache_dtype 'auto' or 'fp8', got 'bf16'"),
        (lambda: build(ONE_LAYER, cache_dtype=torch.float8_e4m3fn), "want .* 'fp8', got torch.float8_e4m3fn"),
        (
            lambda: build(replace(ONE_LAYER, kv_lora_rank=30), cache_dtype="fp8"),
            "want kv_lora_rank a multiple of 4 and qk_rope_head_dim of 2 for cache_dtype 'fp8', got 30 and 8",
        ),
        (
            lambda: build(ONE_LAYER, cache_dtype="fp8", training=df.Training(steps=1)),
            "want no cache_dtype in training, where there is no cache, got 'fp8'",
        ),
        (
            lambda: build(torch.nn.Linear(2, 2), cache_dtype="fp8"),
            "want no cache_dtype for a module that has no latent cache, got 'fp8'",
        ),
    ],
    ids=["unknown", "dtype", "width", "training", "module"],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=f"build: {message}"):
        call()


def test_a_gpu_that_does_not_know_fp8_is_refused(monkeypatch):
    monkeypatch.setattr(latent_cache.torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8\.9 or later, for cache_dtype 'fp8', got 8\.0"):
        latent_cache.cached_dtype("fp8", CONFIG, torch.bfloat16, torch.device("cuda"))


def test_a_cache_without_slots_is_refused():
    causal_lm = random_weights(ONE_LAYER)
    ids, q_start = torch.tensor([3, 4]), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="MLA: want slots to write the cache at, got None"):
        causal_lm(ids, torch.arange(2), q_start, caches=[torch.zeros(2, PAGE_SIZE, C + R)])
