"""Tests of reading rows: every format, every kind of bad row, and the place that the message names."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.bulk.files import open_texts
from unmask.bulk.storage import local_file
from unmask.errors import StorageError, UsageError
from unmask.training.examples import read_examples
from unmask.training.recipe import DataSource
from unmask.training.rows import BadRows, Row, read_rows

ROWS = [{"query": "größer als 日本 🙂", "positive": "a"}, {"query": "b\rc", "positive": "d"}]


def rows_of(file: Path, bad: BadRows | None = None) -> list[Row]:
    return list(read_rows(str(file), bad or BadRows(1.0)))


def write(folder: Path, name: str) -> Path:
    """ROWS in the format that the name ends in."""
    file = folder / name
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), file)
        return file
    if "jsonl" in name:
        text = "\n".join(json.dumps(row) for row in ROWS) + "\n"
    elif "csv" in name:
        text = "query,positive\r\n" + "".join(f'"{row["query"]}",{row["positive"]}\r\n' for row in ROWS)
    else:
        text = "query\tpositive\n" + "".join(f"{row['query']}\t{row['positive']}\n" for row in ROWS)
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.v2.csv", "a.csv.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    bad = BadRows(0.0)
    rows = rows_of(write(tmp_path, name), bad)
    assert [row.fields for row in rows] == ROWS
    assert not bad.bad
    assert all(row.place.startswith(f"{name}:") for row in rows)


def test_a_text_file_has_a_text_per_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\n\n two\rhalf \r\nthree")
    assert [(row.fields["text"], row.place) for row in rows_of(file)] == [
        ("one", "a.txt:1"),
        ("", "a.txt:2"),
        (" two\rhalf ", "a.txt:3"),
        ("three", "a.txt:4"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        (
            "a.tsv",
            b"q\tp\n1\t2\nonly one\n1\t2\t3\n1\t2\n\n",
            ["a.tsv:3: 1 fields", "a.tsv:4: 3 fields", "a.tsv:6: 1 fields"],
        ),
        ("a.csv", b"q,p\n1,2\nonly one\n1,2,3\n1,2\n", ["a.csv:3: 1 fields", "a.csv:4: 3 fields"]),
        (
            "a.jsonl",
            b'{"q": 1}\n{"q": \n[1]\n\n{"q": 2}\n',
            ["a.jsonl:2: not JSON", "a.jsonl:3: list found", "a.jsonl:4: blank"],
        ),
        ("a.tsv", b"q\tp\n1\t2\nbroken \xff byte\t2\n1\t2\n", ["a.tsv:3: byte 8 of the line is not UTF-8"]),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_read(
    name: str, content: bytes, places: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    bad = BadRows(1.0)
    assert len(rows_of(tmp_path / name, bad)) == 2
    assert bad.bad == len(places)
    assert all(message.startswith(place) for message, place in zip(bad.places, places, strict=True))


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_name(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, name)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [row.fields for row in rows_of(file)] == ROWS


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.txt"])
def test_a_book_may_stand_on_one_line(name: str, tmp_path: Path) -> None:
    text = "word " * 100_000
    content = {"a.tsv": f"text\n{text}\n", "a.csv": f"text\n{text}\n", "a.txt": text}
    (tmp_path / name).write_text(content.get(name, json.dumps({"text": text})), encoding="utf-8")
    assert rows_of(tmp_path / name, BadRows(0.0))[0].fields["text"].strip() == text.strip()


@pytest.mark.parametrize("rows", [10, 199, 1000])
def test_the_run_stops_past_the_share_allowed(rows: int, tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("q\tp\n" + "1\t2\n" * (rows - rows // 5) + "bad\n" * (rows // 5), encoding="utf-8")

    def read(allowed: float) -> BadRows:
        bad = BadRows(allowed)
        for _ in read_rows(str(file), bad):
            bad.good()
        bad.close()
        return bad

    bad_rows = read(0.2)
    assert (bad_rows.bad, bad_rows.seen) == (rows // 5, rows)
    assert len(bad_rows.places) <= 20
    with pytest.raises(UsageError, match=r"rows are unusable, more than the 10.0% allowed \(max_bad_rows\).*a.tsv:\d+"):
        read(0.1)


def test_the_run_stops_early_in_a_long_file(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("q\tp\n" + "bad\n" * 5000, encoding="utf-8")
    bad = BadRows(0.5)
    with pytest.raises(UsageError):
        list(read_rows(str(file), bad))
    assert bad.seen == 200


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv.gz", gzip.compress(b"q\tp\n" + b"1\t2\n" * 5000)[:-20], "cannot be read to its end"),
        (
            "a.tsv.gz",
            gzip.compress(b"q\tp\n" + bytes(range(256)) * 99)[:12] + b"\xff" * 60,
            "cannot be read to its end",
        ),
        ("a.parquet", b"no parquet", "not a readable parquet file"),
    ],
)
def test_a_damaged_file_is_said_to_be_damaged(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StorageError, match=message):
        rows_of(tmp_path / name)


def test_a_wrong_name_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=str(tmp_path / "none.tsv")):
        list(read_rows("none.tsv", BadRows(), tmp_path))
    with pytest.raises(UsageError, match=r"unknown kind of file; use one of .tsv, .csv, .jsonl, .parquet, .txt"):
        list(read_rows("a.docx", BadRows(), tmp_path))


def test_a_hub_data_set_is_streamed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path, "a.jsonl")
    rows = list(read_rows(f"hf:{tmp_path}", BadRows()))
    assert [row.fields for row in rows] == ROWS
    assert rows[1].place == f"hf:{tmp_path}:2"
    with pytest.raises(UsageError, match="cannot be read from the hub"):
        list(read_rows(f"hf:{tmp_path / 'none'}", BadRows()))


def encode_reads(file: Path, file_format: str) -> list[str] | str:
    """The texts that `unmask encode` reads, or the place where it stops."""
    read: list[str] = []
    try:
        with open_texts(local_file(file), file_format, "text") as texts:
            for text in texts:
                if not text.strip():
                    return EMPTY
                read.append(text)
    except UsageError as error:
        return place_in(str(error))
    return read


def train_reads(file: Path) -> list[str] | str:
    """The texts that `unmask train` reads, or the place of the first row that it refuses."""
    bad = BadRows(0.0)
    source = DataSource(name="set", path=str(file), text="text")
    try:
        texts = [example.query for example in read_examples(source, None, bad)]
        bad.close()
    except (UsageError, StorageError) as error:
        return place_in(str(error))
    return texts


def place_in(message: str) -> str:
    """The line that a message names; "whole file" if it names none, and EMPTY for an empty text."""
    if "is empty" in message and "first line" not in message:
        return EMPTY
    line = re.search(r"(?:, line |\.(?:tsv|csv|jsonl|txt):)(\d+)", message)
    return f"line {line[1]}" if line else "whole file"


EMPTY = "an empty text"
MESSY = {
    "quotes": b'"Hello, he said\n5" pipe\nplain\na "quoted" word\n"unclosed\nlast\n',
    "swallowed": b'"opened here\nplain\nand closed there"\nlast\n',
    "doubled": b'"He said ""yes"""\n"plain"\n',
    "blank": b"one\n\ntwo\n\n",
    "endings": b"one\r\ntwo\r\r\nthree\r",
    "returns": b"one\rhalf\ntwo\n",
    "separators": "a\u2028b\x85c\x0bd\n".encode(),
    "latin-1": b"one\ncaf\xe9\ntwo\n",
    "tabs": b"one\ttwo\nthree\n",
    "commas": b"one, two\nthree\n",
    "json": b'{"text": "one"}\n{"text": null}\n{"body": "two"}\n',
    "json-types": b'{"text": "one"}\n{"text": 3}\n',
    "json-strings": b'"one"\n"two"\n{"text": "three"}\n',
    "json-surrogate": b'{"text": "one"}\n{"text": "\\ud83d"}\n',
    "json-surrogate-elsewhere": b'{"text": "one", "other": "\\ud83d"}\n',
    "nothing": b"",
    "zero": b"one\x00two\n",
}


@pytest.mark.parametrize("header", [b"", b"text\n", b"\xef\xbb\xbftext\n", b"n\ttext\n", b"text,text\n", b"other\n"])
@pytest.mark.parametrize("file_format", ["tsv", "csv", "jsonl", "txt"])
@pytest.mark.parametrize("name", MESSY)
def test_encode_and_train_read_the_same_rows(name: str, file_format: str, header: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"a.{file_format}"
    file.write_bytes(header + MESSY[name])
    assert encode_reads(file, file_format) == train_reads(file)


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([*b'"\t,\n\r\\ax', *[b'""', b'"text"', b"\xff", "é\u2028".encode()]]), max_size=25),
    file_format=st.sampled_from(["tsv", "csv", "jsonl", "txt"]),
)
def test_encode_and_train_read_any_bytes_alike(
    pieces: list[int | bytes], file_format: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / f"any.{file_format}"
    content = b"".join(bytes([piece]) if isinstance(piece, int) else piece for piece in pieces)
    file.write_bytes((b"text\n" if file_format in ("tsv", "csv") else b"") + content)
    assert encode_reads(file, file_format) == train_reads(file)
