"""The rotary embedding in ``config.json``: ``rope_scaling`` and ``rope_theta``, or ``rope_parameters`` of transformers 5.

Where both forms stand, the old one counts, as in transformers; both mean the same or the file is refused. The old form
is written: every version reads it. Source: ``modeling_rope_utils.py`` of transformers 5.23.
"""

import math
from collections.abc import Mapping
from typing import Any

from deepfuse.blocks.config import RopeScaling, yarn_mscale

DEFAULT_THETA = 10000.0
KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
}


def read_rope(raw: Mapping[str, Any], max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """Base of the frequencies, and YaRN's settings or ``None``, of a ``config.json`` object.

    Raises:
        ValueError: the type is neither ``default`` nor ``yarn``, or a value is missing, unknown or of a wrong kind.
    """
    forms = [name for name in ("rope_scaling", "rope_parameters") if raw.get(name)]
    read = [_read(name, raw[name], raw.get("rope_theta"), max_position_embeddings) for name in forms]
    if not read:
        return _number("rope_theta", raw.get("rope_theta"), DEFAULT_THETA), None
    if read[0] != read[-1]:
        raise ValueError(f"want rope_scaling and rope_parameters to agree, got {raw[forms[0]]} and {raw[forms[1]]}")
    return read[0]


def rope_object(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """``rope_scaling`` as it is written; ``rope_theta`` stands beside it."""
    if scaling is None:
        return None
    # "type" for the code that came with the checkpoints, "rope_type" for transformers
    out: dict[str, Any] = {"type": "yarn", "rope_type": "yarn", "factor": scaling.factor}
    out["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    out |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    out |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    if not scaling.truncate:
        out["truncate"] = False
    if _mscale("rope_scaling", out, scaling.factor, scaling.mscale_all_dim) != scaling.mscale:
        ratio = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
        out["attention_factor"] = ratio
    return out


def _read(name: str, rope: Any, theta: Any, max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    if type(rope) is not dict:
        raise ValueError(f"want {name} an object or null, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(f"want {name} of type 'default' or 'yarn', got {kind!r}")
    if not rope.keys() <= KEYS:
        raise ValueError(f"want {name} with keys out of {sorted(KEYS)}, got {sorted(rope.keys() - KEYS)}")
    base = _number("rope_theta", rope.get("rope_theta", theta), DEFAULT_THETA)
    if kind == "default":
        return base, None
    original = rope.get("original_max_position_embeddings", max_position_embeddings)
    if type(original) is not int or original < 1:
        raise ValueError(f"want {name} with original_max_position_embeddings >= 1, got {original!r}")
    factor = _number(f"{name}.factor", rope.get("factor"), max_position_embeddings / original)
    all_dim = _number(f"{name}.mscale_all_dim", rope.get("mscale_all_dim"), 0.0)
    return base, RopeScaling(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=_number(f"{name}.beta_fast", rope.get("beta_fast"), 32.0) or 32.0,
        beta_slow=_number(f"{name}.beta_slow", rope.get("beta_slow"), 1.0) or 1.0,
        mscale=_mscale(name, rope, factor, all_dim),
        mscale_all_dim=all_dim,
        truncate=bool(rope.get("truncate", True)),
    )


def _mscale(name: str, rope: Mapping[str, Any], factor: float, all_dim: float) -> float:
    """The ``mscale`` that scales cosines and sines as transformers does.

    The model scales them by ``m(mscale) / m(mscale_all_dim)``, ``m(s) = 0.1 * s * ln(factor) + 1``. transformers takes
    ``attention_factor`` where it is given, that ratio where neither mscale is absent or 0, and ``m(1)`` otherwise.
    """
    mscale = _number(f"{name}.mscale", rope.get("mscale"), 0.0)
    wanted = _number(f"{name}.attention_factor", rope.get("attention_factor"), yarn_mscale(factor, 1.0))
    if rope.get("attention_factor") is None:
        if mscale and all_dim:
            return mscale
        if not all_dim:
            return 1.0
    if factor <= 1:
        if wanted != 1.0:
            raise ValueError(f"want {name} with attention_factor 1 where factor is 1, got {wanted}")
        return 1.0
    return (wanted * yarn_mscale(factor, all_dim) - 1) / (0.1 * math.log(factor))


def _number(name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if type(value) not in (int, float):
        raise ValueError(f"want {name} a number, got {value!r}")
    return float(value)
