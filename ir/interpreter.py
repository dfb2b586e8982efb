"""Whether Triton kernels run in its interpreter, where they can be tested without a GPU.

The interpreter computes bfloat16 on raw bits, so kernels that feed narrow types to ``tl.dot`` widen them there first.
"""

import os


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` was set when kernels were defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
