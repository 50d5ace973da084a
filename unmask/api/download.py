"""Tables as CSV, safe to open in a spreadsheet."""

import csv
import io
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

from starlette.responses import Response, StreamingResponse


def csv_file(columns: Sequence[str] | None, rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV, below their columns' names where they are given.

    A spreadsheet would run what begins like a formula; a quote before it makes it text. Numbers stay numbers.
    """
    file = io.StringIO()
    writer = csv.writer(file)
    if columns is not None:
        writer.writerow(columns)
    writer.writerows([_shown(value) for value in row] for row in rows)
    return file.getvalue()


def csv_response(name: str, parts: Iterator[str] | AsyncIterator[str]) -> Response:
    """A file of that name to be saved, part by part."""
    headers = {"content-disposition": f'attachment; filename="{name}"', "cache-control": "private, no-store"}
    return StreamingResponse(parts, headers=headers, media_type="text/csv")


def _shown(value: object) -> object:
    text = str(value)
    if text[:1] not in ("=", "+", "-", "@", "\t", "\r") or _is_number(text):
        return value
    return f"'{text}"


def _is_number(text: str) -> bool:
    return text.removeprefix("-").replace(".", "", 1).isdecimal()
