"""OpenAI's token ids become the text they were made from."""

from typing import Literal

import bpe_openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.api.tokens import decode
from unmask.errors import InputError

ENCODINGS: tuple[Literal["cl100k_base", "o200k_base"], ...] = ("cl100k_base", "o200k_base")


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_decoding_undoes_openais_encoding(encoding: Literal["cl100k_base", "o200k_base"], texts: list[str]):
    peer = bpe_openai.get_encoding(encoding)
    assert decode([peer.encode_ordinary(text) for text in texts], encoding) == texts


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_special_tokens_are_their_text(encoding: Literal["cl100k_base", "o200k_base"]):
    peer = bpe_openai.get_encoding(encoding)
    for special in peer.special_tokens_set:
        assert decode([peer.encode(special, allowed_special="all")], encoding) == [special]


def test_a_character_cut_in_two_is_replaced():
    ids = bpe_openai.get_encoding("cl100k_base").encode_ordinary("🙂")
    assert len(ids) > 1
    assert decode([ids[:-1]], "cl100k_base") == ["\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("unknown", [-1, 100256, 100261, 2**70])
def test_an_unknown_id_is_an_error_with_its_place(unknown: int):
    with pytest.raises(InputError, match=f"input 1 has token id {unknown}") as caught:
        decode([[1], [1, unknown]], "cl100k_base")
    assert caught.value.index == 1
