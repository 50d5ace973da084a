"""Fields of Jina's embeddings API, which has OpenAI's path: https://api.jina.ai/redoc#tag/embeddings

They are translated to those of `/v1/embeddings`. What would need another model is refused by name.
"""

import msgspec

from unmask.api.errors import ApiError
from unmask.api.schema import Fields, decode_field

_TASKS = {
    "retrieval.query": b'"query"',
    "retrieval.passage": b'"document"',
    "text-matching": b"null",
    "classification": b"null",
    "clustering": b"null",
    "separation": b"null",
}
# Jina's name -> ours, for fields with the same values.
_RENAMED = {"embedding_type": "encoding_format", "normalized": "normalize"}
_NULL = msgspec.Raw(b"null")
_SWITCH = msgspec.json.Decoder(bool | None)
_TASK = msgspec.json.Decoder(str | None)
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])
_OBJECTS = msgspec.json.Decoder(list[dict[str, str]])


def translate_jina_fields(fields: Fields) -> Fields:
    """Return the fields of a request in the words of `/v1/embeddings`; a request without Jina's fields as it is.

    Raises:
        ApiError: 400, a task or a kind of input that no model here has, or a field that is given in both words.
    """
    translated = dict(fields)
    if decode_field(_SWITCH, translated.pop("late_chunking", _NULL), "late_chunking"):
        message = "late_chunking is not supported: each input gets the vector of its own text. Send false, or nothing."
        raise ApiError(400, message, param="late_chunking")
    task = decode_field(_TASK, translated.pop("task", _NULL), "task")
    if task:
        if task not in _TASKS:
            raise ApiError(400, f"task={task[:80]!r} is not supported: choose {', '.join(_TASKS)}.", param="task")
        _refuse_both(translated, "task", "input_type")
        translated["input_type"] = msgspec.Raw(_TASKS[task])
    for name, own in _RENAMED.items():
        value = translated.pop(name, None)
        if value is not None and bytes(value) != b"null":
            _refuse_both(translated, name, own)
            translated[own] = _only_item(value, name)
    if (inputs := translated.get("input")) is not None:
        translated["input"] = _texts_of(inputs)
    return translated


def _refuse_both(fields: Fields, name: str, own: str) -> None:
    if bytes(fields.get(own, _NULL)) not in (b"null", b'""'):
        raise ApiError(400, f"'{name}' and '{own}' say the same: send one of them.", param=name)


def _only_item(value: msgspec.Raw, name: str) -> msgspec.Raw:
    """Return the item of an array of one, in which Jina's clients may send a type; another value as it is."""
    if bytes(value)[:1] != b"[":
        return value
    items: list[msgspec.Raw] = decode_field(_ITEMS, value, name)
    if len(items) != 1:
        raise ApiError(400, f"'{name}' has {len(items)} values: an answer has one form of vectors.", param=name)
    return items[0]


def _texts_of(inputs: msgspec.Raw) -> msgspec.Raw:
    """Return texts for an array of `{"text": ...}`; other inputs as they are."""
    content = bytes(inputs)
    if content[:1] != b"[" or content[1:].lstrip()[:1] != b"{":
        return inputs
    try:
        items: list[dict[str, str]] = decode_field(_OBJECTS, content, "input")
    except ApiError:
        items = []
    if not items or any(set(item) != {"text"} for item in items):
        raise ApiError(400, "The field 'input' may hold texts and {\"text\": ...} only, no images.", param="input")
    return msgspec.Raw(msgspec.json.encode([item["text"] for item in items]))
