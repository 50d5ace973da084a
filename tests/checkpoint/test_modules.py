"""Embedding models of other makers: equal to sentence-transformers and llama.cpp's rules, or refused by name."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.layouts import (
    GEMMA3,
    HIDDEN_SIZE,
    INSTRUCT,
    LAST,
    LAYOUTS,
    MEAN,
    Layout,
    gemma,
    gte_qwen,
    qwen,
    write_layout,
)
from unmask import Encoder
from unmask.checkpoint.modules import gguf_settings
from unmask.checkpoint.tokenizer import read_tokenizer
from unmask.errors import CheckpointError, EmptyText, UsageError

TEXTS = [
    "river",
    "!",
    "  The moon walks slowly over the green table.",
    "7 lamps, 1984\n",
    "日本語のテキスト 🌊",
    "many words under the bridge " * 40,  # beyond every model's length
]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: GEMMs this small are slower on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def library(folder: Path, **options: Any) -> Any:
    """The same folder in sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", **options)


def difference(vectors: np.ndarray, expected: np.ndarray) -> float:
    assert vectors.shape == expected.shape and np.isfinite(expected).all()
    return float(np.abs(vectors - expected).max())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_equals_sentence_transformers(name: str, published: Callable[[str], Path]) -> None:
    folder = published(name)
    reference = library(folder, trust_remote_code=bool(LAYOUTS[name].code))
    encoder = Encoder.load(folder)
    sides: list[tuple[Any, Any]] = [
        (reference.encode_query, encoder.encode_query),
        (reference.encode_document, encoder.encode_document),
        *(
            (partial(reference.encode, prompt_name=prompt), partial(encoder.encode, instruction=text))
            for prompt, text in LAYOUTS[name].prompts.items()
            if prompt not in ("query", "document") and text
        ),
    ]
    for theirs, ours in sides:
        expected = theirs(TEXTS)
        assert difference(ours(TEXTS), expected) <= TOLERANCE
        assert difference(np.concatenate([ours(text) for text in TEXTS]), expected) <= TOLERANCE
    assert max(encoder.count_tokens(TEXTS)) > encoder.max_length == reference.max_seq_length
    # The comparison would notice each of these.
    expected = encoder.encode(TEXTS)
    misread = [Encoder.load(folder, causal=not encoder.causal)]
    misread.append(Encoder.load(folder, pooling="last_token" if encoder.pooling == "mean" else "mean"))
    assert all(difference(other.encode(TEXTS), expected) > 100 * TOLERANCE for other in misread)


@pytest.mark.parametrize(("flag", "ending"), [(True, 1), (False, 0), (None, 0)])
@pytest.mark.parametrize("prefix", ["", "Alibaba-NLP/gte-Qwen2-7B-instruct--"])
def test_the_own_tokenizer_of_gte_adds_eos_by_its_flag(flag: bool | None, ending: int, prefix: str, tmp_path: Path):
    tokenizer, settings = gte_qwen()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    classes = [f"{prefix}{name}" for name in settings["auto_map"]["AutoTokenizer"]]
    for table in ({"AutoTokenizer": classes}, classes):
        changed = {**settings, "add_eos_token": flag, "add_bos_token": True, "bos_token": "<|im_start|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**changed, "auto_map": table}))
        read = read_tokenizer(tmp_path)
        assert read.suffix == (read.eos_id,) * ending and read.prefix == ()  # that class adds no BOS


TINY = Layout({"model_type": "qwen3", "is_causal": False}, qwen, MEAN, {"query": "find it: ", "document": ""})
GELU = ((HIDDEN_SIZE, 24, "GELU"), (24, 16, "Tanh"))
VARIANTS: dict[str, Layout] = {
    "first token": replace(TINY, pooling={**LAST, "pooling_mode_cls_token": True, "pooling_mode_lasttoken": False}),
    "weighted mean": replace(TINY, pooling={"embedding_dimension": HIDDEN_SIZE, "pooling_mode": "weightedmean"}),
    "a list of one mode": replace(TINY, pooling={"embedding_dimension": HIDDEN_SIZE, "pooling_mode": ["lasttoken"]}),
    "prompt not pooled": replace(TINY, pooling={**MEAN, "include_prompt": False}),
    "prompt not pooled, BOS and EOS": replace(TINY, tokenizer=gemma, pooling={**MEAN, "include_prompt": False}),
    "activations": replace(TINY, dense=GELU),
    "not scaled": replace(TINY, normalizes=False),
    "only use_bidirectional_attention": replace(TINY, config={**GEMMA3, "use_bidirectional_attention": True}),
    "causal windows": replace(TINY, config=GEMMA3, tokenizer=gemma, pooling=LAST),
    "no lengths": replace(TINY, lengths=None),
    "is_causal 0": replace(TINY, config={"model_type": "qwen3", "is_causal": 0}),
    "is_causal null": replace(TINY, config={"model_type": "qwen3", "is_causal": None}),
    "include_prompt null": replace(TINY, pooling={**MEAN, "include_prompt": None}),
    "a length beyond the positions": replace(TINY, lengths={"max_seq_length": 1000}),
    "an empty document prompt": replace(TINY, prompts={"query": "q: ", "document": "", "passage": "p: "}),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_setting_is_followed(name: str, tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "model", VARIANTS[name])
    reference, encoder = library(folder), Encoder.load(folder)
    assert encoder.max_length == reference.max_seq_length
    assert difference(encoder.encode_query(TEXTS), reference.encode_query(TEXTS)) <= TOLERANCE
    assert difference(encoder.encode_document(TEXTS), reference.encode_document(TEXTS)) <= TOLERANCE


@pytest.mark.parametrize("name", ["passage", "corpus"])
def test_a_prompt_of_another_name_stands_before_documents(name: str, tmp_path: Path) -> None:
    """As the library documents it; its 6.2 finds the empty prompt `document` that it adds by itself."""
    folder = write_layout(tmp_path / "model", replace(TINY, prompts={"query": "q: ", name: "p: "}))
    reference, vectors = library(folder), Encoder.load(folder).encode_document(TEXTS)
    assert difference(vectors, reference.encode(TEXTS, prompt_name=name)) <= TOLERANCE
    assert difference(vectors, reference.encode_document(TEXTS)) > 100 * TOLERANCE


def test_truncation_and_a_default_prompt_are_followed(tmp_path: Path) -> None:
    prompts = {"query": INSTRUCT, "document": "passage: ", "other": "represent: "}
    change = {"prompts": prompts, "default_prompt_name": "other", "truncate_dim": 12}
    folder = write_layout(tmp_path / "model", TINY, **{"config_sentence_transformers.json": change})
    reference, encoder = library(folder), Encoder.load(folder)
    assert encoder.dim == 12
    assert "matryoshka" not in encoder.checkpoint.encoder_config
    for theirs, ours in (
        (reference.encode, encoder.encode),
        (reference.encode_query, encoder.encode_query),
        (reference.encode_document, encoder.encode_document),
    ):
        assert difference(ours(TEXTS), theirs(TEXTS)) <= TOLERANCE


def test_lengths_beyond_truncate_dim_are_no_lengths_of_the_model(tmp_path: Path) -> None:
    changes = {"config_sentence_transformers.json": {"truncate_dim": 12}}
    folder = write_layout(tmp_path / "model", TINY, **changes, **{"config.json": {"matryoshka_dimensions": [24, 8]}})
    assert Encoder.load(folder).checkpoint.encoder_config["matryoshka"] == [8]


def test_a_folder_that_the_library_saved_again_means_the_same(published: Callable[[str], Path], tmp_path: Path) -> None:
    reference = library(published("google/embeddinggemma-300m"))
    reference.save_pretrained(str(tmp_path / "saved"))
    encoder = Encoder.load(tmp_path / "saved")
    assert difference(encoder.encode_query(TEXTS), reference.encode_query(TEXTS)) <= TOLERANCE


def test_control_tokens_in_a_text_are_characters(tmp_path: Path) -> None:
    encoder = Encoder.load(write_layout(tmp_path / "model", TINY))
    inside, spaced = encoder.count_tokens(["a<|im_end|>b", "a< |im_end|>b"])
    assert inside > 5 and spaced > 5  # sentence-transformers reads one token, which a user could type
    with pytest.raises(EmptyText):
        encoder.encode("")


SETTINGS, SENTENCES, POOLING = "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"
REFUSED: list[tuple[dict[str, Mapping[str, Any]], str]] = [
    ({POOLING: {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}}, "pooling max"),
    ({POOLING: {"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_mean_tokens": False}}, "mean_sqrt_len_tokens"),
    ({POOLING: {"pooling_mode_lasttoken": True}}, "pooling mean and lasttoken"),
    ({POOLING: {"pooling_mode_mean_tokens": False}}, "pooling of an unknown kind"),
    ({POOLING: {"pooling_mode": "weightedmean", "include_prompt": False}}, "a weighted mean without the prompt"),
    ({SETTINGS: {"do_lower_case": True}}, "lower case"),
    ({SETTINGS: {"modality_config": {"message": {}}}}, "a chat template"),
    ({SETTINGS: {"query_length": 16}}, "query_length=16"),
    ({SETTINGS: {"tokenizer_args": {"padding_side": "left", "add_eos_token": True}}}, "tokenizer_args with add_eos"),
    ({"tokenizer_config.json": {"truncation_side": "left"}}, "cut at their beginning"),
    ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Slow", None]}}}, r"code of its own, own\.Slow"),
    ({"config.json": {"auto_map": {"AutoModel": "modeling_own.Model"}}}, r"code of its own, modeling_own\.Model"),
    ({SENTENCES: {"prompts": {"d": "x "}, "default_prompt_name": "d"}}, "a default prompt"),
    ({SENTENCES: {"similarity_fn_name": "euclidean"}}, "similarity euclidean"),
    ({SENTENCES: {"prompts": {"query": "<|im_start|>query: "}}}, r"the special token <\|im_start\|>"),
    ({SENTENCES: {"default_prompt_name": "missing"}}, "default_prompt_name='missing'"),
    ({SENTENCES: {"prompts": ["find it: "]}}, "prompts that are no texts by name"),
    ({SENTENCES: {"prompts": {"query": 3}}}, "prompts that are no texts by name"),
    *(({SENTENCES: {"truncate_dim": value}}, f"truncate_dim={value}, which is no length") for value in (0, -3, 1.5)),
    *(({SETTINGS: {"max_seq_length": value}}, f"max_seq_length={value}") for value in (0, -1, 48.0)),
    ({SETTINGS: {"max_seq_length": "48"}}, "max_seq_length='48'"),
    ({POOLING: {"pooling_mode_attention": True}}, "pooling with pooling_mode_attention=True"),
    ({"tokenizer_config.json": {"add_prefix_space": True}}, "add_prefix_space=True, which tokenizer.json contradicts"),
    ({"config.json": {"is_causal": True, "use_bidirectional_attention": True}}, "a contradiction"),
    *(({"config.json": {"is_causal": value}}, "is_causal=") for value in ("false", 2, [])),
    *(
        ({"config.json": {"use_bidirectional_attention": value}}, "use_bidirectional_attention=")
        for value in ("vision", "all", 2)
    ),
    ({"config.json": {"matryoshka_dimensions": [8, 17]}}, "matryoshka_dimensions 17 of vectors with 16 numbers"),
    ({"config.json": {"matryoshka_dimensions": [8, "a"]}}, "matryoshka_dimensions="),
    ({"config.json": {"matryoshka_dimensions": 8}}, "matryoshka_dimensions=8"),
    ({"2_Dense/config.json": {"activation_function": "own.Swish"}}, r"activation_function=own\.Swish"),
    ({"2_Dense/config.json": {"use_residual": True}}, "use_residual"),
    ({"2_Dense/config.json": {"module_input_name": "token_embeddings"}}, "module_input_name=token_embeddings"),
    ({"2_Dense/config.json": {"in_features": 9}}, r"2_Dense holds tensors"),
    ({"2_Dense/config.json": {"in_features": None}}, r"lacks in_features"),
]


@pytest.fixture(scope="session")
def with_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_layout(tmp_path_factory.mktemp("modules") / "model", replace(TINY, dense=GELU))


@pytest.fixture
def edited(with_dense: Path, tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """`edited(changes)` is a copy whose JSON files have other entries, or other content where that is a list."""

    def copy(changes: Mapping[str, Any]) -> Path:
        folder = Path(shutil.copytree(with_dense, tmp_path / "edited"))
        for name, change in changes.items():
            before = json.loads((folder / name).read_text())
            after = change if isinstance(change, list) else {**before, **change}
            (folder / name).write_text(json.dumps(after))
        return folder

    return copy


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_another_vector_is_refused_by_name(
    changes: Mapping[str, Any], message: str, edited: Callable[[Mapping[str, Any]], Path]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Encoder.load(edited(changes))


def enclose(folder: Path, outer: Mapping[str, Any]) -> Path:
    """Put config.json one level down, as in a multimodal model."""
    file = folder / "config.json"
    file.write_text(json.dumps({"model_type": "whole", **outer, "text_config": json.loads(file.read_text())}))
    return folder


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling_own.Model"}}, r"code of its own, modeling_own\.Model"),
        ({"matryoshka_dimensions": [8, 17]}, "matryoshka_dimensions 17 of vectors with 16 numbers"),
        ({"quantization_config": {"quant_method": "fp8"}}, "the weights are quantised .*fp8"),
        ({"is_causal": True}, r"is_causal is True, but False in its text_config"),
        ({"use_bidirectional_attention": "vision"}, "use_bidirectional_attention='vision'"),
    ],
)
def test_the_outer_part_of_a_config_is_followed(
    outer: Mapping[str, Any], message: str, edited: Callable[[Mapping[str, Any]], Path]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Encoder.load(enclose(edited({}), outer))


def test_an_outer_part_says_mask_and_lengths(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "model", replace(TINY, config={"model_type": "qwen3"}))
    assert Encoder.load(folder).causal
    encoder = Encoder.load(enclose(folder, {"is_causal": False, "matryoshka_dimensions": [16, 8]}))
    assert not encoder.causal and encoder.checkpoint.encoder_config["matryoshka"] == [8, 16]


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (["sentence_transformers.models.Transformer"], "not a Transformer and a Pooling first"),
        (["sentence_transformers.models.CLIPModel", "sentence_transformers.models.Pooling"], "modules CLIPModel"),
        (["custom_st.Transformer", "sentence_transformers.models.Pooling"], r"modules custom_st\.Transformer"),
        ([None, None, "sentence_transformers.models.LSTM"], "a module LSTM"),
        ([None, None, "sentence_transformers.models.LayerNorm"], "a module LayerNorm"),
        ([None, None, "own_code.Normalize"], r"a module own_code\.Normalize"),
    ],
)
def test_modules_that_are_not_known_are_refused_by_name(
    types: list[str | None], message: str, edited: Callable[[Mapping[str, Any]], Path]
) -> None:
    usual = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": i, "path": usual[i][1], "type": kind or f"sentence_transformers.models.{usual[i][0]}"}
        for i, kind in enumerate(types)
    ]
    with pytest.raises(CheckpointError, match=message):
        Encoder.load(edited({"modules.json": modules}))


def test_a_path_outside_the_folder_is_refused(edited: Callable[[Mapping[str, Any]], Path]) -> None:
    types = [("Transformer", ""), ("Pooling", "../elsewhere")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in types]
    with pytest.raises(CheckpointError, match="outside its own folder"):
        Encoder.load(edited({"modules.json": modules}))


@pytest.mark.parametrize(
    "name", ["modules.json", POOLING, SETTINGS, SENTENCES, "2_Dense/config.json", "3_Dense/model.safetensors"]
)
def test_every_file_that_decides_is_part_of_the_revision(
    name: str, with_dense: Path, edited: Callable[[Mapping[str, Any]], Path]
) -> None:
    folder = edited({})
    before = Encoder.load(with_dense).checkpoint
    assert name in {str(file.relative_to(with_dense)) for file in before.files}
    if name.endswith(".json"):
        (folder / name).write_text((folder / name).read_text() + " ")
    else:
        save_file({"linear.weight": torch.ones(16, 24)}, folder / name)
    assert Encoder.load(folder).checkpoint.revision != before.revision


def test_llm2vec_config_wins_over_modules(edited: Callable[[Mapping[str, Any]], Path]) -> None:
    folder = edited({SETTINGS: {"do_lower_case": True}})
    (folder / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    encoder = Encoder.load(folder)
    assert encoder.head is None and encoder.dim == HIDDEN_SIZE and not encoder.causal


def zero_adapter(folder: Path, base: Path) -> Path:
    """An adapter that changes nothing."""
    folder.mkdir()
    halves = {"A": torch.zeros(4, HIDDEN_SIZE), "B": torch.zeros(HIDDEN_SIZE, 4)}
    tensors = {
        f"base_model.model.layers.{i}.self_attn.q_proj.lora_{half}.weight": tensor.clone()
        for i in range(2)
        for half, tensor in halves.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    return folder


@pytest.mark.parametrize("name", ["nvidia/llama-embed-nemotron-8b", "codefuse-ai/F2LLM-0.6B"])
def test_an_adapter_keeps_what_its_base_says(name: str, tmp_path: Path) -> None:
    base = write_layout(tmp_path / "base", replace(LAYOUTS[name], dense=((HIDDEN_SIZE, 16, "Tanh"),)))
    encoders = [Encoder.load(base), Encoder.load(zero_adapter(tmp_path / "adapter", base))]
    assert encoders[0].checkpoint.encoder_config == encoders[1].checkpoint.encoder_config
    assert encoders[1].dim == 16 and encoders[1].max_length == 48
    assert difference(encoders[1].encode_query(TEXTS), encoders[0].encode_query(TEXTS)) <= TOLERANCE


def test_a_bidirectional_type_alone_has_the_length_of_its_files(tmp_path: Path) -> None:
    base = write_layout(tmp_path / "base", LAYOUTS["nvidia/llama-embed-nemotron-8b"])
    (base / "modules.json").unlink()
    for folder in (base, zero_adapter(tmp_path / "adapter", base)):
        encoder = Encoder.load(folder)
        assert encoder.max_length == 96 and not encoder.causal and encoder.pooling == "mean"


def test_reference_mode_is_for_llm2vec_alone(with_dense: Path) -> None:
    with pytest.raises(UsageError, match="no model of its kind"):
        Encoder.load(with_dense, compat="reference")


@pytest.mark.parametrize(("pooling", "ours"), [(1, "mean"), (2, "first_token"), (3, "last_token")])
@pytest.mark.parametrize("causal", [None, True, False])
def test_gguf_pooling_is_followed(pooling: int, ours: str, causal: bool | None) -> None:
    fields = {"llama.pooling_type": pooling, "llama.attention.causal": causal, "llama.context_length": 77}
    fields = {key: value for key, value in fields.items() if value is not None}
    settings = gguf_settings(Path("m.gguf"), "llama", fields)
    assert settings["pooling_mode"] == ours and settings["max_length"] == 77
    assert settings["causal"] is (causal is not False)  # llama.cpp's default


def test_a_gguf_file_that_states_no_mask_keeps_the_causal_one_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    fields: dict[str, Any] = {"llama.pooling_type": 3, "llama.context_length": 77}
    assert gguf_settings(Path("m.gguf"), "llama", fields)["causal"] is True
    assert "m.gguf states pooling_type last but no llama.attention.causal" in caplog.text
    caplog.clear()
    gguf_settings(Path("m.gguf"), "llama", {**fields, "llama.attention.causal": True})
    assert not caplog.text


def test_a_gguf_file_without_pooling_is_a_decoder() -> None:
    assert gguf_settings(Path("m.gguf"), "llama", {}) == {}
    assert gguf_settings(Path("m.gguf"), "llama", {"llama.pooling_type": 0}) == {}


@pytest.mark.parametrize(("pooling", "message"), [(4, "rank"), (9, "9")])
def test_other_gguf_pooling_is_refused(pooling: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"pooling_type {message}"):
        gguf_settings(Path("m.gguf"), "llama", {"llama.pooling_type": pooling})


@pytest.mark.parametrize(
    ("field", "value"),
    [("pooling_type", "mean"), ("pooling_type", 1.5), ("attention.causal", "no"), ("context_length", None)],
)
def test_a_gguf_setting_of_another_type_is_refused(field: str, value: Any) -> None:
    fields = {"llama.pooling_type": 1, "llama.context_length": 77, f"llama.{field}": value}
    with pytest.raises(CheckpointError, match=rf"llama\.{field}={value!r}"):
        gguf_settings(Path("m.gguf"), "llama", fields)


def test_the_table_of_layouts_has_those_of_the_tests():
    page = (Path(__file__).parents[2] / "docs" / "other-embedders.md").read_text(encoding="utf-8")
    table = page[page.index("| layout |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) == len(LAYOUTS)
    for layout in LAYOUTS:
        assert any(re.sub(r"\W", "", row[0].lower()) in re.sub(r"\W", "", layout.lower()) for row in rows), layout
    assert all(float(difference) <= 1e-5 for row in rows for difference in row[3:])
