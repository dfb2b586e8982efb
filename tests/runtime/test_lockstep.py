"""What a process tells the others instead of the next call."""

import re

import pytest
import torch

from deepfuse.blocks.axis import Axis
from deepfuse.runtime import lockstep
from deepfuse.runtime.axes import Axes
from deepfuse.runtime.lockstep import MOST, Call, Lockstep, Trouble


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("want a, got 'b' in\n  line two", "want a, got 'b' in\n  line two"),
        # of four bytes each, behind ValueError and the end of its line, cut where one ends
        ("\U0001f600" * 3 * MOST, "\U0001f600" * ((MOST - len("ValueError\n")) // 4)),
        ('"' * 3 * MOST, '"' * (MOST - len("ValueError\n"))),
        ("a lone \ud83d of two", "a lone ? of two"),
        ("", ""),
    ],
)
def test_an_error_of_any_text_travels(text, told, monkeypatch):
    # of all processes, the largest of each number: this one's
    monkeypatch.setattr(lockstep, "largest_over", lambda numbers, axis: numbers)
    together = Lockstep(Axes(expert=Axis("expert", "0", 2, 1), rank=1, size=2), torch.device("cpu"))
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        together._over_expert(Call(0, 0), Trouble(1, "ValueError", text))
