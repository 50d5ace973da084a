"""Embedding models of other makers: sentence-transformers folders and embedding GGUF files.

`modules.json` and the files that it names say how such a model makes a vector: pooling, mask, prompts, layers behind
the pooling. They are translated to the settings of `llm2vec_config.json`, the one description that `Encoder` reads. A
setting that `Encoder` does not compute is refused by name, never left out.

Sources: sentence-transformers 6.2 (base/modules/, sentence_transformer/modules/pooling.py), llama.cpp
(include/llama.h, src/llama-model.cpp).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.checkpoint.head import HeadLayer, read_dense_module
from unmask.checkpoint.tensors import further_weights
from unmask.checkpoint.tokenizer import own_classes
from unmask.errors import CheckpointError

log = logging.getLogger("unmask")

# Value of the setting "prompt_style": instruction and text are one string, joined as they are; all tokens are pooled.
SENTENCE_TRANSFORMERS = "sentence-transformers"

_MODEL_SETTINGS = "config_sentence_transformers.json"
_LENGTHS = "sentence_bert_config.json"

# model_type of code that its makers ship with the weights -> the decoder that it is with the causal mask removed.
BIDIRECTIONAL_TYPES = {"llama_bidirec": "llama"}

# Classes of the hub's remote code (auto_map) that compute what unmask computes from config.json.
_KNOWN_CODE = {
    "modeling_qwen.Qwen2Model",  # gte-Qwen2: Qwen2 that reads is_causal
    "llama_bidirectional_model.LlamaBidirectionalModel",  # llama-embed-nemotron
    "llama_bidirectional_model.LlamaBidirectionalConfig",
    "tokenization_qwen.Qwen2Tokenizer",  # gte-Qwen2: Qwen2's tokenizer with add_eos_token
    "tokenization_qwen.Qwen2TokenizerFast",
}

_HARMLESS_POOLING_KEYS = {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt"}
# Modes of sentence-transformers' Pooling -> ours. `first_token` is theirs for any first token, not BOS alone.
_POOLINGS = {"mean": "mean", "weightedmean": "weighted_mean", "lasttoken": "last_token", "cls": "first_token"}
_OLD_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {
    f"torch.nn.modules.{module}.{name}": name.lower()
    for module, names in {"linear": ["Identity"], "activation": ["Tanh", "ReLU", "GELU", "SiLU", "Sigmoid"]}.items()
    for name in names
}
# Entries of sentence_bert_config.json that change no vector; `max_seq_length` and others are read.
_HARMLESS_LENGTHS = {"transformer_task", "module_output_name", "unpad_inputs", "max_seq_length", "do_lower_case"}
_HARMLESS_ARGUMENTS = {"attn_implementation", "torch_dtype", "dtype", "trust_remote_code", "device_map", "padding_side"}
_ARGUMENTS = ("model_args", "tokenizer_args", "config_args", "model_kwargs", "processor_kwargs", "config_kwargs")

# llama.cpp, include/llama.h, enum llama_pooling_type.
_GGUF_POOLINGS = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}
_READABLE_GGUF_POOLINGS = {"mean": "mean", "cls": "first_token", "last": "last_token"}


@dataclass(frozen=True)
class ModulesDescription:
    """A sentence-transformers folder in our words.

    Attributes:
        settings: as in `llm2vec_config.json`.
        files: every file that decided them, or holds layers behind the pooling.
        layers: the linear layers behind the pooling, first to last.
    """

    settings: Mapping[str, Any]
    files: Sequence[Path] = ()
    layers: Sequence[HeadLayer] = ()


def read_modules(folder: Path, config: Mapping[str, Any], *, weights: bool = True) -> ModulesDescription | None:
    """Read `modules.json` and the files that it names; None where there is none.

    Args:
        folder: the model's.
        config: the decoder's `config.json`.
        weights: open the layers behind the pooling; without them, the description has none.

    Raises:
        CheckpointError: a setting means a vector that `Encoder` does not compute; all such settings are named.
    """
    if not (folder / "modules.json").is_file():
        return None
    reader = _FolderReader(folder, config, weights)
    settings = reader.settings()
    if reader.differences:
        raise CheckpointError(
            f"{folder / 'modules.json'} describes {'; '.join(reader.differences)}, which unmask does not compute. Use "
            "sentence-transformers for its vectors (unmask evaluate does); to encode with the decoder alone, as a "
            'bidirectional mean, write llm2vec_config.json with {"pooling_mode": "mean"} beside it'
        )
    return ModulesDescription(settings, reader.files, reader.layers)


def read_dense_layers(folder: Path, config: Mapping[str, Any], *, weights: bool = True) -> ModulesDescription | None:
    """Read the layers behind the pooling of a folder whose settings are in an `llm2vec_config.json`.

    The other modules say the same to other libraries, some in ways that `read_modules` does not follow: an exported
    folder keeps BOS out of the mean by a module WordWeights.

    Args:
        folder, config, weights: as for `read_modules`.

    Returns:
        A description without settings; None where there is no `modules.json`.

    Raises:
        CheckpointError: a module behind the pooling is one that `Encoder` does not compute.
    """
    if not (folder / "modules.json").is_file():
        return None
    reader = _FolderReader(folder, config, weights)
    reader.read_layers()
    if reader.differences:
        raise CheckpointError(
            f"{folder / 'modules.json'} describes {'; '.join(reader.differences)}, which unmask does not compute"
        )
    return ModulesDescription({}, reader.files, reader.layers)


def describe_bidirectional_type(folder: Path, config: Mapping[str, Any]) -> ModulesDescription | None:
    """Describe a decoder without `modules.json` whose model_type says that it is an encoder; None for other types.

    Args:
        folder: of the decoder.
        config: its `config.json`, which may hold the pooling.
    """
    if config.get("model_type") not in BIDIRECTIONAL_TYPES:
        return None
    if config.get("pooling", "avg") != "avg":
        raise CheckpointError(
            f"{folder / 'config.json'} describes a {config['model_type']} with pooling {config['pooling']!r}, which "
            "unmask does not compute"
        )
    settings: dict[str, Any] = {"prompt_style": SENTENCE_TRANSFORMERS, "causal": False, "pooling_mode": "mean"}
    length = _FolderReader(folder, config, weights=False).longest_sequence()
    settings |= {"skip_instruction": False, "head": [{"kind": "normalize"}], "max_length": length}
    return ModulesDescription(settings)


class _FolderReader:
    """Reads the files of one folder, and collects their names and the settings that cannot be followed."""

    def __init__(self, folder: Path, config: Mapping[str, Any], weights: bool) -> None:
        self.folder, self.config, self._weights = folder, config, weights
        self._outputs: int | None = None  # of the last linear layer
        self.differences: list[str] = []
        self.files: list[Path] = []
        self.layers: list[HeadLayer] = []

    def read_layers(self) -> None:
        for kind, path in self._modules():
            if kind == "Pooling":
                self._read(f"{path}/config.json", dict)
            elif kind not in ("Transformer", "WordWeights"):
                self._step(kind, path)
        # As with the pooling's, only their digests count here: they are part of the revision of such a folder.
        for name in (_MODEL_SETTINGS, _LENGTHS):
            self._read(name, dict)

    def settings(self) -> dict[str, Any]:
        kinds = self._modules()
        names = [kind for kind, _ in kinds]
        if names[:2] != ["Transformer", "Pooling"]:
            self.differences.append(f"modules {', '.join(names)}, not a Transformer and a Pooling first")
            return {}
        if kinds[0][1] not in ("", "."):
            self.differences.append(f"a Transformer in the folder {kinds[0][1]}")
        settings = {"prompt_style": SENTENCE_TRANSFORMERS, "causal": is_causal(self.config)}
        # A text in the place of a flag would count as true.
        words = ("all", "vision") if str(self.config.get("model_type")).startswith("gemma4") else ()
        for key, other in (("is_causal", ()), ("use_bidirectional_attention", words)):
            value = self.config.get(key)
            # JSON's 0 and 1 are equal to false and true, and transformers reads them so.
            if not (value in (None, False, True) or value in other):
                self.differences.append(f"{key}={value!r:.80}, which is neither true nor false")
        if self.config.get("is_causal") and reads_both_ways(self.config):
            self.differences.append("is_causal beside use_bidirectional_attention, a contradiction")
        settings |= self._pooling(kinds[1][1])
        head: list[dict[str, Any]] = []
        for kind, path in kinds[2:]:
            head += self._step(kind, path)
        settings |= self._model_settings(head)
        self._check_code()
        return {**settings, "max_length": self._max_length(), **({"head": head} if head else {})}

    def _modules(self) -> list[tuple[str, str]]:
        """Kind and path of each module."""
        modules = self._read("modules.json", list)
        return [(_kind(module.get("type")), str(module.get("path", ""))) for module in modules]

    def _pooling(self, path: str) -> dict[str, Any]:
        pooling = self._read(f"{path}/config.json", dict)
        modes = pooling.get("pooling_mode") or [
            mode for key, mode in _OLD_POOLING_KEYS.items() if pooling.get(key) is True
        ]
        modes = [modes] if isinstance(modes, str) else list(modes)
        includes_prompt = bool(pooling.get("include_prompt", True))
        unknown = set(pooling) - _HARMLESS_POOLING_KEYS - set(_OLD_POOLING_KEYS)
        self.differences += [f"pooling with {key}={pooling[key]!r}" for key in sorted(unknown) if pooling[key]]
        if len(modes) != 1 or modes[0] not in _POOLINGS:
            self.differences.append(f"pooling {' and '.join(map(str, modes)) or 'of an unknown kind'}")
        elif modes[0] == "weightedmean" and not includes_prompt:
            self.differences.append("a weighted mean without the prompt (include_prompt=false)")
        return {"pooling_mode": _POOLINGS.get(modes[0] if modes else ""), "skip_instruction": not includes_prompt}

    def _step(self, kind: str, path: str) -> list[dict[str, Any]]:
        """Translate one module behind the pooling."""
        if kind == "Dropout":
            return []  # nothing outside training
        if kind not in ("Dense", "Normalize"):
            self.differences.append(f"a module {kind}")
            return []
        config = self._read(f"{path}/config.json", dict)
        for key in ("module_input_name", "module_output_name"):
            if config.get(key) not in (None, "sentence_embedding"):
                self.differences.append(f"a module {kind} with {key}={config[key]}")
        if kind == "Normalize":
            return [{"kind": "normalize"}]
        activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        if activation not in _ACTIVATIONS:
            self.differences.append(f"a module Dense with activation_function={activation}")
        if config.get("use_residual"):
            self.differences.append("a module Dense with use_residual")
        sizes = [config.get(key) for key in ("in_features", "out_features")]
        if not all(isinstance(size, int) for size in sizes):
            raise CheckpointError(f"{self.folder / path / 'config.json'} lacks in_features or out_features")
        folder, self._outputs = self.folder / path, config["out_features"]
        if self._weights:
            self.layers.append(read_dense_module(folder, *map(int, sizes), bias=config.get("bias", True)))
            usual = sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")])
            self.files += [*usual, *further_weights(folder, usual)]
        return [{"kind": "dense", "activation": _ACTIVATIONS.get(activation)}]

    def _model_settings(self, head: list[dict[str, Any]]) -> dict[str, Any]:
        """Translate `config_sentence_transformers.json`; appends truncation to `head`."""
        model = self._read(_MODEL_SETTINGS, dict)
        texts = model.get("prompts") or {}
        if not isinstance(texts, dict) or not all(isinstance(text, str | None) for text in texts.values()):
            raise CheckpointError(
                f"{self.folder / _MODEL_SETTINGS} has prompts that are no texts by name: {texts!r:.80}"
            )
        prompts = {str(name): prompt for name, prompt in texts.items() if prompt}
        # An empty prompt "document" is a decision as well.
        documents = next((texts[name] or "" for name in ("document", "passage", "corpus") if name in texts), "")
        settings: dict[str, Any] = {
            "instructions": prompts,
            "query_instruction": prompts.get("query", ""),
            "document_instruction": documents,
        }
        default_name = model.get("default_prompt_name")
        default = prompts.get(str(default_name))
        if default_name is not None and default_name not in {"query", "document", *texts}:
            self.differences.append(f"default_prompt_name={default_name!r}, which is not among its prompts")
        if default is not None:
            settings["default_instruction"] = default
            if not prompts.get("query") or not documents:
                self.differences.append(
                    f"a default prompt ({model['default_prompt_name']}) without prompts for queries and for documents"
                )
        similarity = model.get("similarity_fn_name") or "cosine"
        has_unit_length = bool(head) and head[-1]["kind"] == "normalize"
        if similarity not in ("cosine", "dot") or (similarity == "dot" and not has_unit_length):
            self.differences.append(f"the similarity {similarity} of vectors that are not scaled to length 1")
        length = self._whole_number(model, "truncate_dim")
        if length is not None:
            head.append({"kind": "truncate", "dimensions": length})
        return settings | self._matryoshka(length)

    def _matryoshka(self, longest: int | None) -> dict[str, Any]:
        """Return the lengths to which vectors may be cut; those beyond `truncate_dim` are no lengths of this model."""
        lengths = self.config.get("matryoshka_dimensions")
        if not lengths:
            return {}
        size = longest or self._outputs or self.config.get("hidden_size")
        if not isinstance(lengths, list) or not all(type(length) is int and length > 0 for length in lengths):
            raise CheckpointError(
                f"{self.folder / 'config.json'} has matryoshka_dimensions={lengths!r:.80}: no lengths"
            )
        if longest is None and max(lengths) > int(size or 0):
            self.differences.append(f"matryoshka_dimensions {max(lengths)} of vectors with {size} numbers")
        return {"matryoshka": sorted(length for length in lengths if length <= int(size or 0))}

    def _whole_number(self, content: Mapping[str, Any], key: str) -> int | None:
        """A length of 1 or more; None where the file has none."""
        value = content.get(key)
        if value is None or (type(value) is int and value > 0):
            return value
        self.differences.append(f"{key}={value!r}, which is no length")
        return None

    def _max_length(self) -> int | None:
        """Longest sequence: of `sentence_bert_config.json`, else the shorter of the tokenizer's and the decoder's."""
        lengths = self._read(_LENGTHS, dict)
        if lengths.get("do_lower_case"):
            self.differences.append("texts in lower case (do_lower_case)")
        if "message" in (lengths.get("modality_config") or {}):
            self.differences.append("a chat template around texts (modality_config message)")
        for key in _ARGUMENTS:
            changing = sorted(set(lengths.get(key) or {}) - _HARMLESS_ARGUMENTS)
            if changing:
                self.differences.append(f"{key} with {', '.join(changing)}")
        unknown = set(lengths) - _HARMLESS_LENGTHS - set(_ARGUMENTS) - {"modality_config"}
        self.differences += [f"{key}={lengths[key]!r}" for key in sorted(unknown) if lengths[key]]
        tokenizer = self._read("tokenizer_config.json", dict, decides=False)
        if tokenizer.get("truncation_side") == "left":
            self.differences.append("texts cut at their beginning (truncation_side left)")
        self._check_prefix_space(tokenizer)
        if (length := self._whole_number(lengths, "max_seq_length")) is not None:
            return length
        return self.longest_sequence()

    def longest_sequence(self) -> int | None:
        """Return the shorter of the tokenizer's and the decoder's length."""
        tokenizer = self._read("tokenizer_config.json", dict, decides=False)
        limits = (tokenizer.get("model_max_length"), self.config.get("max_position_embeddings"))
        return min((int(limit) for limit in limits if limit), default=None)

    def _check_prefix_space(self, tokenizer: Mapping[str, Any]) -> None:
        """Refuse a flag that contradicts tokenizer.json: transformers rebuilds a tokenizer by the flag."""
        flag = tokenizer.get("add_prefix_space")
        if not isinstance(flag, bool):
            return
        pre_tokenizer = self._read("tokenizer.json", dict, decides=False).get("pre_tokenizer") or {}
        for step in (pre_tokenizer, *(pre_tokenizer.get("pretokenizers") or ())):
            stated = step.get("add_prefix_space", step.get("prepend_scheme", "never") != "never")
            if step.get("type") in ("ByteLevel", "Metaspace") and bool(stated) != flag:
                self.differences.append(f"add_prefix_space={flag}, which tokenizer.json contradicts ({step['type']})")

    def _check_code(self) -> None:
        """Refuse code of a model's own that is not known to compute what `config.json` says."""
        tokenizer = self._read("tokenizer_config.json", dict, decides=False)
        for file, content in (("config.json", self.config), ("tokenizer_config.json", tokenizer)):
            for name in own_classes(content):
                if name not in _KNOWN_CODE and not name.endswith("Config"):
                    self.differences.append(f"code of its own, {name} ({file}, auto_map)")

    def _read(self, name: str, expected: type, decides: bool = True) -> Any:
        """The content of a JSON file, empty where there is none. `decides`: it belongs to the model's revision."""
        file = self.folder / name
        if not file.resolve().is_relative_to(self.folder.resolve()) and ".." in name:
            raise CheckpointError(
                f"{self.folder / 'modules.json'} points outside its own folder; refusing to follow it"
            )
        if not file.is_file():
            return expected()
        if decides:
            self.files.append(file)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from error
        if not isinstance(content, expected) or (
            expected is list and not all(isinstance(item, dict) for item in content)
        ):
            raise CheckpointError(
                f"{file} is not what sentence-transformers writes: expected a JSON {expected.__name__}"
            )
        return content


def _kind(type_name: Any) -> str:
    """A module's class name; the whole type for a class that is not sentence-transformers' own."""
    package, _, name = str(type_name).rpartition(".")
    return name if package.split(".")[0] == "sentence_transformers" else str(type_name)


def is_causal(config: Mapping[str, Any]) -> bool:
    """True if the makers of an embedding model left the causal mask on.

    `use_bidirectional_attention` counts for every family, as its makers, TEI and vLLM read it; transformers reads it
    for Gemma alone.
    """
    if config.get("model_type") in BIDIRECTIONAL_TYPES or reads_both_ways(config):
        return False
    return bool(config.get("is_causal", True))


def reads_both_ways(config: Mapping[str, Any]) -> bool:
    """True if `use_bidirectional_attention` takes the mask from text: true, or "all" (Gemma 4's "vision" does not)."""
    return config.get("use_bidirectional_attention") in (True, "all")


def gguf_settings(path: Path, architecture: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an embedding GGUF file, in the words of `llm2vec_config.json`; empty for a language model.

    llama.cpp pools every token, BOS and EOS included, and its server scales vectors to length 1.

    Raises:
        CheckpointError: the file's pooling means another vector.
    """
    number = fields.get(f"{architecture}.pooling_type")
    kind = _GGUF_POOLINGS.get(number, str(number)) if isinstance(number, int) else ""
    if number is None or kind == "none":
        return {}
    if kind and kind not in _READABLE_GGUF_POOLINGS:
        raise CheckpointError(
            f"{path} is an embedding model with pooling_type {kind}, which unmask does not compute; use llama.cpp, or "
            "the model's folder in the hub's layout"
        )
    causal, length = fields.get(f"{architecture}.attention.causal"), fields.get(f"{architecture}.context_length")
    for name, value, kinds in (
        ("pooling_type", number, int),
        ("attention.causal", causal, bool | None),
        ("context_length", length, int),
    ):
        if not isinstance(value, kinds):
            raise CheckpointError(f"{path} has {architecture}.{name}={value!r:.80}, which llama.cpp does not write")
    if causal is None and architecture == "gemma-embedding":
        causal = False  # llama.cpp's code of this family has no causal mask
    if causal is None:
        log.warning(
            "%s states pooling_type %s but no %s.attention.causal; its causal mask is kept, as llama.cpp does",
            path,
            kind,
            architecture,
        )
    return {
        "prompt_style": SENTENCE_TRANSFORMERS,
        "pooling_mode": _READABLE_GGUF_POOLINGS[kind],
        "skip_instruction": False,
        "causal": causal is not False,
        "max_length": length,
        "head": [{"kind": "normalize"}],
    }
