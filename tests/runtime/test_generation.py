"""From prompts to tokens and text: batches, stopping, streaming, seeds, interrupts, and prompts that cannot be served."""

import json

import numpy as np
import pytest
import torch

from deepfuse.runtime.generation import Sampling
from deepfuse.runtime.generation_config import GenerationConfig
from deepfuse.runtime.latent_cache import CacheFullError
from tiny_model import (
    BOS,
    EOS,
    MAX_BATCH_SIZE,
    MAX_SEQ_LEN,
    TEMPLATE,
    eager_logits,
    tiny_model,
    write_checkpoint,
)

PROMPTS = [[5, 6, 7], [100], [200, 3, 44, 250, 17, 99, 3, 3, 12], list(range(40, 110))]
TEXTS = ["the quick brown fox", "dozen", "pack my box with five"]
ON = {"stop_token_ids": (), "temperature": 0.0}
"""Greedy, to the end."""
DRAWN = {"stop_token_ids": (), "temperature": 1.0, "max_new_tokens": 12}


@pytest.fixture
def model():
    model = tiny_model()
    free = model.engine.cache.free_pages
    yield model
    assert model.engine.cache.free_pages == free, "pages were kept"


# what comes for what


def test_greedy_takes_the_likeliest_token(model):
    (generated,) = model.generate([PROMPTS[0]], max_new_tokens=20, **ON)
    logits = eager_logits(model, PROMPTS[0] + generated)[2:-1]
    chosen = logits.gather(-1, torch.tensor(generated)[:, None])[:, 0]
    # float32 in another order: equally likely within 1e-4 of logits near 3
    assert ((logits.amax(-1) - chosen) <= 1e-4).all()
    assert len(generated) == 20


def test_one_prompt_gives_one_answer_and_a_list_a_list(model):
    ids = model.generate(PROMPTS[0], max_new_tokens=5, **ON)
    assert len(ids) == 5 and all(type(i) is int for i in ids)
    assert model.generate([PROMPTS[0]], max_new_tokens=5, **ON) == [ids]
    text = model.generate(TEXTS[0], max_new_tokens=5, **ON)
    assert isinstance(text, str) and text
    assert model.generate([TEXTS[0]], max_new_tokens=5, **ON) == [text]
    assert model.generate([], max_new_tokens=5) == []


def test_text_is_the_tokens_decoded(model):
    ids = model.tokenizer.encode(TEXTS[0])
    assert ids[0] == BOS
    generated = model.generate(ids, max_new_tokens=15, **ON)
    assert model.generate(TEXTS[0], max_new_tokens=15, **ON) == model.tokenizer.decode(generated)


def test_a_batch_of_unequal_lengths_is_its_prompts_one_by_one(model):
    together = model.generate(PROMPTS, max_new_tokens=12, **ON)
    assert together == [model.generate(p, max_new_tokens=12, **ON) for p in PROMPTS]


def test_more_prompts_than_fit_at_once_wait(model):
    prompts = [[3 + i] * (1 + 5 * i) for i in range(2 * MAX_BATCH_SIZE + 1)]
    together = model.generate(prompts, max_new_tokens=6, **ON)
    assert together == [model.generate(p, max_new_tokens=6, **ON) for p in prompts]


def test_a_sequence_that_ends_makes_room(model, monkeypatch):
    """Prompts that end at once are replaced while another runs on."""
    first = [model.generate(p, max_new_tokens=1, **ON)[0] for p in PROMPTS]
    prompts = [PROMPTS[1], PROMPTS[0], *[PROMPTS[2]] * (2 * MAX_BATCH_SIZE)]
    assert first[2] != first[1]
    sizes = []
    prefill = model.engine.prefill
    monkeypatch.setattr(model.engine, "prefill", lambda p, *a, **k: sizes.append(len(p)) or prefill(p, *a, **k))
    answers = model.generate(prompts, max_new_tokens=6, temperature=0.0, stop_token_ids=(first[2],))
    assert answers[2:] == [[]] * (2 * MAX_BATCH_SIZE)
    assert answers[0] != [] and sum(sizes) == len(prompts) and len(sizes) > 2


def test_speed_is_reported(model):
    model.generate(PROMPTS[:2], max_new_tokens=4, **ON)
    assert model.report.prefill_tokens_per_second > 0 and model.report.decode_tokens_per_second > 0
    assert "decode" in str(model.report)


# where it ends


def test_stop_tokens_end_a_sequence_and_are_not_part_of_it(model):
    ids = model.generate(PROMPTS[0], max_new_tokens=20, **ON)
    stop = ids[8]
    cut = ids.index(stop)
    assert model.generate(PROMPTS[0], max_new_tokens=20, temperature=0.0, stop_token_ids=(stop,)) == ids[:cut]
    others = model.generate([PROMPTS[0], PROMPTS[3]], max_new_tokens=20, temperature=0.0, stop_token_ids=(stop, 1))
    assert others[0] == ids[:cut]


@pytest.mark.parametrize("eos", ["config", "generation_config"])
def test_end_of_text_tokens_come_from_the_checkpoint(model, monkeypatch, eos):
    logits = torch.zeros(1, model.config.vocab_size)
    logits[0, EOS if eos == "config" else 9] = 1
    monkeypatch.setattr(model.engine, "prefill", lambda *a, **k: logits)
    monkeypatch.setattr(model.engine, "decode", lambda *a, **k: logits)
    if eos == "generation_config":
        monkeypatch.setattr(model, "defaults", GenerationConfig(eos_token_id=(9, 10)))
    assert model.generate([7], max_new_tokens=5) == []
    assert model.generate([7], max_new_tokens=5, stop_token_ids=()) == [int(logits.argmax())] * 5


def test_stop_strings_end_a_text(model):
    whole = model.generate(TEXTS[0], max_new_tokens=40, **ON)
    assert len(whole) > 20
    # from the middle of one token to the middle of another
    for begin, length in ((7, 1), (9, 4), (3, 9)):
        stop = whole[begin : begin + length]
        expected = whole[: whole.index(stop)]
        assert model.generate(TEXTS[0], max_new_tokens=40, stop=[stop, "no such text"], **ON) == expected
        assert "".join(model.generate(TEXTS[0], max_new_tokens=40, stop=[stop], stream=True, **ON)) == expected


def test_a_stop_string_may_span_tokens(model):
    ids = model.generate(model.tokenizer.encode(TEXTS[1]), max_new_tokens=30, **ON)
    pieces = [model.tokenizer.decode([i]) for i in ids]
    at = next(i for i in range(2, 29) if "\ufffd" not in pieces[i] + pieces[i + 1] and pieces[i] and pieces[i + 1])
    stop = pieces[at][-1] + pieces[at + 1][0]
    whole = model.generate(TEXTS[1], max_new_tokens=30, **ON)
    assert model.generate(TEXTS[1], max_new_tokens=30, stop=stop, **ON) == whole[: whole.index(stop)]


def test_a_stop_string_ends_its_text_only(model):
    whole = model.generate(TEXTS, max_new_tokens=30, **ON)
    stop = whole[1][5:8]
    cut = model.generate(TEXTS, max_new_tokens=30, stop=[stop], **ON)
    assert cut == [text.partition(stop)[0] for text in whole] and cut[1] != whole[1]


def test_decoding_goes_no_further_than_the_stop_string(model, monkeypatch):
    whole = model.generate(TEXTS[0], max_new_tokens=40, **ON)
    steps = []
    decode = model.engine.decode
    monkeypatch.setattr(model.engine, "decode", lambda *a: steps.append(1) or decode(*a))
    model.generate(TEXTS[0], max_new_tokens=40, stop=[whole[4:6]], **ON)
    assert 0 < len(steps) < 20


# as it comes


def test_streamed_text_is_the_text(model):
    pieces = list(model.generate(TEXTS[0], max_new_tokens=25, stream=True, **ON))
    assert "".join(pieces) == model.generate(TEXTS[0], max_new_tokens=25, **ON)
    assert len(pieces) > 5 and all(pieces)


def test_streamed_ids_are_the_ids(model):
    assert list(model.generate(PROMPTS[2], max_new_tokens=9, stream=True, **ON)) == model.generate(
        PROMPTS[2], max_new_tokens=9, **ON
    )
    assert list(model.generate([PROMPTS[2]], max_new_tokens=2, stream=True, **ON)) == model.generate(
        PROMPTS[2], max_new_tokens=2, **ON
    )


def test_several_streams_come_with_their_numbers(model):
    texts = [""] * len(TEXTS)
    order = []
    for number, piece in model.generate(TEXTS, max_new_tokens=10, stream=True, **ON):
        texts[number] += piece
        order.append(number)
    assert texts == model.generate(TEXTS, max_new_tokens=10, **ON)
    assert order != sorted(order), "one after the other is no stream"


def test_a_piece_comes_before_the_next_step(model, monkeypatch):
    steps = []
    decode = model.engine.decode
    monkeypatch.setattr(model.engine, "decode", lambda *a: steps.append(1) or decode(*a))
    stream = model.generate(PROMPTS[0], max_new_tokens=5, stream=True, **ON)
    assert steps == []
    for i in range(3):
        next(stream)
        assert len(steps) == i
    del stream


def test_mistakes_are_told_before_the_first_piece(model):
    with pytest.raises(ValueError, match="want at least one token"):
        model.generate([[]], stream=True)


def test_an_abandoned_stream_gives_its_pages_back(model):
    free = model.engine.cache.free_pages
    for pieces_read in (0, 1, 3):
        stream = model.generate(PROMPTS, max_new_tokens=50, stream=True, **ON)
        for _ in range(pieces_read):
            next(stream)
        assert (model.engine.cache.free_pages < free) == (pieces_read > 0)
        stream.close()
        assert model.engine.cache.free_pages == free
    single = model.generate(PROMPTS[0], max_new_tokens=50, stream=True, **ON)
    next(single)
    del single
    assert model.engine.cache.free_pages == free


def test_two_streams_do_not_disturb_each_other(model):
    expected = [model.generate(p, max_new_tokens=70, **ON) for p in PROMPTS[:2]]
    first, second = (model.generate(p, max_new_tokens=70, stream=True, **ON) for p in PROMPTS[:2])
    got = [[], []]
    for i in range(70):
        got[0].append(next(first))
        if i % 3 == 0:
            got[1] += [next(second) for _ in range(2)]
    got[1] += list(second)
    assert list(first) == [] and got == expected


def test_other_calls_during_a_stream_do_not_disturb_it(model):
    expected = model.generate(PROMPTS[0], max_new_tokens=12, **ON)
    got = []
    for token in model.generate(PROMPTS[0], max_new_tokens=12, stream=True, **ON):
        got.append(token)
        model(torch.randint(2, 300, (3, 70)))
        model.score([PROMPTS[3]])
        model.generate(PROMPTS[1], max_new_tokens=2, **ON)
    assert got == expected


# draws


def test_a_seed_gives_the_same_text_again(model):
    first = model.generate(PROMPTS, seed=3, **DRAWN)
    assert first == model.generate(PROMPTS, seed=3, **DRAWN)
    assert first != model.generate(PROMPTS, seed=4, **DRAWN)
    assert first != model.generate(PROMPTS, **{**DRAWN, "temperature": 0.0})


def test_a_draw_does_not_depend_on_the_rest_of_the_batch(model):
    together = model.generate(PROMPTS, seed=7, **DRAWN)
    # prompt i draws with seed + i
    assert together == [model.generate(p, seed=7 + i, **DRAWN) for i, p in enumerate(PROMPTS)]
    other = model.generate([PROMPTS[3], PROMPTS[1], PROMPTS[0]], seed=7, **DRAWN)
    assert other[1] == together[1]


def test_filters_that_leave_one_token_are_greedy(model):
    greedy = model.generate(PROMPTS, max_new_tokens=12, **ON)
    assert model.generate(PROMPTS, top_k=1, **DRAWN) == greedy
    assert model.generate(PROMPTS, top_p=1e-6, **DRAWN) == greedy
    assert model.generate(PROMPTS, **{**DRAWN, "temperature": 1e-4}) == greedy


def test_what_is_not_said_comes_from_the_generation_config(model, monkeypatch):
    monkeypatch.setattr(model, "defaults", GenerationConfig(temperature=1.5, top_k=20, top_p=0.9, max_new_tokens=7))
    drawn = model.generate(PROMPTS[0], seed=2, stop_token_ids=())
    assert len(drawn) == 7
    assert drawn == model.generate(
        PROMPTS[0], seed=2, temperature=1.5, top_k=20, top_p=0.9, max_new_tokens=7, stop_token_ids=()
    )
    assert drawn != model.generate(PROMPTS[0], seed=2, temperature=0.0, stop_token_ids=())


def test_the_default_length_is_what_fits(model, monkeypatch):
    monkeypatch.setattr(model, "defaults", GenerationConfig(max_new_tokens=1000))
    assert len(model.generate([5] * (MAX_SEQ_LEN - 3), **ON)) == 3


# interrupts


@pytest.mark.parametrize("during", ["prefill", "decode"])
def test_an_interrupt_returns_what_there_is(model, monkeypatch, during):
    expected = model.generate(PROMPTS[:2], max_new_tokens=20, **ON)
    calls = []
    original = getattr(model.engine, during)

    def interrupted(*args, **kwargs):
        calls.append(1)
        if during == "prefill" or len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(model.engine, during, interrupted)
    got = model.generate(PROMPTS[:2], max_new_tokens=20, **ON)
    tokens = 0 if during == "prefill" else 4
    assert got == [ids[:tokens] for ids in expected]
    assert model.generate(PROMPTS[0], max_new_tokens=1, **ON) == ([] if during == "prefill" else expected[0][:1])


def test_an_interrupted_stream_gives_its_pages_back(model, monkeypatch):
    stream = model.generate(TEXTS[0], max_new_tokens=20, stream=True, **ON)
    next(stream)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.engine, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream)


def test_another_error_gives_the_pages_back(model, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(model.engine, "prefill", broken)
    with pytest.raises(RuntimeError, match="broken"):
        model.generate(PROMPTS, max_new_tokens=3)


# logits and scores


def test_logits_of_padded_rows(model):
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10], [11, 12, 0, 0], [0, 13, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]])
    logits = model(ids, attention_mask=mask)
    last = model(ids, attention_mask=mask.bool(), last_only=True)
    assert logits.dtype == torch.float32 and logits.shape == (4, 4, 300)
    for row, of_row, last_of_row, tokens in zip(ids, logits, last, mask.bool(), strict=True):
        expected = eager_logits(model, row[tokens].tolist())
        torch.testing.assert_close(of_row[tokens], expected, atol=1e-4, rtol=0.0)
        torch.testing.assert_close(last_of_row, expected[-1], atol=1e-4, rtol=0.0)
        assert not of_row[~tokens].any()


def test_more_rows_than_fit_at_once(model):
    ids = torch.randint(2, 300, (MAX_BATCH_SIZE + 3, 9))
    logits = model(ids.to(torch.int32))
    for row, of_row in zip(ids, logits, strict=True):
        torch.testing.assert_close(of_row, eager_logits(model, row.tolist()), atol=1e-4, rtol=0.0)
    assert model(ids[:0]).shape == (0, 9, 300)
    assert model(ids[:0], last_only=True).shape == (0, 300)


def test_scores_are_log_probabilities(model):
    scores = model.score(PROMPTS)
    for prompt, score in zip(PROMPTS, scores, strict=True):
        expected = eager_logits(model, prompt).log_softmax(-1)[:-1]
        expected = expected.gather(-1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0]
        assert score.shape == (len(prompt) - 1,)
        torch.testing.assert_close(score, expected, atol=1e-4, rtol=0.0)
        assert float(score.sum()) == pytest.approx(float(expected.sum()), abs=1e-3)
    assert float(scores[3].sum()) < -100


def test_all_tokens_of_a_text_are_scored(model):
    ids = model.tokenizer.encode(TEXTS[0])
    (of_text,) = model.score([TEXTS[0]])
    assert len(of_text) == len(ids) - 1 == len(model.tokenizer.encode(TEXTS[0], add_bos=False))
    assert torch.equal(of_text, model.score([ids])[0])


# conversations


def test_chat_answers_with_text(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    messages = [{"role": "user", "content": "the lazy dog"}]
    ids = model.tokenizer.encode("[user] the lazy dog[assistant]", add_bos=False)
    answer = model.chat(messages, max_new_tokens=9, **ON)
    assert answer == model.tokenizer.decode(model.generate(ids, max_new_tokens=9, **ON))
    assert "".join(model.chat(messages, max_new_tokens=9, stream=True, **ON)) == answer
    assert model.chat(messages, max_new_tokens=9, stop=answer[2], **ON) == answer[: answer.index(answer[2])]


def test_the_template_of_a_checkpoint_is_used(tmp_path):
    settings = {"chat_template": TEMPLATE, "bos_token": "<bos>", "add_bos_token": False}
    folder = write_checkpoint(tmp_path, files={"tokenizer_config.json": json.dumps(settings).encode()})
    from deepfuse.runtime.tokenizer import Tokenizer

    assert Tokenizer.from_folder(folder).chat([{"role": "user", "content": "x"}]) == "[user] x[assistant]"


# what cannot be done

TOO_LONG = [7] * (MAX_SEQ_LEN + 1)
REFUSED = {
    "empty prompt": (lambda m: m.generate([[5], []]), "want at least one token a prompt, got none in prompt 1"),
    "prompt too long": (
        lambda m: m.generate(TOO_LONG),
        rf"want at most max_seq_len = {MAX_SEQ_LEN} tokens, got {MAX_SEQ_LEN + 1} in prompt 0; build with a larger",
    ),
    "no room behind the prompt": (
        lambda m: m.generate(TOO_LONG[1:]),
        rf"want prompts shorter than max_seq_len = {MAX_SEQ_LEN} tokens, got {MAX_SEQ_LEN}; build",
    ),
    "past the cache": (
        lambda m: m.generate([[5], [6] * 250], max_new_tokens=7),
        rf"want prompt \+ max_new_tokens <= max_seq_len = {MAX_SEQ_LEN}, got 250 \+ 7; ask for at most 6, or build",
    ),
    "id too large": (lambda m: m.generate([5, 300]), r"want token ids in 0 \.\. 299, got 300 in prompt 0"),
    "negative id": (lambda m: m.generate([[5], [-1]]), r"want token ids in 0 \.\. 299, got -1 in prompt 1"),
    "no new tokens": (lambda m: m.generate([5], max_new_tokens=0), "want max_new_tokens >= 1, got 0"),
    "temperature": (lambda m: m.generate([5], temperature=-0.1), "want temperature in 0 .. 1e6, got -0.1"),
    "temperature nan": (lambda m: m.generate([5], temperature=float("nan")), "want temperature in 0 .. 1e6, got nan"),
    "top_k": (lambda m: m.generate([5], top_k=-1), "want top_k >= 0 and below .*, got -1"),
    "top_p 0": (lambda m: m.generate([5], top_p=0.0), r"want 0 < top_p <= 1, got 0\.0"),
    "top_p 2": (lambda m: m.generate([5], top_p=2.0), r"want 0 < top_p <= 1, got 2\.0"),
    "stop strings of ids": (
        lambda m: m.generate([5], stop=["a"]),
        "want string prompts with stop strings, got token ids",
    ),
    "empty stop string": (lambda m: m.generate("a", stop=[""]), "want stop strings of at least one character"),
    "score too long": (lambda m: m.score([TOO_LONG]), f"want at most max_seq_len = {MAX_SEQ_LEN} tokens"),
    "score nothing": (lambda m: m.score([[]]), "want at least one token a prompt"),
    "logits too long": (lambda m: m(torch.tensor([TOO_LONG])), f"want at most max_seq_len = {MAX_SEQ_LEN} tokens"),
    "logits of nothing": (lambda m: m(torch.zeros(2, 0, dtype=torch.int64)), "want at least one token a prompt"),
    "logits of padding": (
        lambda m: m(torch.tensor([[5]]), torch.tensor([[0]])),
        "want at least one token a prompt, got none in prompt 0",
    ),
    "logits of an id too large": (lambda m: m(torch.tensor([[300]])), r"want token ids in 0 \.\. 299, got 300"),
    "one dimension": (lambda m: m(torch.tensor([5, 6])), r"want input_ids \[B, T\] of integers, got \[2\] torch.int64"),
    "floats": (lambda m: m(torch.ones(1, 2)), r"want input_ids \[B, T\] of integers, got \[1, 2\] torch.float32"),
    "mask of another shape": (
        lambda m: m(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 2)),
        r"want attention_mask \[1, 3\], got \[1, 2\]",
    ),
    "padding between tokens": (
        lambda m: m(torch.ones(1, 3, dtype=torch.int64), torch.tensor([[1, 0, 1]])),
        "want padding on one side of each sequence, got padding between tokens or on both",
    ),
    "padding on both sides": (
        lambda m: m(torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [0, 1, 0]])),
        "want padding on one side of each sequence, got padding between tokens or on both",
    ),
    "no chat template": (
        lambda m: m.chat([{"role": "user", "content": "hello"}]),
        "chat: want a model with a chat template .* got one without; use generate",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused(model, name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(model)


def test_strings_and_ids_do_not_mix(model):
    with pytest.raises(TypeError, match="want prompts all strings or all token ids, got both"):
        model.generate(["text", [5]])


def test_a_model_without_a_tokenizer_takes_ids_only(model, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", None)
    assert len(model.generate([5], max_new_tokens=2, **ON)) == 2
    for call in (lambda: model.generate("text"), lambda: model.score(["text"]), lambda: model.chat([])):
        with pytest.raises(
            ValueError, match=r"want a tokenizer .* got a model without tokenizer\.json; pass token ids"
        ):
            call()


def test_running_streams_may_fill_the_cache(model):
    streams = [
        model.generate([[5]], max_new_tokens=MAX_SEQ_LEN - 1, stream=True, **ON) for _ in range(MAX_BATCH_SIZE + 1)
    ]
    for stream in streams[:-1]:
        next(stream)
    with pytest.raises(CacheFullError, match="want 4 pages of 64 tokens, 0 are free; finish running generations first"):
        next(streams[-1])
    for stream in streams:
        stream.close()
    assert len(model.generate([5], max_new_tokens=3, **ON)) == 3


def test_numpy_and_tensor_prompts_are_token_ids(model):
    expected = model.generate(PROMPTS[0], max_new_tokens=3, **ON)
    assert model.generate([np.array(PROMPTS[0])], max_new_tokens=3, **ON) == [expected]
    assert model.generate([torch.tensor(PROMPTS[0])], max_new_tokens=3, **ON) == [expected]


def test_sampling_is_checked_where_it_is_made():
    assert Sampling().max_new_tokens is None
    with pytest.raises(ValueError, match="want max_new_tokens >= 1"):
        Sampling(max_new_tokens=-1)
