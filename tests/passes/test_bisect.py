"""The first pass whose removal helps, and graphs side by side."""

import pytest

from deepfuse.passes.bisect import bisect
from deepfuse.passes.compare import side_by_side


def test_the_first_pass_whose_removal_helps():
    tried = []

    def check(name):
        tried.append(name)
        return name in ("b", "c")

    assert bisect(check, ["a", "b", "c"]) == "b"
    assert tried == [None, "a", "b"]


def test_no_single_pass_is_to_blame():
    assert bisect(lambda name: False, ["a", "b"]) is None


def test_a_check_that_passes_is_refused():
    with pytest.raises(ValueError, match="want a check that fails with all passes"):
        bisect(lambda name: True, ["a"])


def test_side_by_side_shows_where_graphs_differ():
    before = "\n".join(["same"] * 9 + ["old = torch.ops.aten.add(a, b)", "gone", "last"])
    after = "\n".join(["same"] * 9 + ["new = torch.ops.aten.mul(a, b)", "last"])
    lines = side_by_side(before, after, width=63).splitlines()
    assert lines == [f"{'same':<30}   same"] * 3 + [
        f"{'old = aten.add(a, b)':<30} | new = aten.mul(a, b)",
        f"{'gone':<30} |",
        f"{'last':<30}   last",
    ]
    assert side_by_side("a", "a") == "no difference"


def test_long_lines_are_broken():
    assert side_by_side("x" * 12, "y", width=23).splitlines() == ["xxxxxxxxxx | y", "xx         |"]
