"""All that decides a kernel's machine code, in one short word: a kernel whose digest is known need not be compiled.

It is taken of the representation that Triton makes first of a kernel (in it are the kernel, the functions it calls, values
that are compiled in, types and alignments of arguments; comments and line numbers are not), of the launch's options (warps,
stages, ...), of the target, and of the versions of Triton and ptxas. What is left out is the file in which a function
stands, which Triton writes into its name, and a Triton that was changed and kept its version.
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
        without_files(module.str_nodebug()),
    )
    return hashlib.sha256("\n".join(decides).encode()).hexdigest()[:32]


def without_files(text: str) -> str:
    """Triton's representation, with functions of ops by their names alone: ``@deepfuse.ops.quantize.f`` is ``@f``."""
    return re.sub(r"(@\"?)deepfuse\.ops\.\w+\.", r"\1", text)
