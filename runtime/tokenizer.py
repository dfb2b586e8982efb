"""Text to token ids and back, for the ``tokenizer.json`` of a checkpoint.

A token of a byte-level vocabulary may be part of a character: text that grows token by token comes from
:class:`Stream`, which waits until a character is whole.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders

from deepfuse.runtime.chat_template import read_template, render
from deepfuse.runtime.checkpoint_files import CheckpointError, existing_folder, read_object

UNFINISHED = "\ufffd"
"""What bytes that are no whole character are decoded to."""


class Tokenizer:
    """A tokenizer, its special tokens and its chat template."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        bos_id: int | None = None,
        chat_template: str | None = None,
    ):
        """Wrap a tokenizer.

        Args:
            tokenizer: of the ``tokenizers`` library.
            special_tokens: ``bos_token``, ``eos_token`` and others to their texts, for the chat template.
            bos_id: put before every text, if any.
            chat_template: jinja source.
        """
        self.backend = tokenizer
        self.special_tokens, self.bos_id = dict(special_tokens or {}), bos_id
        self.chat_template = chat_template

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Self:
        """Of a checkpoint folder: ``tokenizer.json``, and ``tokenizer_config.json`` where there is one.

        The token that begins a text is the config's ``bos_token``, or the ``bos_token_id`` of ``config.json``; none
        where ``add_bos_token`` is false.

        Raises:
            FileNotFoundError: the folder does not exist.
            CheckpointError: ``tokenizer.json`` is missing, or a file cannot be read.
        """
        path = existing_folder(folder)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{path}: want a tokenizer.json, got none; other forms of tokenizers are not read")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
            raise CheckpointError(f"{file}: want a tokenizer of the tokenizers library, got {error}") from None
        settings = read_object(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
        special = {name: text for name, value in settings.items() if name.endswith("_token") and (text := _text(value))}
        return cls(
            tokenizer,
            special_tokens=special,
            bos_id=_bos_id(tokenizer, settings, special, path),
            chat_template=read_template(path, settings),
        )

    @property
    def vocab_size(self) -> int:
        """Entries, added tokens included. A model may have more: its vocabulary is often rounded up."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Ids of a text.

        Args:
            text: special tokens in it are read as such.
            add_bos: begin with the beginning-of-text token, if there is one and ``text`` does not begin with it.

        Raises:
            ValueError: half a surrogate pair is in the text: it was decoded from bytes that are not UTF-8.
        """
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"tokenizer: want a text of whole characters, got {text!r:.80}; is it UTF-8?")
        ids = self.backend.encode(text, add_special_tokens=add_bos).ids
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids, without special tokens unless wanted; ids beyond the vocabulary have no text."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> "Stream":
        """A decoder for one text that comes token by token."""
        return Stream(self, skip_special)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A conversation as the text the model knows; encode it with ``add_bos=False``.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            add_generation_prompt: end with what begins an answer.
            variables: further names for the template, such as ``tools``.

        Raises:
            ValueError: the tokenizer has no chat template, or it does not accept the conversation.
        """
        if self.chat_template is None:
            raise ValueError(
                "chat: want a model with a chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json), got one without; use generate, which continues a text"
            )
        known = self.special_tokens | {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        return render(self.chat_template, messages, known | variables)


class Stream:
    """Decodes token by token: the pieces, put together, are ``decode`` of all tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        # bytes do not depend on the tokens before, so that what was given out whole can be forgotten
        self._forgets = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
        self._ids: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """The text that is certain after this token; empty while a character is not whole."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, self._skip_special)
        whole = text.rstrip(UNFINISHED)
        piece = whole[self._given :]
        self._given = max(self._given, len(whole))
        if self._forgets and whole == text:
            self._ids, self._given = [], 0
        return piece

    def flush(self) -> str:
        """The rest, when no more tokens come; the stream then begins anew."""
        piece = self._tokenizer.decode(self._ids, self._skip_special)[self._given :]
        self._ids, self._given = [], 0
        return piece


def _text(value: Any) -> str | None:
    """A special token's text; ``{"content": ...}`` in some files."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _bos_id(
    tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any], special: Mapping[str, str], path: Path
) -> int | None:
    if settings.get("add_bos_token") is False:
        return None
    if "bos_token" in special:
        found = tokenizer.token_to_id(special["bos_token"])
        if found is None:
            raise CheckpointError(
                f"{path / 'tokenizer_config.json'}: want a bos_token of the vocabulary, got {special['bos_token']!r}"
            )
        return found
    if "bos_token" in settings or not (path / "config.json").is_file():
        return None
    found = read_object(path / "config.json").get("bos_token_id")
    return found if type(found) is int else None
