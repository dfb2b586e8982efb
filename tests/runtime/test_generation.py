"""From prompts to tokens and text: one and many, greedy and drawn, and conversations."""

import json

import torch

from deepfuse.runtime.generation_config import GenerationConfig
from deepfuse.runtime.tokenizer import Tokenizer
from prompts import ON, PROMPTS, TEXTS
from tiny_model import BOS, MAX_BATCH_SIZE, MAX_SEQ_LEN, TEMPLATE, eager_logits, write_checkpoint

DRAWN = {"stop_token_ids": (), "temperature": 1.0, "max_new_tokens": 12}


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
    assert Tokenizer.from_folder(folder).chat([{"role": "user", "content": "x"}]) == "[user] x[assistant]"
