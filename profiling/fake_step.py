"""A step of a model that is not there: its inputs and weights as fake tensors, on a device that need not be there either."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from deepfuse.blocks.config import Config
from deepfuse.blocks.model import CausalLM
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.runtime.steps import decode, prefill


@dataclass(frozen=True, slots=True)
class Workload:
    """One step: tokens of each of so many sequences."""

    name: str
    sequences: int
    tokens: int
    """1 in decode."""
    cached: int = 4096
    """Tokens of each sequence at a decode step."""

    def inputs(self, device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor]]:
        """The engine's function, and what it is given beside model and caches."""

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        B, T = self.sequences, self.tokens
        if T == 1:
            return decode, [integers(4, B), integers(B, self.pages // B)]
        return prefill, [integers(3, B * T), integers(B + 1, dtype=torch.int32), integers(B)]

    @property
    def pages(self) -> int:
        return self.sequences * (-(-(self.cached + self.tokens if self.tokens == 1 else self.tokens) // PAGE_SIZE))

    def caches(self, config: Config, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """One for each layer, with a page more than the sequences fill."""
        shape = (self.pages + 1, PAGE_SIZE, config.cache_width)
        return [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]


def fake_model(config: Config, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """The model without values; call it in a ``FakeTensorMode``, and in it whatever is called with the model."""
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = CausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    return model


@contextmanager
def hopper(there: bool = True) -> Iterator[None]:
    """Inside, providers that ask which GPU there is find one of sm_90; or, where ``there`` is false, what there is."""
    if not there:
        yield
        return
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
    ):
        yield
