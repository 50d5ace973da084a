"""sentence-transformers folders: equal to sentence-transformers, or refused with the setting's name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unmask import Encoder
from unmask.checkpoint.modules import require_readable_gguf
from unmask.errors import CheckpointError

TEXTS = ["river stone", "The moon walks slowly over the green table."]


def modules(*kinds: str) -> list[dict[str, Any]]:
    types = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    return [
        {"idx": i, "name": str(i), "path": types.get(kind, kind), "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]


MEAN = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True, "include_prompt": True}


def make_folder(folder: Path, **changes: Any) -> Path:
    """Give a model's folder the files of sentence-transformers; `changes` replace fields by file."""
    files = {
        "modules.json": modules("Transformer", "Pooling", "Normalize"),
        "1_Pooling/config.json": MEAN,
        "sentence_bert_config.json": {"max_seq_length": 24, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "find it: ", "document": ""}},
    }
    config = json.loads((folder / "config.json").read_text())
    config |= {"is_causal": False, **changes.pop("config", {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "1_Pooling").mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(changes.get(name, content)))
    return folder


@pytest.fixture
def plain(copied) -> Path:
    """A folder whose tokenizer adds no BOS."""
    folder = copied("tiny_llama")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "llm2vec_config.json").unlink(missing_ok=True)
    return folder


def test_a_bidirectional_mean_equals_sentence_transformers(plain: Path) -> None:
    from sentence_transformers import SentenceTransformer

    make_folder(plain)
    reference = SentenceTransformer(str(plain), device="cpu")
    texts = [*TEXTS, "many words " * 30]  # beyond max_seq_length
    encoder = Encoder.load(plain)
    for prompt, name in (("", "document"), ("find it:", "query")):
        theirs = reference.encode(texts, prompt_name=name)
        ours = encoder.encode(texts, instruction=prompt, normalize=True)
        assert np.abs(ours - theirs).max() <= 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules.json": modules("Transformer", "Pooling", "Dense")}, "a module Dense"),
        ({"modules.json": modules("Transformer", "LSTM", "Pooling")}, "a module LSTM"),
        ({"modules.json": modules("Transformer")}, "no pooling"),
        *(
            ({"1_Pooling/config.json": {f"pooling_mode_{mode}": True}}, f"pooling {mode}")
            for mode in ("cls_token", "lasttoken", "weightedmean_tokens", "max_tokens", "mean_sqrt_len_tokens")
        ),
        ({"1_Pooling/config.json": {"pooling_mode": "lasttoken"}}, "pooling lasttoken"),
        ({"1_Pooling/config.json": {**MEAN, "pooling_mode_lasttoken": True}}, "mean_tokens and lasttoken"),
        ({"1_Pooling/config.json": {}}, "pooling of an unknown kind"),
        ({"config": {"is_causal": True}}, "a causal mask"),
        ({"config": {"is_causal": None}}, "a causal mask"),
        ({"config_sentence_transformers.json": {"prompts": {"query": "find it\n"}}}, "a prompt query"),
        (
            {"config_sentence_transformers.json": {"prompts": {"d": "x "}, "default_prompt_name": "d"}},
            "a default prompt",
        ),
        ({"config_sentence_transformers.json": {"truncate_dim": 32}}, "truncate_dim=32"),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, "lower case"),
        ({"modules.json": {"a": 1}}, "expected a JSON list"),
    ],
)
def test_another_vector_is_refused_by_name(plain: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Encoder.load(make_folder(plain, **changes))


def test_a_mean_over_bos_is_refused_by_name(copied) -> None:
    folder = copied("tiny_llama")
    (folder / "llm2vec_config.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="includes BOS"):
        Encoder.load(make_folder(folder))


@pytest.mark.parametrize(
    ("pooling", "causal", "message"),
    [
        *((None, None, None), (0, None, None), (1, False, None), (1, None, "causal"), (1, True, "causal")),
        *((2, False, "cls"), (3, True, "last"), (4, None, "rank"), (9, None, "9")),
    ],
)
def test_gguf_pooling(pooling: int | None, causal: bool | None, message: str | None) -> None:
    fields = {"llama.pooling_type": pooling, "llama.attention.causal": causal}
    fields = {key: value for key, value in fields.items() if value is not None}
    if message is None:
        require_readable_gguf(Path("m.gguf"), "llama", fields)
    else:
        with pytest.raises(CheckpointError, match=message):
            require_readable_gguf(Path("m.gguf"), "llama", fields)
