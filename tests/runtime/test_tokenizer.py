"""Text to ids, ids to text, token by token as well, and chat templates."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from deepfuse.runtime.checkpoint_files import CheckpointError
from deepfuse.runtime.tokenizer import Tokenizer

BOS, EOS, USER = "<|begin|>", "<|end|>", "<|user|>"
TEXT = "The naïve café owner said: 你好，世界! 😀😀 Ærøskøbing \u2581 and \uff5c bars. " * 3
TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('no role ' ~ m['role']) }}{% endif %}
    {% if m['content'] == 'skip' %}{% continue %}{% endif %}
{{ '<|user|>' if m['role'] == 'user' else '' }}{{ m['content'] }}{{ eos_token }}{{ m | tojson }}
{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"""
HELLO = [{"role": "user", "content": "Grüße <b> & 'x'"}, {"role": "user", "content": "skip"}]
HELLO += [{"role": "assistant", "content": "Hi"}]


def byte_level() -> tokenizers.Tokenizer:
    """A small byte-level BPE with three special tokens and one ordinary added one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[BOS, EOS, USER],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


BYTE_LEVEL = Tokenizer(byte_level())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    configure(tmp_path, bos_token=BOS, eos_token={"content": EOS, "lstrip": False, "special": True})
    return tmp_path


def configure(folder: Path, **settings: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_bytes_that_are_no_text_are_refused() -> None:
    text = b"caf\xff".decode(errors="surrogateescape")  # as Python reads arguments
    with pytest.raises(ValueError, match="tokenizer: want a text of whole characters, got 'caf.*is it UTF-8"):
        BYTE_LEVEL.encode(text)


def test_text_comes_back(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 0 and tokenizer.encode(TEXT, add_bos=False) == ids[1:]
    assert tokenizer.decode(ids) == TEXT and tokenizer.decode(ids, skip_special=False) == BOS + TEXT
    assert tokenizer.encode("") == [0] and tokenizer.decode([]) == ""
    # the token added last
    assert tokenizer.vocab_size == tokenizer.backend.token_to_id("<think>") + 1
    # a model's vocabulary may be larger than the tokenizer's
    assert tokenizer.decode([5000, *ids]) == TEXT


def test_ids_are_those_of_transformers(folder: Path) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in (TEXT, "a<think>b", USER + " x" + EOS):
        assert Tokenizer.from_folder(folder).encode(text, add_bos=False) == oracle.encode(
            text, add_special_tokens=False
        )


def test_the_text_begins_once(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode(BOS + "a") == tokenizer.encode("a")
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    backend.save(str(folder / "tokenizer.json"))
    twice = Tokenizer.from_folder(folder)
    assert twice.encode("a") == tokenizer.encode("a") and twice.encode("a", add_bos=False) == tokenizer.encode("a")[1:]


def test_where_the_first_token_is_named(folder: Path) -> None:
    bare = Tokenizer.from_folder(folder).encode("a", add_bos=False)
    configure(folder, bos_token=BOS, add_bos_token=False)
    assert Tokenizer.from_folder(folder).encode("a") == bare
    configure(folder, bos_token=None)
    assert Tokenizer.from_folder(folder).encode("a") == bare
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(folder).encode("a") == bare
    (folder / "config.json").write_text('{"bos_token_id": 2}')
    assert Tokenizer.from_folder(folder).encode("a") == [2, *bare]
    (folder / "config.json").write_text('{"bos_token_id": null}')
    assert Tokenizer.from_folder(folder).encode("a") == bare


def test_files_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="want a folder, got .*nowhere"):
        Tokenizer.from_folder(folder / "nowhere")
    configure(folder, bos_token="<unheard-of>")
    with pytest.raises(CheckpointError, match="want a bos_token of the vocabulary, got '<unheard-of>'"):
        Tokenizer.from_folder(folder)
    configure(folder, chat_template={"a": 1})
    with pytest.raises(CheckpointError, match="want chat_template a text, got {'a': 1}"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="tokenizer_config.json: want a JSON object, got a list"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="tokenizer.json: want a tokenizer of the tokenizers library, got"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="want a tokenizer.json, got none"):
        Tokenizer.from_folder(folder)


# token by token


def pieces(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> list[str]:
    stream = tokenizer.stream(skip_special)
    return [*(stream.push(i) for i in ids), stream.flush()]


@given(text=st.text(), skip_special=st.booleans())
def test_pieces_of_a_text_are_whole_characters(text: str, skip_special: bool) -> None:
    ids = BYTE_LEVEL.encode(text, add_bos=False)
    got = pieces(BYTE_LEVEL, ids, skip_special)
    assert "".join(got) == BYTE_LEVEL.decode(ids, skip_special)
    assert sum(piece.count("\ufffd") for piece in got) == text.count("\ufffd")


@given(ids=st.lists(st.integers(0, 335), max_size=40), skip_special=st.booleans())
def test_pieces_of_any_tokens_are_the_decoded_whole(ids: list[int], skip_special: bool) -> None:
    assert "".join(pieces(BYTE_LEVEL, ids, skip_special)) == BYTE_LEVEL.decode(ids, skip_special)


@given(data=st.binary(max_size=40))
def test_bytes_one_by_one(data: bytes) -> None:
    ids = [BYTE_LEVEL.backend.token_to_id(byte_letter(b)) for b in data]
    assert "".join(pieces(BYTE_LEVEL, ids, True)) == data.decode(errors="replace")


def byte_letter(byte: int) -> str:
    """The letter that stands for a byte in a byte-level vocabulary (GPT-2, encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in plain:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in plain].index(byte))


def test_a_piece_waits_for_its_character() -> None:
    stream = BYTE_LEVEL.stream()
    ids = [BYTE_LEVEL.backend.token_to_id(byte_letter(b)) for b in "a😀b".encode()]
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "😀", "b"]
    assert stream.flush() == ""
    assert stream.push(ids[1]) == "" and stream.flush() == "\ufffd"
    # and it begins anew
    assert stream.push(ids[0]) == "a"


def test_pieces_of_a_decoder_that_looks_back() -> None:
    backend = tokenizers.Tokenizer(
        models.BPE({"\u2581a": 0, "\u2581b": 1, "c": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5}, [])
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend)
    assert pieces(tokenizer, [0, 1, 3, 4, 5, 2, 1, 3], True) == ["a", " b", "", "", "€", "c", " b", "", "\ufffd"]


# chat


def test_a_conversation_is_rendered_as_transformers_does(folder: Path) -> None:
    configure(folder, bos_token=BOS, eos_token={"content": EOS}, chat_template=TEMPLATE)
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=BOS, eos_token=EOS)
    tokenizer = Tokenizer.from_folder(folder)
    for prompt in (True, False):
        want = oracle.apply_chat_template(HELLO, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.chat(HELLO, add_generation_prompt=prompt) == want
    assert tokenizer.chat(HELLO).startswith(BOS) and '"content": "Grüße <b> & \'x\'"' in tokenizer.chat(HELLO)
    assert tokenizer.encode(tokenizer.chat(HELLO)) == tokenizer.encode(tokenizer.chat(HELLO), add_bos=False)


def test_where_a_template_may_lie(folder: Path) -> None:
    configure(folder, chat_template=[{"name": "rag", "template": "no"}, {"name": "default", "template": "listed"}])
    assert Tokenizer.from_folder(folder).chat([]) == "listed"
    (folder / "chat_template.jinja").write_text("file {{ who }}, {{ strftime_now('%Y') | length }}")
    assert Tokenizer.from_folder(folder).chat([], who="me") == "file me, 4"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="chat_template.jinja: want a text, got"):
        Tokenizer.from_folder(folder)


def test_a_model_without_a_template(folder: Path) -> None:
    with pytest.raises(ValueError, match="chat: want a model with a chat template .*got one without; use generate"):
        Tokenizer.from_folder(folder).chat(HELLO)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (TEMPLATE, "TemplateError: no role system"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ messages[0].nothing.nothing }}", "UndefinedError"),
    ],
)
def test_a_template_that_fails(template: str, match: str) -> None:
    tokenizer = Tokenizer(byte_level(), chat_template=template)
    with pytest.raises(ValueError, match=f"chat template: want a conversation it accepts, got {match}"):
        tokenizer.chat([{"role": "system", "content": "Be brief."}])
