"""Tiny random models in the layouts of published decoder embedders: their files, classes, prompts and tokenizers.

Sources are the models' own folders on the hub, by the name in `LAYOUTS`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HIDDEN_SIZE = 32
SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
WORDS = (
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: task: search result "
    "title: none | text: the river runs under an old stone bridge while 1984 lamps glow; moonlight falls on water. "
)
INSTRUCT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(specials: list[str]) -> Tokenizer:
    """A tokenizer of Qwen's or Llama 3's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in specials])
    return tokenizer


def sentence_piece(specials: list[str], prefix_space: bool) -> Tokenizer:
    """A tokenizer of Mistral's (with a space before the text) or Gemma's kind: BPE over pieces, bytes for the rest."""
    mark = "\N{LOWER ONE EIGHTH BLOCK}"
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", mark)
    trained.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=160, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in learned["merges"]]
    unknown = "<unk>"
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    if prefix_space:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", mark)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in specials])
    return tokenizer


def around(tokenizer: Tokenizer, before: str | None, after: str | None) -> Tokenizer:
    """Add BOS and EOS by the post-processor."""
    names = [name for name in (before, after) if name]
    single = " ".join([*([before] if before else []), "$A", *([after] if after else [])])
    template = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )
    tokenizer.post_processor = template
    return tokenizer


def qwen() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = around(byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), None, "<|endoftext|>")
    end = "<|endoftext|>"
    return tokenizer, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": end, "pad_token": end, "add_bos_token": False}


def gte_qwen() -> tuple[Tokenizer, dict[str, Any]]:
    """EOS as gte-Qwen2 has it: the model's own class adds it by a flag, and tokenizer.json says nothing."""
    tokenizer, settings = qwen()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    classes = ["tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"]
    return tokenizer, settings | {"add_eos_token": True, "auto_map": {"AutoTokenizer": classes}}


def mistral() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = around(sentence_piece(["<unk>", "<s>", "</s>"], prefix_space=True), "<s>", "</s>")
    flags = {"add_bos_token": True, "add_eos_token": True}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return tokenizer, {"tokenizer_class": "LlamaTokenizer", **named, **flags}


def gemma() -> tuple[Tokenizer, dict[str, Any]]:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = around(sentence_piece(specials, prefix_space=False), "<bos>", "<eos>")
    named = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")}
    return tokenizer, {"tokenizer_class": "GemmaTokenizer", **named, "add_bos_token": True, "add_eos_token": True}


def llama3() -> tuple[Tokenizer, dict[str, Any]]:
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|eot_id|>"}
    tokenizer = around(byte_level(list(names.values())), "<|begin_of_text|>", None)
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **names}


@dataclass(frozen=True)
class Layout:
    """One published model's files.

    Attributes:
        config: entries of config.json beyond SMALL; `model_type` names the class of transformers.
        tokenizer: makes the tokenizer and its settings.
        pooling: 1_Pooling/config.json.
        dense: sizes and activation of Dense modules behind the pooling.
        lengths: sentence_bert_config.json; None for no file.
        code: files of remote code by name.
    """

    config: Mapping[str, Any]
    tokenizer: Callable[[], tuple[Tokenizer, dict[str, Any]]]
    pooling: Mapping[str, Any]
    prompts: Mapping[str, Any]
    dense: tuple[tuple[int, int, str], ...] = ()
    normalizes: bool = True
    lengths: Mapping[str, Any] | None = field(default_factory=lambda: {"max_seq_length": 48, "do_lower_case": False})
    library: str = "sentence_transformers.models."
    code: Mapping[str, str] = field(default_factory=dict)


LAST = {"word_embedding_dimension": HIDDEN_SIZE, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
MEAN = {"word_embedding_dimension": HIDDEN_SIZE, "pooling_mode_lasttoken": False, "pooling_mode_mean_tokens": True}
MISTRAL = {"model_type": "mistral", "sliding_window": 20}
GEMMA3 = {"model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8}
NEMOTRON = '''"""The causal mask off, as in nvidia/llama-embed-nemotron-8b."""
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel


class LlamaBidirectionalConfig(LlamaConfig):
    model_type = "llama_bidirec"


class LlamaBidirectionalModel(LlamaModel):
    config_class = LlamaBidirectionalConfig

    def __init__(self, config):
        config.is_causal = False
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.is_causal = False
'''
_MODULE = "llama_bidirectional_model.LlamaBidirectional"
# Written for these tests: they compute what the model's own modeling_qwen.py and tokenization_qwen.py do. The flag
# add_eos_token of tokenizer_config.json is true by default here, since transformers 5 does not pass it to such a class
# (4 did; vLLM and Text Embeddings Inference add EOS by themselves for that reason).
GTE_MODEL = """from transformers.models.qwen2.modeling_qwen2 import Qwen2Model as Original


class Qwen2Model(Original):
    pass  # transformers reads is_causal from the config by itself
"""
GTE_TOKENIZER = """from tokenizers import processors
from transformers import TokenizersBackend


class Qwen2TokenizerFast(TokenizersBackend):
    @classmethod
    def convert_to_native_format(cls, **kwargs):
        return TokenizersBackend.convert_to_native_format(**kwargs)

    def __init__(self, *args, add_eos_token=True, **kwargs):
        super().__init__(*args, **kwargs)
        end = [f"{self.eos_token}:0"] if add_eos_token else []
        self.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=["$A:0", *end], special_tokens=[(self.eos_token, self.eos_token_id)] if end else []
        )


class Qwen2Tokenizer(Qwen2TokenizerFast):
    pass
"""

LAYOUTS: dict[str, Layout] = {
    "Qwen/Qwen3-Embedding-0.6B": Layout(
        {"model_type": "qwen3"}, qwen, {**LAST, "include_prompt": True},
        {"query": INSTRUCT.rstrip(), "document": ""}, lengths=None,
    ),
    "google/embeddinggemma-300m": Layout(
        {**GEMMA3, "use_bidirectional_attention": True}, gemma, {**MEAN, "include_prompt": True},
        {"query": "task: search result | query: ", "document": "title: none | text: ", "STS": "task: similarity | "},
        dense=((HIDDEN_SIZE, 64, "Identity"), (64, HIDDEN_SIZE, "Identity")),
    ),
    "intfloat/e5-mistral-7b-instruct": Layout(
        MISTRAL, mistral, LAST, {"web_search_query": INSTRUCT, "sts_query": "Instruct: similar text.\nQuery: "},
    ),
    "Alibaba-NLP/gte-Qwen2-1.5B-instruct": Layout(
        {"model_type": "qwen2", "is_causal": False, "auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}},
        gte_qwen, LAST, {"query": INSTRUCT},
        code={"modeling_qwen.py": GTE_MODEL, "tokenization_qwen.py": GTE_TOKENIZER},
    ),
    "Salesforce/SFR-Embedding-Mistral": Layout(MISTRAL, mistral, {**LAST, "include_prompt": True}, {}),
    "Linq-AI-Research/Linq-Embed-Mistral": Layout(MISTRAL, mistral, LAST, {"query": INSTRUCT, "document": ""}),
    "nvidia/llama-embed-nemotron-8b": Layout(
        {"model_type": "llama_bidirec", "auto_map": {"AutoConfig": f"{_MODULE}Config", "AutoModel": f"{_MODULE}Model"}},
        llama3, {"embedding_dimension": HIDDEN_SIZE, "pooling_mode": "mean", "include_prompt": True},
        {"query": INSTRUCT, "document": ""}, code={"llama_bidirectional_model.py": NEMOTRON},
    ),
    "codefuse-ai/F2LLM-0.6B": Layout({"model_type": "qwen3"}, qwen, LAST, {"query": INSTRUCT, "document": ""}),
    "tencent/KaLM-Embedding-Gemma3-12B-2511": Layout(
        {**GEMMA3, "use_bidirectional_attention": True}, gemma, LAST, {"query": INSTRUCT, "document": ""},
    ),
}  # fmt: skip


def write_layout(folder: Path, layout: Layout, **changes: Mapping[str, Any]) -> Path:
    """Write a folder. `changes` add entries to files by name."""
    from transformers import AutoConfig, AutoModel

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, settings = layout.tokenizer()
    config: dict[str, Any] = {**SMALL, **layout.config, "vocab_size": tokenizer.get_vocab_size()}
    kind = str(config["model_type"]).removesuffix("_bidirec")
    values = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    torch.manual_seed(len(kind))
    model = AutoModel.from_config(AutoConfig.for_model(kind, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.1)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    prefix = layout.library
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    for i, (inputs, outputs, activation) in enumerate(layout.dense, start=2):
        path = f"{i}_Dense"
        modules.append(("Dense", path))
        package = "linear" if activation == "Identity" else "activation"
        dense = {"in_features": inputs, "out_features": outputs, "bias": False,
                 "activation_function": f"torch.nn.modules.{package}.{activation}"}  # fmt: skip
        _write(folder / path / "config.json", dense)
        save_file({"linear.weight": torch.randn(outputs, inputs) * 0.2}, folder / path / "model.safetensors")
    if layout.normalizes:
        modules.append(("Normalize", f"{len(modules)}_Normalize"))
    files: dict[str, Any] = {
        "config.json": json.loads((folder / "config.json").read_text()) | dict(layout.config),
        "tokenizer_config.json": settings | {"model_max_length": 96},
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": prefix + name} for i, (name, path) in enumerate(modules)
        ],
        "1_Pooling/config.json": layout.pooling,
        "config_sentence_transformers.json": {
            "prompts": layout.prompts, "default_prompt_name": None, "similarity_fn_name": "cosine",
        },
    }  # fmt: skip
    if layout.lengths is not None:
        files["sentence_bert_config.json"] = layout.lengths
    for name, content in files.items():
        change = changes.get(name)
        _write(folder / name, {**content, **change} if change is not None else content)
    for name, text in layout.code.items():
        (folder / name).write_text(text)
    return folder


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
