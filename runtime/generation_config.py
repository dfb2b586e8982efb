"""``generation_config.json``: how a checkpoint's makers want text to be drawn from it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from deepfuse.runtime.checkpoint_files import CheckpointError, read_object


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """What generation does where the caller does not say."""

    temperature: float = 0.0
    """0 takes the most likely token: so it is too where the file has ``do_sample`` false, or not at all."""
    top_k: int = 0
    """Only the so many most likely; 0 for all."""
    top_p: float = 1.0
    max_new_tokens: int = 128
    eos_token_id: int | tuple[int, ...] | None = None
    """Tokens that end a text; ``None`` leaves it to ``config.json``."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the file that generation does not read."""

    def __post_init__(self) -> None:
        ids = all(type(i) is int and i >= 0 for i in self.eos_token_ids)
        wanted = {
            "temperature": ("a number >= 0", _is_number(self.temperature) and self.temperature >= 0),
            "top_k": ("an integer >= 0", type(self.top_k) is int and self.top_k >= 0),
            "top_p": ("a number in (0, 1]", _is_number(self.top_p) and 0 < self.top_p <= 1),
            "max_new_tokens": ("an integer >= 1", type(self.max_new_tokens) is int and self.max_new_tokens >= 1),
            "eos_token_id": ("a token id, a list of them or null", ids),
        }
        for name, (kind, fits) in wanted.items():
            if not fits:
                raise ValueError(f"generation_config: want {name} {kind}, got {getattr(self, name)!r}")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Self:
        """Of a checkpoint folder; the defaults where it has no ``generation_config.json``.

        Raises:
            CheckpointError: the file is not a JSON object, or a value is out of range.
        """
        path = Path(folder) / "generation_config.json"
        if not path.exists():
            return cls()
        raw = {k: v for k, v in read_object(path).items() if v is not None}
        names = ("temperature", "top_k", "top_p", "max_new_tokens", "eos_token_id")
        values = {name: raw.pop(name) for name in names if name in raw}
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        # transformers samples only where told to, and then at temperature 1 where none is given
        values["temperature"] = values.get("temperature", 1.0) if raw.pop("do_sample", False) else 0.0
        try:
            return cls(**values, extra=raw)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
