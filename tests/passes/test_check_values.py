"""What counts as the same where graphs round to FP8; the rest of the check is tested with the pipeline."""

import pytest
import torch

from deepfuse.ir.private import uncompiled_backend
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.append_latent_fp8 import append_latent_fp8, row_bytes
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.quantize import quantize
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.passes.check_values import TOLERANCES, widest_tolerance
from deepfuse.passes.pipeline import Pipeline
from deepfuse.passes.record import Pass
from deepfuse.passes.runner import Runner
from deepfuse.passes.splice import call
from graphs import trace

E4M3 = torch.float8_e4m3fn


def scaled(factor, kind):
    """A pass that puts a norm with a larger ``eps`` in the place of each."""

    def scale_eps(graph):
        for node in graph.find_nodes(op="call_function", target=rms_norm.overload):
            with graph.inserting_before(node):
                other = call(graph, node, rms_norm.overload, *node.args[:2], node.args[2] * factor)
            node.replace_all_uses_with(other)
        return 1

    return Pass("scale_eps", "semantic", kind, scale_eps)


@pytest.mark.parametrize(
    ("factor", "kind", "message"),
    [
        (1 + 1e-5, "reassociating", None),
        (2.0, "reassociating", r"changes values: result . of .: want errors up to"),
        (1 + 1e-5, "exact", r"changes values: result . of .: want the same bits"),
    ],
)
def test_the_bytes_of_a_cache_are_compared_as_numbers(factor, kind, message):
    def step(cache, x, weight, slots):
        append_latent_fp8(cache, rms_norm(x, weight, 1.0), x[:, :8], slots)

    runner = Runner(Pipeline((scaled(factor, kind),)), {}, verify=True)
    compiled = torch.compile(step, backend=runner.backend())
    cache = torch.zeros(2, PAGE_SIZE, row_bytes(16, 8), dtype=torch.uint8)
    args = cache, torch.randn(5, 16), torch.ones(16), torch.arange(5) + PAGE_SIZE
    if message is None:
        compiled(*args)
        assert cache.any()
        return
    with pytest.raises(Exception, match=message):
        compiled(*args)


def test_a_graph_that_keeps_its_latents_in_fp8_rounds_to_it():
    def keeps(cache, latent, k_rope, slots):
        append_latent_fp8(cache, latent, k_rope, slots)

    def rounds(x):
        return dequantize(*quantize(x, E4M3, 1, 128, False), 1, 128, torch.float32)

    def is_given_fp8(values, scale):
        return dequantize(values, scale, 1, 128, torch.float32)

    graphs = []
    backend = uncompiled_backend(lambda hook, gm: graphs.append(gm.graph))
    cache = torch.zeros(2, PAGE_SIZE, row_bytes(16, 8), dtype=torch.uint8)
    torch.compile(keeps, backend=backend)(cache, torch.randn(3, 16), torch.randn(3, 8), torch.arange(3))
    assert widest_tolerance(graphs[0]) == TOLERANCES[E4M3]
    x = torch.randn(3, 128)
    assert widest_tolerance(trace(rounds, x).graph) == TOLERANCES[E4M3]
    given = quantize(x, E4M3, 1, 128, False)
    assert widest_tolerance(trace(is_given_fp8, *given).graph) == TOLERANCES[torch.float32]
