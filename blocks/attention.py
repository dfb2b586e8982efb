"""Attention: multi-head latent attention (MLA), and the multi-head attention (MHA) it is compared with.

MLA caches one latent and one rotary key per token. The block says the plain thing: expand the latent to keys and
values of all heads, and attend. That a decode step need not expand (absorption) is a rewrite of the graph.

Dims: T tokens, S keys, H heads, N nope width, R rotary width, V value width, C latent rank, D model width.
Source: DeepSeek-V3 (arXiv:2412.19437), eq. 1-11; norms on the latents from DeepSeek-V2 (arXiv:2405.04434), 3.1.2.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.batch import Batch
from deepfuse.blocks.cached_latent import append, gather
from deepfuse.blocks.collectives import same_over
from deepfuse.blocks.config import Config
from deepfuse.blocks.linear import Linear
from deepfuse.blocks.norm import RMSNorm
from deepfuse.ops.mla_attention import mla_attention
from deepfuse.ops.rotary import rotary

LATENT_NORM_EPS = 1e-6
"""Of the two norms on latents, whatever ``rms_norm_eps`` says: so the released models were trained."""


class MLA(nn.Module):
    """Multi-head latent attention; parameter names are those of the checkpoints."""

    side_by_side = (
        ("q_a_proj.weight", "kv_a_proj_with_mqa.weight"),
        ("q_proj.weight", "kv_a_proj_with_mqa.weight"),
    )
    """Weights of one input, which may lie one behind the other; a model has one of the two."""
    tensor: Axis | None = None
    """Processes that each have some of the heads; latents and rotary key are every one's."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.num_heads = config, config.num_attention_heads
        D, H, C = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        bias = config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(D, H * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(D, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, H * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(D, config.cache_width, bias=bias)
        self.kv_a_layernorm = RMSNorm(C, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(C, H * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(H * config.v_head_dim, D, bias=bias)

    def forward(self, x: Tensor, batch: Batch, cache: Tensor | None = None) -> Tensor:
        """``x [T, D] -> [T, D]``; ``cache``, a layer's, is written, and read where ``batch`` has a block table."""
        c = self.config
        H, C = self.num_heads, c.kv_lora_rank
        if c.q_lora_rank is None:
            q_TE = self.q_proj(same_over(x, self.tensor))
        else:
            q_TE = self.q_b_proj(same_over(self.q_a_layernorm(self.q_a_proj(x)), self.tensor))
        q_nope, q_rope = q_TE.unflatten(-1, (H, c.qk_head_dim)).split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        q_THE = torch.cat((q_nope, rotary(q_rope, batch.cos, batch.sin, c.rope_interleave)), -1)

        latent, k_rope = self.kv_a_proj_with_mqa(x).split((C, c.qk_rope_head_dim), -1)
        latent = self.kv_a_layernorm(latent)
        k_rope = rotary(k_rope.unsqueeze(1), batch.cos, batch.sin, c.rope_interleave).squeeze(1)
        if cache is not None:
            if batch.slots is None:
                raise ValueError("MLA: want slots to write the cache at, got None")
            append(cache, latent, k_rope, batch.slots)

        k_start, k_len = batch.q_start[:-1], batch.q_start[1:] - batch.q_start[:-1]
        if cache is not None and batch.block_table is not None and batch.seqlens is not None:
            cached, k_start = gather(cache, batch.block_table, C, x.dtype)
            latent, k_rope = cached.split((C, c.qk_rope_head_dim), -1)
            k_len = batch.seqlens
        latent, k_rope = same_over(latent, self.tensor), same_over(k_rope, self.tensor)
        kv_SHE = self.kv_b_proj(latent).unflatten(-1, (H, c.qk_nope_head_dim + c.v_head_dim))
        out_THV, _ = mla_attention(q_THE, kv_SHE, k_rope, batch.q_start, k_start, k_len, c.softmax_scale)
        return self.o_proj(out_THV.flatten(1))


class MHA(nn.Module):
    """Multi-head attention with a full key and value for each head: what MLA saves is measured against it.

    It keeps no cache; its cache would hold ``H * (N + R + V)`` numbers per token where MLA's holds ``C + R``.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        D, H = config.hidden_size, config.num_attention_heads
        self.q_proj = Linear(D, H * config.qk_head_dim, bias=config.attention_bias)
        self.k_proj = Linear(D, H * config.qk_nope_head_dim + config.qk_rope_head_dim, bias=config.attention_bias)
        self.v_proj = Linear(D, H * config.v_head_dim, bias=config.attention_bias)
        self.o_proj = Linear(H * config.v_head_dim, D, bias=config.attention_bias)

    def forward(self, x: Tensor, batch: Batch, cache: Tensor | None = None) -> Tensor:
        """``x [T, D] -> [T, D]``."""
        if cache is not None:
            raise ValueError("MHA: want no cache (it is the baseline for training and scoring), got one")
        c = self.config
        H, N, R = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
        q_nope, q_rope = self.q_proj(x).unflatten(-1, (H, N + R)).split((N, R), -1)
        q_THE = torch.cat((q_nope, rotary(q_rope, batch.cos, batch.sin, c.rope_interleave)), -1)
        k_nope, k_rope = self.k_proj(x).split((H * N, R), -1)
        k_rope = rotary(k_rope.unsqueeze(1), batch.cos, batch.sin, c.rope_interleave).squeeze(1)
        kv_SHE = torch.cat((k_nope.unflatten(-1, (H, N)), self.v_proj(x).unflatten(-1, (H, c.v_head_dim))), -1)
        k_len = batch.q_start[1:] - batch.q_start[:-1]
        out, _ = mla_attention(q_THE, kv_SHE, k_rope, batch.q_start, batch.q_start[:-1], k_len, c.softmax_scale)
        return self.o_proj(out.flatten(1))


ATTENTION: dict[str, Callable[[Config], nn.Module]] = {"mla": MLA, "mha": MHA}
"""Kinds of attention, by ``Config.attention``; a new one is a new entry."""
