"""Tables are read whole and in order; a row that cannot be read stops the reader or is reported with its place."""

import gzip
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unmask.errors import UsageError
from unmask.tables import Row, TableError, first_surrogate, json_name, open_table, read_table, table_format


def rows_of(
    content: bytes, file_format: str, *, quoted_tsv: bool = False, bare_strings: bool = False
) -> list[dict[str, str]]:
    """Read strictly: the first bad row raises."""
    table = open_table(io.BytesIO(content), file_format, "a", quoted_tsv=quoted_tsv, bare_strings=bare_strings)
    return [row.fields for row in table.rows()]


def reported(content: bytes, file_format: str) -> tuple[list[dict[str, str]], list[str]]:
    """Read leniently: the good rows, and the places of the bad ones with the reason."""
    reports: list[str] = []
    table = open_table(
        io.BytesIO(content), file_format, "a", on_bad_row=lambda place, reason: reports.append(f"{place}: {reason}")
    )
    return [row.fields for row in table.rows()], reports


@pytest.mark.parametrize(
    ("name", "file_format"),
    [
        ("a.tsv", "tsv"),
        ("a.v2.csv.gz", "csv"),
        ("a.parquet", "parquet"),
        ("a.docx", None),
        ("a.gz", None),
        ("tsv", None),
    ],
)
def test_the_format_is_in_the_name(name: str, file_format: str | None) -> None:
    assert table_format(Path(name)) == file_format


def test_a_row_knows_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b'q,p\n1,"two\nlines"\n3,4\n'))
    assert list(read_table(tmp_path / "a.csv.gz")) == [
        Row({"q": "1", "p": "two\nlines"}, "a.csv.gz", 3),
        Row({"q": "3", "p": "4"}, "a.csv.gz", 4),
    ]
    assert next(read_table(tmp_path / "a.csv.gz")).place == "a.csv.gz:3"


def test_quotes_in_tsv_are_text_unless_the_caller_says_otherwise() -> None:
    content = b'q\tp\n"a"\tb\n'
    assert rows_of(content, "tsv") == [{"q": '"a"', "p": "b"}]
    assert rows_of(content, "tsv", quoted_tsv=True) == [{"q": "a", "p": "b"}]


def test_bare_strings_are_rows_only_where_the_caller_accepts_them() -> None:
    assert rows_of(b'"a"\n{"text": "b"}\n', "jsonl", bare_strings=True) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(UsageError, match="a, line 1: string found where an object is needed"):
        rows_of(b'"a"\n', "jsonl")


@pytest.mark.parametrize(
    ("file_format", "content", "problem"),
    [
        ("tsv", b"q\tp\nx\n", "line 2: 1 fields where the header has 2"),
        ("csv", b"q,p\n\n", "line 2: 0 fields where the header has 2"),
        ("csv", b'q\n"open\n', "line 2: unexpected end of data"),
        ("csv", b"", "is empty"),
        ("jsonl", b"{}\n\n", "line 2: blank"),
        ("txt", b"a\n\xff\n", "line 2: byte 1 of the line is not UTF-8"),
    ],
    ids=["tsv-fields", "csv-blank", "csv-quote", "csv-empty", "jsonl-blank", "txt-utf8"],
)
def test_a_strict_reader_stops_at_the_first_bad_row(file_format: str, content: bytes, problem: str) -> None:
    with pytest.raises(UsageError, match=f"a.*{problem}"):
        rows_of(content, file_format)


def test_a_lenient_reader_reports_bad_rows_and_reads_the_others() -> None:
    assert reported(b"q\tp\n1\t2\nx\n\n\xff\t3\n4\t5\n", "tsv") == (
        [{"q": "1", "p": "2"}, {"q": "4", "p": "5"}],
        ["a:3: 1 fields where the header has 2", "a:5: q is not valid UTF-8"],
    )
    assert reported(b'{"q": 1}\n\n[2]\n{"q": "\\ud83d"}\n', "jsonl") == (
        [{"q": 1}],
        ["a:3: list found where an object is needed", "a:4: q is not valid UTF-8"],
    )
    assert reported(b"", "csv") == ([], [])


def test_parquet_gives_columns_and_types_before_any_row(tmp_path: Path) -> None:
    words = pa.array(["a", None], pa.dictionary(pa.int32(), pa.string()))
    pq.write_table(pa.table({"id": [1, 2], "text": words}), tmp_path / "a.parquet")
    with (tmp_path / "a.parquet").open("rb") as stream:
        table = open_table(stream, "parquet", "a.parquet")
        assert table.columns == ("id", "text")
        assert table.types == {"id": "int64", "text": "string"}
        assert [row.fields for row in table.rows(["text"])] == [{"text": "a"}, {"text": None}]


def test_a_damaged_file_is_a_table_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"line\n" * 9999)[:-20])
    with pytest.raises(TableError, match=r"a\.txt\.gz cannot be read to its end"):
        list(read_table(tmp_path / "a.txt.gz"))
    with pytest.raises(TableError, match="not a readable parquet file"):
        rows_of(b"no parquet", "parquet")


def test_surrogates_and_names_of_json_types() -> None:
    assert first_surrogate("café 🙂") is None
    assert first_surrogate("x\ud800y") == "\ud800"
    assert [json_name(value) for value in (None, True, 1, 1.5, [], "a", {})] == [
        "null", "boolean", "number", "number", "list", "string", "object",
    ]  # fmt: skip
