"""Logits and scores of prompts: padded, in batches, of texts."""

import pytest
import torch

from prompts import PROMPTS, TEXTS
from tiny_model import MAX_BATCH_SIZE, eager_logits


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
