"""Which ops only look at the memory of their operand in another way, and so cost nothing."""

import operator
from typing import Any

import torch

aten = torch.ops.aten
FUNCTIONAL_VIEWS = (aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default)
"""Give back a view although their schemas do not say so."""


def is_view(target: Any) -> bool:
    """Whether a call of ``target`` is a view: of an op, by its schema."""
    if target is operator.getitem or target in FUNCTIONAL_VIEWS:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    aliases = [r.alias_info for r in target._schema.returns if r.alias_info is not None]
    return bool(aliases) and not any(a.is_write for a in aliases)
