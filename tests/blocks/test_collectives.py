"""Two processes over Gloo; what they must say is worked out by hand."""

import json

import pytest

import collectives_worker
from deepfuse.blocks.axis import Axis
from ranks import run_ranks


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collectives")
    run_ranks(collectives_worker.__file__, 2, folder)
    return [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(2)]


EXPECTED = {
    # the gradients are those of the rows where they went: 0, 1, .. on process 0 and 100, 101, .. on process 1
    "all_to_all": (
        ([[0], [10]], [[0], [100], [101]]),
        ([[1], [2], [11], [12]], [[1], [102], [103]]),
    ),
    "sum_over": (([[10], [12], [14]], [[0], [1], [2]]), ([[10], [12], [14]], [[100], [101], [102]])),
    "same_over": (([[0], [1], [2]], [[100], [102], [104]]), ([[10], [11], [12]], [[100], [102], [104]])),
    "gather_rows": (
        ([[0], [1], [2], [10], [11], [12]], [[100], [102], [104]]),
        ([[0], [1], [2], [10], [11], [12]], [[106], [108], [110]]),
    ),
    "gather_columns": (
        ([[0, 10], [1, 11], [2, 12]], [[0], [2], [4]]),
        ([[0, 10], [1, 11], [2, 12]], [[101], [103], [105]]),
    ),
}


@pytest.mark.parametrize("kind", ["", " compiled"])
@pytest.mark.parametrize("name", EXPECTED)
def test_values_and_gradients(said, name, kind):
    for rank in range(2):
        assert said[rank][name + kind] == [list(part) for part in EXPECTED[name][rank]]


def test_shares_are_in_order_and_must_come_out_even():
    axis = Axis("expert", "0", 4, 2)
    assert axis.share(8, "n_routed_experts") == slice(4, 6)
    with pytest.raises(ValueError, match="want n_routed_experts divisible by the 4 processes of axis 'expert', got 6"):
        axis.share(6, "n_routed_experts")
