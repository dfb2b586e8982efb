import pytest
import torch

from deepfuse.ir.interpreter import interpreted

KERNEL_DEVICE = "cpu" if interpreted() else "cuda"


@pytest.fixture(params=[pytest.param(KERNEL_DEVICE, marks=[pytest.mark.gpu] if KERNEL_DEVICE == "cuda" else [])])
def kernel_device(request: pytest.FixtureRequest):
    """Tensors are made where Triton kernels run: on the CPU in the interpreter, on the GPU compiled."""
    with torch.device(request.param):
        yield
