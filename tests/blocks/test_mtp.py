import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)

from deepfuse.blocks.batch import Batch
from deepfuse.blocks.config import Config
from deepfuse.blocks.mlp import MLP
from deepfuse.blocks.moe import MoE
from deepfuse.blocks.mtp import MTP
from deepfuse.blocks.rotary import Rotary
from oracle import CONFIGS, TOLERANCE, difference
from tiny_checkpoint import TINY

OF_THE_LAYER = ("self_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm.")


@pytest.mark.parametrize("name", ["v3", "odd-sizes", "half-split-rope"])
def test_predicts_as_transformers_does(name):
    settings = {**CONFIGS[name], "first_k_dense_replace": 0}
    their_config = DeepseekV3Config(**settings)
    their_config._experts_implementation, their_config._attn_implementation = "eager", "sdpa"
    theirs = MtpLayer(their_config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, 0)
    config = Config(**settings)
    ours = MTP(config)
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            tensor.normal_(std=0.3)
    theirs.load_state_dict({their_name(key): tensor for key, tensor in ours.state_dict().items()})
    T, D = 21, config.hidden_size
    h, embedding = torch.randn(2, T, D)
    positions = torch.arange(T)
    tables = DeepseekV3RotaryEmbedding(their_config)(h, positions[None])
    with torch.no_grad():
        expected = theirs(embedding[None], h[None], tables, None, positions[None], None)[0]
        batch = Batch(positions, torch.tensor([0, T], dtype=torch.int32), *Rotary(config)(positions))
        stream = ours.predict(h, embedding, batch)
        normed = ours.shared_head.norm(stream)
    assert difference(normed, expected) <= TOLERANCE
    assert difference(stream, expected) > 0.01


def their_name(key: str) -> str:
    if key.startswith(OF_THE_LAYER):
        return f"mtp_block.{key}"
    return key.replace("shared_head.norm.", "post_norm.")


def test_the_embedding_goes_first():
    mtp = MTP(TINY)
    with torch.no_grad():
        for parameter in mtp.parameters():
            parameter.normal_(std=0.3)
        mtp.eh_proj.weight[:, TINY.hidden_size :] = 0  # the half that reads the state
    positions = torch.arange(4)
    batch = Batch(positions, torch.tensor([0, 4], dtype=torch.int32), *Rotary(TINY)(positions))
    embedding, h, other = torch.randn(3, 4, TINY.hidden_size)
    with torch.no_grad():
        assert torch.equal(mtp.predict(h, embedding, batch), mtp.predict(other, embedding, batch))
        assert not torch.equal(mtp.predict(h, embedding, batch), mtp.predict(h, other, batch))


def test_its_feed_forward_block_is_sparse_where_the_model_has_experts():
    with torch.device("meta"):
        assert isinstance(MTP(TINY).mlp, MoE)
        dense = Config(**{**CONFIGS["v3"], "n_routed_experts": None})
        assert isinstance(MTP(dense).mlp, MLP)
