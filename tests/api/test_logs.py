"""No key reaches a log line."""

import logging

import pytest

from unmask.api.logs import Redaction

KEY = "0123456789plain"


@pytest.mark.parametrize(
    "line",
    [
        f"Authorization: Bearer {KEY}",
        f"authorization: bearer {KEY}",
        f"GET /v1/models?key={KEY} HTTP/1.1",
        f"GET /v1/models?a=b&api_key={KEY}",
        f"using sk-{KEY} now",
        f"using gr-{KEY} now",
        f"the bare {KEY}",
    ],
)
def test_keys_are_taken_out(line: str):
    cleaned = Redaction([KEY])(logging.getLogger(), "info", {"event": line, "status": 200})
    assert KEY not in cleaned["event"]
    assert "***" in cleaned["event"]
    assert cleaned["status"] == 200


def test_other_words_stay():
    event = {"event": "request", "path": "/v1/models/some/task-embedding-model"}
    assert Redaction()(logging.getLogger(), "info", dict(event)) == event
