"""In a built FP8 model the exact fusions change no bit."""

import torch

import deepfuse as df
from tiny_model import build, checkpoint

EXACT = ("share_quantize", "fuse_norm_quantize", "fuse_swiglu_quantize", "fuse_permute_quantize")
PROMPT = [5, 9, 2, 40, 7, 130, 8]


def test_fused_and_unfused_are_equal_bit_by_bit() -> None:
    results = []
    for without in ((), EXACT):
        passes = df.passes.default().without(*without)
        model = build(checkpoint(), quantize="fp8", passes=passes, strict=True)
        matches = model.report.matches()
        assert all(matches[name] > 0 for name in EXACT if name not in without)
        text = model.generate([PROMPT], max_new_tokens=8, temperature=0.0)
        results.append((model(torch.tensor([PROMPT])), text))
    (fused, said), (plain, also) = results
    assert torch.equal(fused, plain) and said == also
