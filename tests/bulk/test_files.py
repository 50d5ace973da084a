"""Readers lose nothing and refuse what they cannot read; writers can be read back."""

import csv
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from unmask import tables
from unmask.bulk import chunks as chunks_module
from unmask.bulk.chunks import cut
from unmask.bulk.files import (
    INPUT_FORMATS,
    NPY_HEADER_BYTES,
    OUTPUT_FORMATS,
    format_of,
    jsonl_lines,
    npy_header,
    open_texts,
    row_count,
    write_jsonl,
    write_parquet,
)
from unmask.bulk.storage import InputFile, local_file
from unmask.errors import UsageError

any_text = st.text(st.characters(exclude_categories=["Cs"]))
line_text = any_text.filter(lambda text: "\n" not in text and not text.endswith("\r"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("files")


def texts_of(file: Path, file_format: str, column: str = "text") -> list[str]:
    source = InputFile("-") if str(file) == "-" else local_file(file)
    with open_texts(source, file_format, column) as texts:
        return list(texts)


def refused(file: Path, content: bytes, file_format: str, column: str = "text") -> str:
    """Return the error message for a file of this content."""
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        texts_of(file, file_format, column)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    return message


@given(texts=st.lists(any_text))
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl_keeps_any_text(scratch: Path, texts: list[str], bare: bool, ascii_only: bool) -> None:
    file = scratch / "a.jsonl"
    rows = [text if bare else {"id": 1, "text": text} for text in texts]
    file.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), "utf-8", newline="")
    assert texts_of(file, "jsonl") == texts


@given(texts=st.lists(any_text))
def test_csv_keeps_any_text(scratch: Path, texts: list[str]) -> None:
    file = scratch / "a.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(texts))
    assert texts_of(file, "csv") == texts
    assert row_count(local_file(file), "csv") == len(texts)


@given(texts=st.lists(line_text.filter(lambda text: "\t" not in text)))
def test_tsv_keeps_any_text_of_one_field_as_it_stands(scratch: Path, texts: list[str]) -> None:
    file = scratch / "a.tsv"
    rows = "".join(f"{number}\t{text}\n" for number, text in enumerate(texts))
    file.write_text("id\ttext\n" + rows, encoding="utf-8", newline="")
    assert texts_of(file, "tsv") == texts
    assert row_count(local_file(file), "tsv") == len(texts)


def test_a_gzipped_file_is_read_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv.gz"
    file.write_bytes(gzip.compress(b"text\na\nb\n"))
    assert format_of(str(file), None, INPUT_FORMATS, "txt", "--input-format") == "tsv"
    assert texts_of(file, "tsv") == ["a", "b"]
    assert row_count(local_file(file), "tsv") is None
    with pytest.raises(UsageError, match=r"does not tell its format"):
        format_of("a.npy.gz", None, OUTPUT_FORMATS, "jsonl", "--output-format")


@given(texts=st.lists(any_text))
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_keeps_any_text(scratch: Path, texts: list[str], kind: pa.DataType) -> None:
    file = scratch / "a.parquet"
    pq.write_table(pa.table({"id": range(len(texts)), "text": pa.array(texts, kind)}), file, row_group_size=3)
    assert texts_of(file, "parquet") == texts
    assert row_count(local_file(file), "parquet") == len(texts)


@given(texts=st.lists(line_text), ending=st.sampled_from(["\n", "\r\n"]))
def test_txt_keeps_any_text_without_line_ends(scratch: Path, texts: list[str], ending: str) -> None:
    file = scratch / "a.txt"
    # With a byte order mark of its own, a U+FEFF at the start of the first text is a character.
    file.write_text("\ufeff" + "".join(text + ending for text in texts), "utf-8", newline="")
    assert texts_of(file, "txt") == texts


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("", []),
        ("a", ["a"]),
        ("a\n\nb", ["a", "", "b"]),
        ("a\n\n", ["a", ""]),
        ("a\r\nb\r\r\nc\r", ["a", "b\r", "c\r"]),
        ("a\u2028b\x85c\x0bd\x0ce\n", ["a\u2028b\x85c\x0bd\x0ce"]),
    ],
)
def test_only_newline_ends_a_txt_line(tmp_path: Path, content: str, texts: list[str]) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content.encode())
    assert texts_of(file, "txt") == texts
    assert row_count(local_file(file), "txt") == len(texts)


@pytest.mark.parametrize(
    ("file_format", "content"),
    [("txt", "é\n"), ("jsonl", '{"text": "é"}\n'), ("csv", "text\né\n"), ("tsv", "text\né\n")],
)
def test_byte_order_mark_is_not_text(tmp_path: Path, file_format: str, content: str) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert texts_of(file, file_format) == ["é"]


def test_null_is_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    assert texts_of(tmp_path / "a.jsonl", "jsonl") == ["", ""]
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", "parquet") == ["a", ""]


@pytest.mark.parametrize("file_format", ["txt", "jsonl", "csv", "tsv"])
def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path, file_format: str) -> None:
    message = refused(
        tmp_path / "a", b'text\n"caf\xe9"\n' if file_format != "jsonl" else b'"a"\n"caf\xe9"\n', file_format
    )
    assert "line 2: byte 5 of the line is not UTF-8" in message
    assert "iconv" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'"a"\n{"text": \n', "line 2: not JSON (Expecting value"),
        (b'"a"\n\n"b"\n', "line 2: blank"),
        (b'{"body": "a", "id": 1}\n', "line 1: no field 'text'; it has the fields 'body', 'id'; choose with --column"),
        (b'{"text": 3}\n', "line 1: field 'text': number found"),
        (b'{"text": ["a"]}\n', "line 1: field 'text': list found"),
        (b'"a"\nnull\n', "line 2: null found"),
        (b'"a"\n"x\\ud800y"\n', "line 2: field 'text': \\ud800 is half a surrogate pair"),
        (b"[" * 100_000 + b"\n", "line 1: not JSON"),
        (b"9" * 5000 + b"\n", "line 1: not JSON"),
    ],
)
def test_bad_jsonl_is_refused_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refused(tmp_path / "a.jsonl", content, "jsonl")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; its first line must name the columns"),
        (b"id,body\n1,a\n", "no column 'text'; it has the columns 'id', 'body': choose with --column"),
        (b"text,text\na,b\n", "2 columns named 'text'"),
        (b"id,text\n1,a\n2,b,c\n", "line 3: 3 fields where the header has 2"),
        (b"id,text\n1,a\n\n", "line 3: 0 fields where the header has 2"),
        (b'id,text\n1,a\n2,"b\nc\n', "line 3: unexpected end of data"),
        (b'id,text\n1,"a\nb" c\n', "line 2: ',' expected after '\"'"),
        (b"id,text\r1,a\r", "line 1: new-line character seen in unquoted field"),
    ],
)
def test_bad_csv_is_refused_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refused(tmp_path / "a.csv", content, "csv")


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    assert "is not a readable parquet file" in refused(file, b"PAR1 but no more", "parquet")
    pq.write_table(pa.table({"text": [1, 2], "other": ["a", "b"]}), file)
    assert "column 'text' holds int64, not strings" in refused(file, file.read_bytes(), "parquet")
    assert "no column 'body'; it has the columns 'text', 'other'" in refused(file, file.read_bytes(), "parquet", "body")
    not_utf8 = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 1, 2], np.int32).tobytes()), pa.py_buffer(b"a\xff")
    )
    pq.write_table(pa.table({"text": not_utf8}), file)
    assert "row 2: 'text' is not UTF-8" in refused(file, file.read_bytes(), "parquet")
    pq.write_table(pa.table({"text": [str(i) for i in range(10_000)]}), file, compression="none")
    damaged = file.read_bytes()
    damaged = damaged[:4] + b"\xff" * 2000 + damaged[2004:]
    assert "damaged after row 0" in refused(file, damaged, "parquet")


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 1000)
    file = tmp_path / "a"
    assert "line 2: longer than" in refused(file, b"a\n" + b"x" * 1001, "txt")
    # An unclosed quote swallows lines until the limit on a field.
    assert "line 2: field larger than field limit" in refused(file, b'text\n"a\n' + b"line\n" * 1000, "csv")


def test_long_texts_fit_in_csv(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text\n" + "x" * 500_000 + "\n")
    assert texts_of(file, "csv") == ["x" * 500_000]


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        local_file(tmp_path / "nothing.txt")
    folder = local_file(tmp_path)
    with pytest.raises(UsageError, match="cannot read"), open_texts(folder, "txt"):
        pass
    assert row_count(folder, "txt") is None


class EndlessLines(io.RawIOBase):
    """A pipe that never ends."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        line = b'"endless"\n'
        buffer[: len(line)] = line
        return len(line)


def test_texts_are_read_as_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    with io.TextIOWrapper(io.BufferedReader(EndlessLines())) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        with open_texts(InputFile("-"), "jsonl") as texts:
            assert list(itertools.islice(texts, 5)) == ["endless"] * 5
        assert row_count(InputFile("-"), "jsonl") is None


class CountedFile(io.BytesIO):
    """Counts the bytes that were asked for."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.count += len(content)
        return content


def test_a_large_row_group_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{i} " + "x" * 1000 for i in range(20_000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    counted = CountedFile((tmp_path / "a.parquet").read_bytes())
    with io.TextIOWrapper(counted) as file:
        monkeypatch.setattr("sys.stdin", file)
        with open_texts(InputFile("-"), "parquet") as read:
            assert next(read) == texts[0]
            assert 0 < counted.count < 8 * 2**20
            assert list(read) == texts[1:]


class Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False


def test_parquet_comes_through_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    with io.TextIOWrapper(Pipe((tmp_path / "a.parquet").read_bytes())) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        assert texts_of(Path("-"), "parquet") == ["a", "b"]


def test_formats_are_told_by_the_name() -> None:
    def resolved(name: str, chosen: str | None = None) -> str:
        return format_of(name, chosen, INPUT_FORMATS, "txt", "--input-format")

    names = ("a.txt", "a.b.JSONL", "a.ndjson", "a.csv", "a.tsv", "a.parquet", "-")
    assert [resolved(name) for name in names] == ["txt", "jsonl", "jsonl", "csv", "tsv", "parquet", "txt"]
    assert resolved("a.csv", "txt") == "txt"
    with pytest.raises(UsageError, match=r"a\.gz does not tell its format; add --input-format with one of txt,"):
        resolved("a.gz")
    with pytest.raises(UsageError, match="--input-format xml: choose one of txt, jsonl, csv, tsv, parquet"):
        resolved("a.txt", "xml")


@given(st.lists(st.text(max_size=30)), st.integers(1, 5), st.integers(1, 50), st.integers(1, 10))
def test_chunks_keep_order_and_depend_on_what_they_hold(
    texts: list[str], rows: int, characters: int, max_length: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks_module, "CHUNK_ROWS", rows)
        patch.setattr(chunks_module, "CHUNK_CHARACTERS", characters)
        chunks = list(cut(texts, 0, "a.txt", max_length))
        assert [text for chunk in chunks for text in chunk.texts] == texts
        assert all(chunk.full for chunk in chunks[:-1])
        # Cutting again from any border gives the same borders after it.
        for chunk in chunks:
            assert list(cut(texts[chunk.first :], 0, "a.txt", max_length, chunk.first)) == chunks[chunks.index(chunk) :]


finite_vectors = arrays.arrays(
    np.float32,
    st.tuples(st.integers(0, 6), st.just(3)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(vectors=finite_vectors, empty=st.sets(st.integers(0, 5)))
def test_vectors_read_back_to_the_last_bit(scratch: Path, vectors: np.ndarray, empty: set[int]) -> None:
    vectors[[row for row in empty if row < len(vectors)]] = np.nan
    expected = [None if np.isnan(vector[0]) else vector.tolist() for vector in vectors]
    blocks = [vectors[:2], vectors[2:]] if len(vectors) > 2 else [vectors] if len(vectors) else []

    write_jsonl(scratch / "a.jsonl", blocks)
    rows = [json.loads(line) for line in (scratch / "a.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(len(vectors)))
    read = [row["embedding"] and np.array(row["embedding"], np.float32).tolist() for row in rows]
    assert read == expected

    write_parquet(scratch / "a.parquet", blocks, dim=3, made_with={"dtype": "float32"})
    table = pq.read_table(scratch / "a.parquet")
    assert table.schema.field("embedding").type.list_size == 3
    assert table["index"].to_pylist() == list(range(len(vectors)))
    assert table["embedding"].to_pylist() == expected

    (scratch / "a.npy").write_bytes(npy_header(*vectors.shape) + vectors.tobytes())
    np.testing.assert_array_equal(np.load(scratch / "a.npy"), vectors)


def test_npy_header_has_room_for_any_size() -> None:
    header = npy_header(10**15, 10**6)
    assert len(header) == NPY_HEADER_BYTES
    assert np.lib.format.read_array_header_1_0(io.BytesIO(header[8:])) == ((10**15, 10**6), False, np.dtype("<f4"))


def test_jsonl_lines_count_on() -> None:
    assert jsonl_lines(np.array([[0.1, 2]], np.float32), first=7) == b'{"index":7,"embedding":[0.1,2.0]}\n'


@pytest.mark.parametrize(
    ("arguments", "redirection", "code", "message"),
    [
        ("in.txt -o -", "| head -n 1 >line", 141, ""),
        ("in.txt -o - --output-format npy", "| head -c 1 >line", 141, ""),
        ("in.txt -o -", ">/dev/full", 1, "cannot write standard output: No space left on device"),
        ("in.txt -o -", ">&-", 1, "standard output is closed; name a file with --output"),
        ("- -o out.npy", "<&-", 1, "standard input is closed; pipe texts into it, or name files"),
    ],
)
def test_streams_that_are_closed_or_full_end_a_run_in_one_sentence(
    tmp_path: Path, golden_dir: Path, arguments: str, redirection: str, code: int, message: str
) -> None:
    (tmp_path / "in.txt").write_text("".join(f"text {number}\n" for number in range(3000)))
    command = f"{sys.executable} -m unmask encode {arguments} --model {golden_dir / 'tiny_llama'} {redirection}"
    script = f"{command}; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert message in done.stderr and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
