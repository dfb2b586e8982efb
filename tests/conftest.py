"""Test setup: kernels run in Triton's interpreter where there is no GPU, and every test starts from one seed."""

import os
from collections import Counter
from collections.abc import Callable

import hypothesis
import pytest
import torch

# before anything imports triton, which reads it once
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# a pass that fails fails the test
os.environ.setdefault("DEEPFUSE_STRICT", "1")

# the first call of a kernel or graph takes seconds, so a limit per example says nothing
hypothesis.settings.register_profile("deepfuse", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("deepfuse")


def _repair_interpreter_casts() -> None:
    """Make the interpreter cast floats as PyTorch does: to nearest, ties to even.

    In triton 3.6 to 3.9 it truncates float32 to bfloat16, and loses the carry of rounding on the way to float8 (126.2
    becomes 64, not 128). Beyond the largest finite float8 PyTorch may give NaN or inf where a GPU saturates, so kernels
    clamp before they cast.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    torch_dtypes = {
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float32: torch.float32,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e4b8: torch.float8_e4m3fnuz,
        tl.float8e5: torch.float8_e5m2,
        tl.float8e5b16: torch.float8_e5m2fnuz,
    }
    original = interpreter._convert_float
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ

    def convert_float(input, input_dtype, output_dtype, rounding_mode):
        source, target = torch_dtypes.get(input_dtype), torch_dtypes.get(output_dtype)
        if source is None or target is None or rounding_mode == toward_zero:
            return original(input, input_dtype, output_dtype, rounding_mode)
        if input.size == 0:
            return np.empty(input.shape, dtype=f"uint{output_dtype.primitive_bitwidth}")
        values = torch.frombuffer(bytearray(input.tobytes()), dtype=source)
        bits = values.to(target).view(torch.uint8).numpy()
        return bits.view(f"uint{output_dtype.primitive_bitwidth}").reshape(input.shape)

    interpreter._convert_float = convert_float


if os.environ["TRITON_INTERPRET"] == "1":
    _repair_interpreter_casts()


if "PYTEST_XDIST_WORKER" in os.environ:
    # workers with a thread pool each would wait for one another's threads
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_longest_first(items))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _longest_first(items: list[pytest.Item]) -> Callable[[pytest.Item], tuple[bool, int, str]]:
    """Files that compile or are slow, which others fill up to the end; of each kind those with many tests first.

    By the number of tests alone, as xdist has it, a file of one test that lasts minutes would come last.
    """
    tests = Counter(item.path for item in items)
    long = {item.path for item in items for name in ("compile", "slow") if item.get_closest_marker(name)}
    return lambda item: (item.path not in long, -tests[item.path], str(item.path))
