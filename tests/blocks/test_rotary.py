from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from deepfuse.blocks.config import RopeScaling
from deepfuse.blocks.presets import v3_671b
from deepfuse.blocks.rotary import Rotary, inverse_frequencies
from oracle import V3, yarn
from tiny_checkpoint import TINY

V3_SCALING = v3_671b().rope_scaling
# base frequency over YaRN's, by channel pair: the blend of DeepSeek-V3 runs from pair 10 to pair 23
V3_RATIOS = [*[1.0] * 11, 1.0811, 1.1765, 1.2903, 1.4286, 1.6, 1.8182, 2.1053, 2.5, 3.0769, 4.0, 5.7143, 10.0]
V3_RATIOS += [40.0] * 9


def test_frequencies_without_scaling():
    expected = [10000 ** (-i / 4) for i in range(4)]
    torch.testing.assert_close(inverse_frequencies(8, 10000.0, None), torch.tensor(expected))


def test_frequencies_of_deepseek_v3():
    ratios = inverse_frequencies(64, 10000.0, None) / inverse_frequencies(64, 10000.0, V3_SCALING)
    # the published figures have five digits
    torch.testing.assert_close(ratios, torch.tensor(V3_RATIOS), rtol=5e-5, atol=0.0)


SCALINGS = [
    {},
    {"mscale": 0.707, "mscale_all_dim": 0.707},
    {"mscale": 1.0, "mscale_all_dim": 0.5},
    {"truncate": False},
    {"beta_fast": 4.0, "beta_slow": 4.0},
    {"factor": 1.0},
    {"original_max_position_embeddings": 4},  # all pairs are slow: the ends of the blend fall together
]


@pytest.mark.parametrize("changes", SCALINGS, ids=str)
@pytest.mark.parametrize("width", [2, 6, 16])
def test_tables_are_those_of_transformers(changes, width):
    rope = yarn(**changes)["rope_parameters"]
    theirs = DeepseekV3RotaryEmbedding(DeepseekV3Config(**{**V3, "qk_rope_head_dim": width, "rope_parameters": rope}))
    scaling = RopeScaling(**{k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")})
    ours = Rotary(replace(TINY, qk_rope_head_dim=width, rope_scaling=scaling))
    positions = torch.tensor([0, 1, 17, 255])
    cos, sin = theirs(torch.zeros(1), positions[None])
    for table, expected in zip(ours(positions), (cos, sin), strict=True):
        # they have each angle twice, once for each half; angles up to 255 have roundings of 2 ** -17
        torch.testing.assert_close(table, expected[0, :, : width // 2], atol=2e-5, rtol=0.0)


def test_tables_scale_with_the_ratio_of_the_temperatures_only():
    plain = RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    assert Rotary(replace(TINY, rope_scaling=plain)).mscale == 1.0
    cos, _ = Rotary(replace(TINY, rope_scaling=replace(plain, mscale_all_dim=0.0)))(torch.tensor([0]))
    torch.testing.assert_close(cos, torch.full((1, 4), 1.3688879454113936))


def test_positions_far_out_keep_float32_angles():
    cos, sin = Rotary(TINY)(torch.tensor([163839]))
    exact = 163839 * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    # the angle itself is rounded: half a unit in the last place of 163839 is 2 ** -7
    torch.testing.assert_close(cos[0].double(), exact.cos(), atol=2**-6, rtol=0.0)
    torch.testing.assert_close(sin[0].double(), exact.sin(), atol=2**-6, rtol=0.0)


def test_frequencies_stay_float32_in_a_narrow_model():
    assert inverse_frequencies(8, 10000.0, V3_SCALING).dtype == torch.float32
    with torch.device("meta"):
        assert inverse_frequencies(8, 10000.0, V3_SCALING).device.type == "cpu"
