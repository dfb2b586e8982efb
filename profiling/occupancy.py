"""How many programs (CTAs) of a kernel a multiprocessor holds at a time: the least of what four resources allow.

Source: NVIDIA's occupancy calculator, cuda_occupancy.h, which comes with Triton; limits from table "Technical
Specifications per Compute Capability" of the CUDA C++ Programming Guide, 9.0 and 10.0, which agree in them.
"""

REGISTERS = 64 * 1024
REGISTER_UNIT = 256
"""A warp gets registers in multiples of so many."""
PARTITIONS = 4
"""Each with a quarter of the registers; a warp lives in one."""
WARPS = 64
CTAS = 32
SHARED_BYTES = 228 * 1024
SHARED_UNIT = 128
RESERVED_BYTES = 1024
"""Of shared memory, by the driver for each CTA."""
CTA_SHARED_BYTES = SHARED_BYTES - RESERVED_BYTES
"""The most that one may ask for."""


def ctas_per_multiprocessor(registers: int, shared_bytes: int, num_warps: int) -> int:
    """Programs that run at a time on one multiprocessor of sm_90 or sm_100; 0 for one that is too large.

    Args:
        registers: of a thread.
        shared_bytes: of a program, without what the driver reserves.
        num_warps: of a program, 32 threads each.
    """
    if shared_bytes > CTA_SHARED_BYTES:
        return 0
    by_threads = min(WARPS // num_warps, CTAS)
    by_shared = SHARED_BYTES // _up(shared_bytes + RESERVED_BYTES, SHARED_UNIT)
    of_warp = _up(registers * 32, REGISTER_UNIT)
    if of_warp * _up(num_warps, PARTITIONS) > REGISTERS:
        return 0
    by_registers = REGISTERS // PARTITIONS // of_warp * PARTITIONS // num_warps
    return min(by_threads, by_shared, by_registers)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
