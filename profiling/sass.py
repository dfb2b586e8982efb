"""What stands in machine code, as NVIDIA's disassembler prints it: products, copies, spills, stages of a loop."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
MATRIX = re.compile(r"[A-Z]*MMA")
"""HMMA, IMMA: of a warp; HGMMA, QGMMA (FP8): of four, Hopper's; UTCHMMA, UTCQMMA (FP8): Blackwell's."""
COPIES = {"LDG", "LDGSTS", "STG", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP"}
"""Between memory and registers (LDG, STG) or shared memory (LDGSTS, and by the tensor memory accelerator UTMA...)."""


def instructions(sass: str) -> Iterator[str]:
    """Names with their modifiers: ``LDG.E.128``."""
    return (found[1] for found in INSTRUCTION.finditer(sass))


def matrix_instructions(sass: str) -> dict[str, int]:
    """How many of each kind that multiplies tiles."""
    names = (name.partition(".")[0] for name in instructions(sass))
    return _sorted(Counter(name for name in names if MATRIX.fullmatch(name)))


def copy_instructions(sass: str) -> dict[str, int]:
    """How many of each kind and width: ``LDG.128`` moves 128 bits a thread; UTMA... moves a tile."""
    found: Counter[str] = Counter()
    for name in instructions(sass):
        kind = name.partition(".")[0]
        if kind in COPIES:
            found[kind if kind.startswith("U") else f"{kind}.{_bits(name)}"] += 1
    return _sorted(found)


def spilled_bytes(sass: str) -> tuple[int, int]:
    """Bytes that instructions store into local memory, and load from it, a thread; each counted once, in a loop too."""
    bits = {"STL": 0, "LDL": 0}
    for name in instructions(sass):
        kind = name.partition(".")[0]
        if kind in bits:
            bits[kind] += _bits(name)
    return bits["STL"] // 8, bits["LDL"] // 8


def stages(sass: str) -> int | None:
    """Blocks of operands that are in shared memory or on their way at a time, where a loop multiplies them.

    It is the one block that is multiplied, and those whose copies the wait before it lets run on. A loop that multiplies
    (GMMA; FFMA in a kernel without) commits its copies in groups (LDGDEPBAR), as many a turn as a block has, and waits
    until no more than a number of groups are left (DEPBAR.LE SB0). Where another warp fetches (UTMALDG), each block has
    two barriers in shared memory (initialized by SYNCS.EXCH): for full, and for empty.
    """
    if "UTMALDG" in sass:
        return sass.count("SYNCS.EXCH.64") // 2
    lines = sass.splitlines()
    labels = {line.strip(): number for number, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line.strip())}
    loops, without_tensor_cores = [], []
    for end, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        begin = labels.get(f"{target[1]}:", end) if target else end
        body = "\n".join(lines[begin:end])
        if "GMMA" in body:
            loops.append(body)
        elif "LDGSTS" in body and "FFMA" in body:
            without_tensor_cores.append(body)
    loops = loops or without_tensor_cores
    if not loops:
        return None
    # the innermost
    body = min(loops, key=len)
    groups = body.count("LDGDEPBAR")
    if groups == 0:
        return 1
    left = min(int(count, 16) for count in re.findall(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)", body))
    return 1 + left // groups


def disassemble(cubin: bytes) -> str:
    return _run("nvdisasm", "--print-code", cubin)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """``REG`` of a thread, and its ``STACK`` and ``LOCAL`` bytes."""
    text = _run("cuobjdump", "--dump-resource-usage", cubin)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def check_tools(arch: str) -> None:
    """Raise ``RuntimeError`` where what compiles and reads machine code of ``sm_90`` or ``sm_100`` is not here."""
    from triton import knobs

    for tool in ("ptxas" if arch == "sm_90" else "ptxas_blackwell", "cuobjdump", "nvdisasm"):
        try:
            getattr(knobs.nvidia, tool)
        except RuntimeError:
            raise RuntimeError(
                f"kernels: want {tool}, which comes with Triton's Linux packages, got none (TRITON_{tool.upper()}_PATH "
                "may name one)"
            ) from None


def _run(tool: str, option: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _bits(name: str) -> int:
    width = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
    return int(width[1]) if width else 32


def _sorted(found: Counter[str]) -> dict[str, int]:
    return dict(sorted(found.items()))
