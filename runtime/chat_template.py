"""Chat templates: a conversation to the text a model was trained on.

Templates come with checkpoints, so they run in jinja's sandbox, in which they can call and change nothing of Python.
Source: ``chat_template_utils.py`` of transformers 5.23, whose filters and functions templates rely on.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepfuse.runtime.checkpoint_files import CheckpointError


def read_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template of a checkpoint folder, if it has one.

    Args:
        folder: its ``chat_template.jinja`` goes first.
        settings: the object in ``tokenizer_config.json``, whose ``chat_template`` is a text, or a list of named ones.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: want a text, got {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", template)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: want chat_template a text, got {template!r:.80}")
    return template


def render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """The conversation as text.

    Args:
        template: jinja source.
        messages: ``{"role": ..., "content": ...}`` each.
        variables: further names the template may use: special tokens, ``add_generation_prompt``, ``tools``.

    Raises:
        ValueError: the template is no jinja, refuses the conversation, or tries what the sandbox forbids.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(messages=messages, **variables)
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"chat template: want a conversation it accepts, got {type(error).__name__}: {error}"
        ) from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own would escape for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
