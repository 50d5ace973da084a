"""Tables are read whole and in order; a row that cannot be read stops the reader or is reported with its place."""

import gzip
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unmask.errors import TableError, UsageError
from unmask.tables import Row, first_surrogate, json_name, open_table, read_table, table_format


def rows_of(content: bytes, file_format: str) -> list[dict[str, str]]:
    """Read strictly: the first bad row raises."""
    return [row.fields for row in open_table(io.BytesIO(content), file_format, "a").rows()]


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
        ("A.TSV.GZ", "tsv"),
        ("a.ndjson", "jsonl"),
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


def test_quotes_in_tsv_are_text() -> None:
    assert rows_of(b'q\tp\n"a"\tb\n"open\t5" pipe\n', "tsv") == [{"q": '"a"', "p": "b"}, {"q": '"open', "p": '5" pipe'}]


def test_a_bare_string_is_a_row_of_the_text_column() -> None:
    assert rows_of(b'"a"\n{"text": "b"}\n', "jsonl") == [{"text": "a"}, {"text": "b"}]


def test_two_columns_of_one_name_are_refused_where_they_are_read() -> None:
    table = open_table(io.BytesIO(b"text\ttext\tn\t\t\na\tb\tc\td\te\n"), "tsv", "a")
    with pytest.raises(UsageError, match="a has 2 columns named 'text'; rename all but one"):
        table.rows()
    with pytest.raises(UsageError, match="2 columns named 'text'"):
        table.rows(["text"])
    assert [row.fields["n"] for row in table.rows(["n"])] == ["c"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"t": "a"}, "a"),
        ({"t": None}, ""),
        ({"t": 3}, "field 't': number found where a string is needed"),
        ({"t": ["a"]}, "field 't': list found"),
        ({"t": "\ud83d"}, r"field 't': \\ud83d is half a surrogate pair"),
        ({"s": "a"}, "no field 't'; it has the fields 's'"),
    ],
    ids=["text", "null", "number", "list", "surrogate", "missing"],
)
def test_the_text_of_a_row(fields: dict[str, object], text: str) -> None:
    row = Row(fields, "a", 1)
    if isinstance(fields.get("t", ""), str | None) and "field" not in text:
        assert row.text("t") == text
    else:
        with pytest.raises(ValueError, match=text):
            row.text("t")


@pytest.mark.parametrize(
    ("file_format", "content", "problem"),
    [
        ("tsv", b"q\tp\nx\n", "line 2: 1 fields where the header has 2"),
        ("csv", b"q,p\n\n", "line 2: 0 fields where the header has 2"),
        ("csv", b'q\n"open\n', "line 2: unexpected end of data"),
        ("csv", b"", "is empty"),
        ("jsonl", b"{}\n\n", "line 2: blank"),
        ("tsv", b"", "is empty"),
        ("tsv", b"q\tp\n\n", "line 2: 1 fields where the header has 2"),
        ("txt", b"a\n\xff\n", "line 2: byte 1 of the line is not UTF-8"),
    ],
    ids=["tsv-fields", "csv-blank", "csv-quote", "csv-empty", "jsonl-blank", "tsv-empty", "tsv-blank", "txt-utf8"],
)
def test_a_strict_reader_stops_at_the_first_bad_row(file_format: str, content: bytes, problem: str) -> None:
    with pytest.raises(UsageError, match=f"a.*{problem}"):
        rows_of(content, file_format)


def test_a_lenient_reader_reports_bad_rows_and_reads_the_others() -> None:
    assert reported(b"q\tp\n1\t2\nx\n\n\xff\t3\n4\t5\n", "tsv") == (
        [{"q": "1", "p": "2"}, {"q": "4", "p": "5"}],
        [
            "a:3: 1 fields where the header has 2",
            "a:4: 1 fields where the header has 2",
            "a:5: byte 1 of the line is not UTF-8",
        ],
    )
    assert reported(b'{"q": 1}\n\n[2]\n', "jsonl") == (
        [{"q": 1}],
        ["a:2: blank, so it is no JSON", "a:3: list found where an object or a string is needed"],
    )
    assert reported(b'q,p\n1,"a\n\xff"\n3,4\n', "csv") == (
        [{"q": "3", "p": "4"}],
        ["a:3: byte 1 of the line is not UTF-8"],
    )


@pytest.mark.parametrize(
    ("file_format", "content", "problem"),
    [
        ("csv", b'q,p\n1,2\n3,"open\n5,6\n', "a, line 3: unexpected end of data"),
        ("csv", b'q,p\n"a" b,2\n5,6\n', "a, line 2: ',' expected after '\"'"),
        ("csv", b"q,p\nlone\rreturn,2\n", "a, line 2: new-line character seen"),
        ("csv", b"q\xff,p\n1,2\n", "first line must name the columns"),
        ("tsv", b"q\xff\tp\n1\t2\n", "first line must name the columns"),
        ("tsv", b"", "is empty"),
    ],
)
def test_a_lenient_reader_stops_where_the_rows_are_not_known(file_format: str, content: bytes, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        reported(content, file_format)


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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("file_format", ["txt", "jsonl", "csv"])
def test_utf16_is_named(file_format: str, encoding: str) -> None:
    with pytest.raises(UsageError, match="the file is UTF-16; convert it first: iconv -f utf-16 -t utf-8"):
        rows_of('"a text"\n"another"\n'.encode(encoding), file_format)
