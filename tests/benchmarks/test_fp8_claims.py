"""What the documentation says of FP8 follows from the formats, and is what the script computes."""

import json

import pytest
import torch

from benchmark_scripts import load_script

claims = load_script("fp8_claims")
sections = load_script("sections")
SMALL = {"rows": 4, "groups": 4}


@pytest.mark.parametrize("outlier", [64, 195])
def test_scales_differ_as_the_largest_elements_do(outlier: int) -> None:
    # both are a float32 quotient by 448
    assert claims.scale_ratio(outlier) == pytest.approx(outlier, rel=2**-22)


def test_an_outlier_costs_floating_point_nothing_until_elements_leave_the_range() -> None:
    calm, claimed, huge = (claims.outlier_errors(outlier, **SMALL) for outlier in (1, claims.CLAIMED, 2**20))
    for name, worst in (("E4M3", 1 / 16), ("E5M2", 1 / 8)):
        # a scale for each group does not see another group's outlier
        assert calm[name]["1x128"] == claimed[name]["1x128"] == huge[name]["1x128"] < worst
        # half a last place bounds both; another scale rounds other elements up
        assert claimed[name]["one scale"] < worst and claimed[name]["times"] < 1.2
    # 448 / 2**20 is below half of the smallest subnormal 2**-9: all is lost, and more cannot be
    assert huge["E4M3"]["one scale"] == 1.0
    assert huge["E4M3"]["times"] == pytest.approx(1 / huge["E4M3"]["1x128"]) and huge["E4M3"]["times"] < claims.CLAIMED
    # E5M2 has nearly 30 octaves at full precision, 57344 / 2**-14
    assert huge["E5M2"]["one scale"] < 1 / 8


def test_equal_steps_pay_the_ratio_of_the_scales_until_nothing_is_left() -> None:
    errors = {outlier: claims.outlier_errors(outlier)["INT8"] for outlier in (4, 16, 195, 1024)}
    for outlier in (4, 16):
        # a step of s is off by s / sqrt(12) on average, whatever is rounded
        assert errors[outlier]["times"] == pytest.approx(outlier, rel=0.03)
    assert 0.9 < errors[195]["one scale"] < errors[1024]["one scale"] == 1.0


def test_a_bit_of_mantissa_halves_the_error_and_a_bit_of_exponent_keeps_what_is_small() -> None:
    near, wide = (claims.format_errors(spread, **SMALL) for spread in (1.0, 6.0))
    assert near["E5M2"]["error"] == pytest.approx(2 * near["E4M3"]["error"], rel=0.1)
    assert near["E5M2"]["of one"] == pytest.approx(2 * near["E4M3"]["of one"], rel=0.1)
    assert near["E4M3"]["lost"] == near["E5M2"]["lost"] == 0.0
    assert wide["E4M3"]["lost"] > 0.2 and wide["E5M2"]["lost"] < 0.02
    assert wide["E4M3"]["of one"] > wide["E5M2"]["of one"] and wide["E4M3"]["error"] < wide["E5M2"]["error"]


def test_sums_lose_with_k_unless_promoted() -> None:
    short, long = (claims.sum_errors(K, "positive", size=8) for K in (256, 4096))
    # cut off toward zero, terms of one sign lose in proportion to the sum so far: twice the K, twice the share
    assert long["14 bits"] > 8 * short["14 bits"] and long["14 bits"] > 0.02
    promoted = [errors["14 bits, promoted every 128"] for errors in (short, long)]
    assert promoted[1] == pytest.approx(promoted[0], rel=0.1) and promoted[1] < 1e-3
    assert long["float32"] < 1e-6
    one = claims.sum_errors(128, "normal", size=8)
    assert one["14 bits"] == one["14 bits, promoted every 128"]
    assert claims.sum_errors(4096, "normal", size=8)["14 bits"] > 4 * one["14 bits"]


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(claims.RESULTS.read_text())


def test_the_results_are_those_of_the_script(results: dict) -> None:
    # other versions of torch may draw other numbers, of which there are tens of thousands in each figure
    again = claims.outlier_errors(claims.CLAIMED)
    for name, found in results["outlier"][str(claims.CLAIMED)].items():
        assert again[name] == pytest.approx(found, rel=0.05)
    assert results["scale ratio"] == {str(claims.CLAIMED): pytest.approx(claims.CLAIMED)}
    assert claims.format_errors(2.0)["E4M3"]["error"] == pytest.approx(
        results["formats"]["2.0"]["E4M3"]["error"], rel=0.1
    )
    assert claims.sum_errors(512, "positive") == pytest.approx(results["sums"]["positive"]["512"], rel=0.1, abs=1e-7)
    assert results.keys() == {"torch", "outlier", "scale ratio", "formats", "sums"}
    assert list(results["outlier"]) == [str(outlier) for outlier in sorted(claims.OUTLIERS)]
    assert set(results["formats"]) == set(map(str, claims.SPREADS))


def test_tables_and_figures_show_the_results(results: dict) -> None:
    text = claims.TEXT.read_text()
    for name, content in claims.tables(results).items():
        assert sections.section(text, name) == content, "run python benchmarks/fp8_claims.py"
    drawn = claims.figures(results)
    for name, svg in drawn.items():
        assert (claims.ROOT / "docs" / "figures" / name).read_text() == svg, "run python benchmarks/fp8_claims.py"
        assert f"](figures/{name})" in text


def test_the_text_says_what_the_results_say(results: dict) -> None:
    """Figures in sentences, of which no table is made."""
    claimed = results["outlier"][str(claims.CLAIMED)]
    assert f"{claimed['E4M3']['one scale']:.1%}" == f"{claimed['E4M3']['1x128']:.1%}" == "2.6%"
    assert round(1 / claimed["E4M3"]["1x128"]) == 39
    assert 448 / 2**-6 == 28672 == torch.finfo(torch.float8_e4m3fn).max / torch.finfo(torch.float8_e4m3fn).tiny
    assert round(results["outlier"]["64"]["INT8"]["times"]) == 64
    promoted = [row["14 bits, promoted every 128"] for rows in results["sums"].values() for row in rows.values()]
    assert max(promoted) < 5e-4 < claimed["E4M3"]["1x128"] / 50
    assert max(row["float32"] for rows in results["sums"].values() for row in rows.values()) < 1e-7
    text = " ".join(claims.TEXT.read_text().split())
    for words in ("2.6%", "39 times", "28672", "64 times the error", "below 5e-4, a fiftieth", "it would be 1e-7"):
        assert words in text, words
