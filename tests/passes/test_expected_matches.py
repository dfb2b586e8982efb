"""Every pass finds as many sites in the presets' graphs as are declared; captured with fake tensors."""

import pytest
import torch

from deepfuse.passes.expected_matches import MATCHES, Sites
from deepfuse.passes.pipeline import default
from fake_graphs import STEPS, preset, rewritten

LAYERS = {"v3-tiny": None, "v3-671b": 2}
"""What a preset is cut to: the layers of the smallest model that has every kind."""


@pytest.mark.parametrize(("name", "precision", "graph"), MATCHES, ids="-".join)
def test_passes_match_as_declared(name, precision, graph):
    config = preset(name, LAYERS[name])
    dense = config.first_k_dense_replace
    expected = {
        p: sites.of(dense, config.num_hidden_layers - dense) for p, sites in MATCHES[name, precision, graph].items()
    }
    entry = rewritten(config, graph, torch.bfloat16, fp8=precision == "fp8")
    found = {p.name: p.rewrites for p in entry.passes if p.rewrites}
    notes = "\n".join(f"{p.name}: {line}" for p in entry.passes for line in p.notes)
    assert found == expected, notes


def test_every_preset_is_declared_for_every_graph():
    assert {(name, graph) for name, _, graph in MATCHES} == {(name, graph) for name in LAYERS for graph in STEPS}
    assert {p for sites in MATCHES.values() for p in sites} <= {*default().names}


def test_sites_of_a_whole_model():
    # 61 layers, of which 3 are dense
    assert Sites(graph=2, layer=3, dense=1, sparse=2).of(3, 58) == 2 + 3 * 61 + 3 + 2 * 58
