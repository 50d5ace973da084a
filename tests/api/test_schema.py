"""Parsing of requests, and the messages of refusals."""

from typing import Any

import msgspec
import pytest

from unmask.api.errors import ApiError
from unmask.api.schema import read_input, read_request


def encoded(**fields: Any) -> bytes:
    return msgspec.json.encode(fields)


@pytest.mark.parametrize(
    ("body_input", "inputs"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (list(range(5000)), [list(range(5000))]),
        (["a"] * 2048, ["a"] * 2048),
        (['"', "\\", '\\"'] * 600, ['"', "\\", '\\"'] * 600),
    ],
)
def test_all_forms_of_input(body_input: Any, inputs: list[Any]):
    assert read_input(msgspec.Raw(msgspec.json.encode(body_input))) == inputs


def test_white_space_before_the_first_item():
    assert read_input(msgspec.Raw(b"[" + b" \n" * 100 + b'"a"]')) == ["a"]
    assert read_input(msgspec.Raw(b"[ [1 ] , [2]]")) == [[1], [2]]


@pytest.mark.parametrize(
    "body_input",
    [
        *("", [], [""], ["a", ""], [[]], [[1], []], None, 1, 1.5, True, {"a": 1}, [None], [True], [1.5]),
        *(["a", 1], [1, "a"], ["a", [1]], [[1], 2], [[1], "a"], [[["a"]]], ["a"] * 2049, [[1]] * 2049),
    ],
)
def test_every_other_input_is_refused_by_name(body_input: Any):
    with pytest.raises(ApiError) as caught:
        read_input(msgspec.Raw(msgspec.json.encode(body_input)))
    assert (caught.value.status, caught.value.body.param) == (400, "input")


@pytest.mark.parametrize("absent", [None, ""])
def test_null_and_empty_options_count_as_absent(absent: Any):
    options = ("encoding_format", "dimensions", "user", "instruction", "input_type", "truncate", "normalize")
    request, ignored = read_request(
        encoded(model="m", input="a", token_encoding=absent, **dict.fromkeys(options, absent))
    )
    plain, _ = read_request(encoded(model="m", input="a"))
    assert request == plain
    assert ignored == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("encoding_format", value) for value in ("int4", 1, ["float"])),
        *(("dimensions", value) for value in (0, -1, 1.5, True, "8", [8])),
        *(("truncate", value) for value in ("start", "START", "left", "both", 1)),
        *(("input_type", value) for value in ("passage", 1)),
        *(("normalize", value) for value in (1, "yes")),
        *(("token_encoding", value) for value in ("p50k_base", 1)),
        *(("instruction", value) for value in (1, ["a"])),
        *(("user", value) for value in (1, {})),
        *(("model", value) for value in (None, "", 1, ["m"])),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any):
    with pytest.raises(ApiError, match=field) as caught:
        read_request(encoded(**{"model": "m", "input": "a"} | {field: value}))
    assert (caught.value.status, caught.value.body.param) == (400, field)


def test_a_wrong_choice_is_answered_with_the_right_ones():
    with pytest.raises(ApiError) as caught:
        read_request(encoded(model="m", input="a", encoding_format="foo" * 500))
    message = caught.value.body.message
    assert "expected 'base64', 'binary', 'float', 'int8', 'ubinary' or 'uint8'." in message and len(message) < 250


@pytest.mark.parametrize("field", ["model", "input"])
def test_a_missing_field_is_named(field: str):
    fields = {"model": "m", "input": "a"}
    del fields[field]
    with pytest.raises(ApiError) as caught:
        read_request(encoded(**fields))
    assert caught.value.body.param == field


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"[]", b'"a"', b"{", b'{"model":}', b'{"a":NaN}', b"\xef\xbb\xbf{}", b"\x00"),
        *(b'{"\xff":1}', '{"model":"m"}'.encode("utf-16")),
        b'{"model":"m","input":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"m","other":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes):
    with pytest.raises(ApiError, match="not a JSON object") as caught:
        read_request(body)
    assert caught.value.status == 400


@pytest.mark.parametrize("text", [b'"\xff"', b'"\\ud800"', b'"\\ud800x"', b'["a", "\xc3\x28"]'])
def test_text_that_is_no_unicode_is_refused(text: bytes):
    with pytest.raises(ApiError):
        read_input(read_request(b'{"model":"m","input":' + text + b"}")[0].input)


@pytest.mark.parametrize("price", [b"-1", b"-1e308", b"1e9", b"1e308", b"1e400", b"1" * 400, b"NaN", b"Infinity"])
def test_a_price_that_no_model_can_have_is_refused(price: bytes):
    with pytest.raises(ApiError) as caught:
        read_request(b'{"model":"m","input":"a","provider":{"max_price":{"prompt":%b}}}' % price)
    assert caught.value.status == 400
    if price not in (b"NaN", b"Infinity"):  # these are no JSON
        assert caught.value.body.param == "provider"
        assert "max_price.prompt" in caught.value.body.message


@pytest.mark.parametrize(("price", "nano"), [(b"0", 0), (b"0.02", 20_000_000), (b"1e8", 10**17)])
def test_the_highest_price_is_exact(price: bytes, nano: int):
    request, _ = read_request(b'{"model":"m","input":"a","provider":{"max_price":{"prompt":%b}}}' % price)
    assert request.provider is not None and request.provider.max_nano_per_million == nano


def test_unknown_fields_are_reported():
    _, ignored = read_request(encoded(model="m", input="a", task="x", provider={"a": [1]}))
    assert ignored == ["task", "provider.a"]
