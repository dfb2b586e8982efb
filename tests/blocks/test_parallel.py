"""Settings that a build refuses."""

import pytest

from deepfuse.blocks.parallel import Parallel


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "dropping"}, r"want mode out of \['dropless', 'capacity', 'node_limited'\], got 'dropping'"),
        ({"drop": "random"}, r"want drop out of \['affinity', 'position'\], got 'random'"),
        ({"dispatch": "bf16"}, r"want dispatch out of \['auto', 'fp8'\], got 'bf16'"),
        ({"chunks": 5}, "want chunks from 1 to 4, got 5"),
        ({"chunks": True}, "want chunks from 1 to 4, got True"),
        ({"capacity_factor": "2"}, "want a finite capacity_factor > 0, got '2'"),
        ({"capacity_factor": 0}, "want a finite capacity_factor > 0, got 0"),
        ({"max_ctas": 0}, "want max_ctas as an integer >= 1, or None, got 0"),
        ({"max_ctas": 2.5}, "want max_ctas as an integer >= 1, or None, got 2.5"),
        ({"mode": "node_limited"}, "want ranks_per_node, an integer >= 1, with mode 'node_limited', got None"),
        ({"mode": "node_limited", "ranks_per_node": 0}, "want ranks_per_node, an integer >= 1, .*, got 0"),
        ({"mode": "node_limited", "ranks_per_node": 2.0}, "want ranks_per_node, an integer >= 1, .*, got 2.0"),
        ({"ranks_per_node": 2}, "want ranks_per_node with mode 'node_limited' alone, got 2 with 'dropless'"),
        ({"mode": "node_limited", "ranks_per_node": True}, "want ranks_per_node, an integer >= 1, .*, got True"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=f"^parallel: {words}"):
        Parallel(**settings).check()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"link": "NVLink"}, "want link as a Link of deepfuse.ir.link, or None, got 'NVLink'"),
        ({"placement": 3}, "want placement as what place_experts returns, or the name of its file, got 3"),
    ],
)
def test_settings_of_another_type_are_refused(settings, words):
    with pytest.raises(TypeError, match=f"^parallel: {words}"):
        Parallel(**settings).check()
