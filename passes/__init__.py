"""Graph rewrites, one a file, and the pipeline that lists them in order.

``deepfuse.passes.default()`` is what ``build`` runs; ``.without("absorb_mla")`` leaves one out.
"""

from deepfuse.passes.pipeline import Pipeline, default

__all__ = ["Pipeline", "default"]
