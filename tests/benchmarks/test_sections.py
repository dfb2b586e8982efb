"""Sections of a text, and the charts beside them."""

import re

import pytest

from benchmark_scripts import load_script

sections = load_script("sections")
line_chart = load_script("line_chart").line_chart

TEXT = "a\n<!-- made by x: one -->\nold\n<!-- end of x: one -->\nb\n<!-- made by x: two -->\n<!-- end of x: two -->\n"


def test_a_section_and_no_other_is_exchanged() -> None:
    changed = sections.with_section(TEXT, "x: two", "\nnew\n\n")
    assert changed == TEXT.replace("two -->\n<!--", "two -->\nnew\n<!--")
    assert sections.section(changed, "x: two") == "new\n" and sections.section(changed, "x: one") == "old\n"
    assert sections.with_section(changed, "x: two", "new") == changed


def test_a_section_that_is_not_there_once_is_refused() -> None:
    with pytest.raises(ValueError, match="want 'x: three' once, got it 0 times"):
        sections.section(TEXT, "x: three")
    with pytest.raises(ValueError, match="want 'x: one' once, got it 2 times"):
        sections.with_section(TEXT + TEXT, "x: one", "new")


def test_a_table() -> None:
    assert sections.table(["a", "b"], [["1", "2"], ["3", "4"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n| 3 | 4 |\n"


def test_a_chart_places_points_by_their_logarithms() -> None:
    svg = line_chart("Title <", "x", "y", {"a & b": [(1, 1), (4, 10), (16, 100)], "c": [(1, 0), (16, 100)]})
    lines = [[tuple(map(float, p.split(","))) for p in path.split()] for path in re.findall(r'points="(.*?)"', svg)]
    (left, bottom), middle, (right, top) = lines[0]
    assert middle == (pytest.approx((left + right) / 2, abs=0.1), pytest.approx((bottom + top) / 2, abs=0.1))
    # what is zero has no place
    assert lines[1] == [(right, top)] and left < right and top < bottom
    assert "Title &lt;" in svg and "a &amp; b" in svg and ">16<" in svg and ">100<" in svg


def test_a_chart_of_nothing_or_of_negative_numbers_is_refused() -> None:
    for series in ({"a": []}, {"a": [(1, 0)]}, {"a": [(1, -1)]}):
        with pytest.raises(ValueError, match="want positive points"):
            line_chart("", "", "", series)
