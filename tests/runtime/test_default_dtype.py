"""A program's default dtype says nothing about ours."""

from collections.abc import Iterator

import pytest
import torch

from tiny_model import CONFIG, build, checkpoint


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("source", ["config", "checkpoint"])
def test_weights_and_draws_do_not_depend_on_it(source: str, default: torch.dtype) -> None:
    def story() -> tuple[list[int], set[torch.dtype]]:
        model = build(CONFIG if source == "config" else checkpoint())
        drawn = model.generate([5, 6], max_new_tokens=12, temperature=0.7, top_p=0.9, stop_token_ids=())
        causal_lm = model.engine.model
        return drawn, {t.dtype for t in (*causal_lm.parameters(), *causal_lm.buffers())}

    here = story()
    assert torch.get_default_dtype() == default
    torch.set_default_dtype(torch.float32)
    assert here == story()
    assert here[1] == {torch.float32}
