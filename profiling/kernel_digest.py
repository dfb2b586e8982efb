"""All that decides a kernel's machine code, in one short word: a kernel whose digest is known need not be compiled.

It is taken of the representation that Triton makes first of a kernel (in it are the kernel, the functions it calls, values
that are compiled in, types and alignments of arguments; comments and line numbers are not), of the launch's options (warps,
stages, ...), of the target, and of the versions of Triton and ptxas. What is left out are the names of functions, into which
Triton writes the file where they stand, and a Triton that was changed and kept its version.
"""

import hashlib
import re
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars, ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend


def kernel_digest(source: ASTSource, options: Any, target: GPUTarget) -> str:
    """Of a kernel with its specialization: 32 hexadecimal digits, the same on every machine.

    Args:
        source: Triton's or Gluon's.
        options: those of the target's backend, as a launch parses them.
    """
    backend = make_backend(target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    decides = (
        triton.__version__,
        # ptxas and the target
        backend.hash(),
        # has the contents of libraries, not their paths
        options.hash(),
        str(sorted(get_cache_invalidating_env_vars().items())),
        without_names(module.str_nodebug()),
    )
    return hashlib.sha256("\n".join(decides).encode()).hexdigest()[:32]


def without_names(text: str) -> str:
    """Triton's representation with functions numbered as they come: ``@deepfuse.ops.quantize.divide__fp32`` is ``@1``.

    Each keeps a number of its own, so that a call of another function is seen, also of one with the same name in another
    file. What is written like a name in inline assembly (``@p0``) is none.
    """
    defined = set(re.findall(r"\btt\.func (?:public |private )?(@(?:\"[^\"]*\"|[\w.$-]+))", text))
    numbers: dict[str, str] = {}

    def number(name: re.Match[str]) -> str:
        return numbers.setdefault(name[0], f"@{len(numbers)}") if name[0] in defined else name[0]

    return re.sub(r"@(?:\"[^\"]*\"|[\w.$-]+)", number, text)
