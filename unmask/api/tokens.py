"""Decode OpenAI's token ids to text.

LangChain and others tokenise with tiktoken before they call, and send the ids. Read as the model's own ids they would
mean other words, and the vectors would be garbage without any error. The vocabularies are part of the installed
package `bpe_openai`; nothing is downloaded.
"""

import base64
import gzip
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal

from unmask.errors import InputError

OpenAiEncoding = Literal["cl100k_base", "o200k_base"]

# SHA-256 of the uncompressed files and special tokens, from tiktoken 0.12.0 `tiktoken_ext/openai_public.py`.
_SHA256 = {
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
}
_SPECIALS = {
    "cl100k_base": {
        100257: b"<|endoftext|>",
        100258: b"<|fim_prefix|>",
        100259: b"<|fim_middle|>",
        100260: b"<|fim_suffix|>",
        100276: b"<|endofprompt|>",
    },
    "o200k_base": {199999: b"<|endoftext|>", 200018: b"<|endofprompt|>"},
}


def decode(sequences: Sequence[Sequence[int]], encoding: OpenAiEncoding) -> list[str]:
    """Decode token sequences to texts. Bytes that are not UTF-8, as after a cut inside a character, become U+FFFD.

    Raises:
        InputError: an id is not in the vocabulary; carries the `index` of its sequence.
    """
    vocabulary = _vocabulary(encoding)
    texts = []
    for index, ids in enumerate(sequences):
        try:
            text = b"".join([vocabulary[token] for token in ids])
        except KeyError as missing:
            raise InputError(
                f"input {index} has token id {missing}, which {encoding} does not have; "
                "set token_encoding to the encoding the ids were made with",
                index,
            ) from None
        texts.append(text.decode("utf-8", errors="replace"))
    return texts


@cache
def _vocabulary(encoding: OpenAiEncoding) -> dict[int, bytes]:
    # Found through its distribution: importing the package would build its own tables for most of a second.
    file = metadata.distribution("bpe-openai").locate_file(f"bpe_openai/data/{encoding}.tiktoken.gz")
    content = gzip.decompress(Path(str(file)).read_bytes())
    if hashlib.sha256(content).hexdigest() != _SHA256[encoding]:
        # A broken installation and not a caller's mistake: answered with 500, and logged.
        raise RuntimeError(f"the vocabulary {encoding} of the installed bpe_openai is not the one OpenAI publishes")
    rows = (line.split(b" ") for line in content.splitlines())
    return {int(rank): base64.b64decode(token) for token, rank in rows} | _SPECIALS[encoding]
