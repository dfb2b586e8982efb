"""Steps with a profile and without take turns, and the first ones of a block are not counted."""

import contextlib

import pytest

from benchmark_scripts import load_script

cost = load_script("profile_cost")


def test_blocks_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    @contextlib.contextmanager
    def profile(model, **options):
        calls.append(f"profile {model}")
        yield
        calls.append("done")

    monkeypatch.setattr(cost.df, "profile", profile)
    monkeypatch.setattr(cost, "timed", lambda call: call())
    times = iter(range(10_000))

    def step() -> float:
        calls.append("step")
        return float(next(times))

    found = cost.blocks("model", step, lambda: calls.append("other") or 0.5, steps=1, count=2)
    block = [*["step"] * 3, "profile model", *["step"] * 3, "done", *["other"] * 3]
    assert calls == block * 3
    # two of three steps warm up, and so does the first block: off is left with the third step of blocks 1 and 2
    assert found[cost.OFF].median == (8 + 14) / 2 and found[cost.ON].median == (11 + 17) / 2
    assert found[cost.NEVER].median == 0.5
