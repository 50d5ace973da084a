"""Write tables as CSV that is safe to open in a spreadsheet."""

import csv
import io
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

from starlette.responses import Response, StreamingResponse


def csv_file(columns: Sequence[str] | None, rows: Iterable[Sequence[object]]) -> str:
    """Write rows as CSV, below the column names if there are any.

    Text that begins like a formula gets a quote before it, so that no spreadsheet runs it. Numbers stay numbers.
    """
    file = io.StringIO()
    writer = csv.writer(file)
    if columns is not None:
        writer.writerow(columns)
    writer.writerows([_safe_cell(value) for value in row] for row in rows)
    return file.getvalue()


def csv_response(name: str, parts: Iterator[str] | AsyncIterator[str]) -> Response:
    """Stream a CSV file, to be saved under `name`."""
    headers = {"content-disposition": f'attachment; filename="{name}"', "cache-control": "private, no-store"}
    return StreamingResponse(parts, headers=headers, media_type="text/csv")


def _safe_cell(value: object) -> object:
    text = str(value)
    if text[:1] not in ("=", "+", "-", "@", "\t", "\r") or _is_number(text):
        return value
    return f"'{text}"


def _is_number(text: str) -> bool:
    return text.removeprefix("-").replace(".", "", 1).isdecimal()
