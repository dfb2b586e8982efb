"""Programs on a multiprocessor, held against NVIDIA's own calculator, a header that comes with Triton."""

import os
import subprocess
from pathlib import Path

import pytest
import triton

from deepfuse.profiling import occupancy

HEADERS = Path(triton.__file__).parent / "backends/nvidia/include"
CALCULATOR = """
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cuda_occupancy.h>

// compute capability, then lines of registers, shared bytes and warps
int main(int argc, char **argv) {
    cudaOccDeviceProp device = {};
    device.computeMajor = atoi(argv[1]);
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 2048;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = 228 * 1024;
    device.sharedMemPerBlockOptin = 227 * 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 132;
    int registers, shared, warps;
    while (scanf("%d %d %d", &registers, &shared, &warps) == 3) {
        cudaOccFuncAttributes function = {};
        function.maxThreadsPerBlock = 1024;
        function.numRegs = registers;
        function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        function.maxDynamicSharedSizeBytes = 227 * 1024;
        cudaOccDeviceState state = {};
        state.carveoutConfig = 100;
        cudaOccResult result;
        if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, 32 * warps, shared)) return 1;
        printf("%d\\n", result.activeBlocksPerMultiprocessor);
    }
    return 0;
}
"""


@pytest.mark.parametrize("major", [9, 10])
def test_as_many_as_nvidias_calculator_says(major: int, tmp_path: Path) -> None:
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    binary = tmp_path / "calculator"
    compiler = os.environ.get("CXX", "g++").split()
    subprocess.run([*compiler, f"-I{HEADERS}", "-o", binary, tmp_path / "calculator.cpp"], check=True)
    sizes = [0, 32, 1023, 1024, 1025, 10_000, 49_152, 75_000, 115_712, 115_713, 229_608, 232_448, 232_449]
    asked = [(r, s, w) for r in range(16, 256) for s in sizes for w in (1, 2, 3, 4, 8, 12, 16, 32)]
    told = "\n".join(" ".join(map(str, one)) for one in asked)
    done = subprocess.run([binary, str(major)], input=told, capture_output=True, text=True, check=True)
    expected = [int(line) for line in done.stdout.split()]
    assert len(set(expected)) > 10
    assert [occupancy.ctas_per_multiprocessor(*one) for one in asked] == expected
