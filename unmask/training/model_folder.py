"""Write a model as a folder in the hub's layout, which `Encoder.load` and transformers read with the same result.

Tensors are written one at a time, so that a model that is merged on the way is never in memory as a whole. The folder
is written atomically.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from unmask.checkpoint import Checkpoint
from unmask.checkpoint.head import HEAD_BIAS, HEAD_FILE, HEAD_PREFIX, HEAD_WEIGHT, head_names
from unmask.checkpoint.hub_config import hub_config
from unmask.checkpoint.resolve import EMBEDDING_FROM
from unmask.checkpoint.tensors import EMBEDDING, LM_HEAD, STEP, TensorSource
from unmask.disk import atomic_folder
from unmask.encoder import Encoder
from unmask.encoder.model.architectures import Rope, shape_of
from unmask.encoder.model.decoder import Decoder
from unmask.encoder.model.transformers_decoder import TransformersDecoder
from unmask.encoder.shear import shear
from unmask.encoder.templates import template_for
from unmask.errors import UsageError
from unmask.training.recipe import Recipe, Save

# int8: matrices as 8-bit steps with a float32 step size per row; vectors, and the embedding's rows, in float32.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8"}

# Entries of a hub config that are not true of what is written here: how the original was stored, and code of its own.
_NOT_OURS = ("quantization_config", "auto_map", "_name_or_path", "torch_dtype", "dtype", EMBEDDING_FROM)
# What tokenizer_config.json says beyond the tokenizer's own file. Flags such as add_bos_token are left out: the
# post-processor states what is added, and two statements could differ.
_TOKENIZER_SETTINGS = ("chat_template", "padding_side", "clean_up_tokenization_spaces")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# Settings of an encoder that are copied as they are.
_COPIED_SETTINGS = (
    "prompt_style",
    "instructions",
    "query_instruction",
    "document_instruction",
    "default_instruction",
    "takes_instructions",
    "matryoshka",
    "sequence_tokens",
)

# Llama 3.1 and 3.2, whose GGUF files hold the resulting factors and not the rule.
# https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
_LLAMA3_FACTORS = (8.0, 32.0)
_LLAMA3_RULE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class EncoderSettings:
    """The settings of an encoder that are stored with it, in `llm2vec_config.json`.

    Attributes:
        causal: the weights are used with the causal mask; transformers is told by `is_causal`.
        head: steps behind the pooling, as in `encoder.head`; empty for none, or one linear layer.
        embedding_from: the model that token embedding and tokenizer are taken from; None where they are written.
        takes_instructions: whether an instruction means anything to the model; None: as its base states, if it does.
        matryoshka: lengths that its vectors may be cut to; empty: as its base states.
    """

    pooling: str = "mean"
    max_length: int = 512
    doc_max_length: int = 400
    skip_instruction: bool = True
    causal: bool = False
    head: Sequence[Mapping[str, Any]] = ()
    embedding_from: str | None = None
    takes_instructions: bool | None = None
    matryoshka: Sequence[int] = ()

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "EncoderSettings":
        """Read the settings from a model's files."""
        stored_settings = checkpoint.encoder_config
        return cls(
            pooling=str(stored_settings.get("pooling_mode") or "mean"),
            max_length=int(stored_settings.get("max_length") or 512),
            doc_max_length=int(stored_settings.get("doc_max_length") or 400),
            skip_instruction=bool(stored_settings.get("skip_instruction", True)),
            causal=bool(stored_settings.get("causal", False)),
            head=stored_settings.get("head") or (),
        )


def adapter_settings(recipe: Recipe, stored_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encoder's settings that are stored with an adapter, without its head.

    The pooling and the mask belong to the vectors. The length is not stored: one may train short and encode long.

    Args:
        recipe: of the run that trained it.
        stored_settings: of the model that it was trained on.
    """
    settings = {**stored_settings, "pooling_mode": str(recipe.pooling or stored_settings.get("pooling_mode") or "mean")}
    if recipe.causal is not None:
        settings["causal"] = recipe.causal
    return settings


class NamedTensors:
    """A `TensorSource` of tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def write_model(
    folder: Path,
    encoder: Encoder,
    parameters: Mapping[str, Tensor] | None = None,
    head: Mapping[str, Tensor] | None = None,
    steps: Sequence[Mapping[str, Any]] = (),
    save: Save | None = None,
    base: str = "",
    layers: int | None = None,
) -> None:
    """Write an encoder as it is in memory: `config.json`, `model.safetensors`, tokenizer, `llm2vec_config.json`.

    Fused layers are written as the hub's separate ones. The base's own language-model head goes along where it is
    not the embedding, because MNTP training needs it.

    Args:
        parameters: the decoder's by name; where those in memory are parts of what they are.
        head: weight and bias of the layer behind the pooling; left out: the encoder's own.
        steps: with such a layer, the steps behind the pooling; empty for the layer alone.
        save: precision, what is written and what is stated of it; left out: all, as it is in memory.
        base: the model that the folder names for its token embedding, where that is not written.
        layers: number of layers to write, from the first one; default: all.

    Raises:
        UsageError: the folder exists already.
        StorageError: it cannot be written; nothing is left of it then.
    """
    decoder, checkpoint = encoder.trainable_decoder(), encoder.checkpoint
    if isinstance(decoder, Decoder):
        tensors = hub_tensors(parameters or dict(decoder.named_parameters()), decoder.sources(), checkpoint.tensors)
        causal = decoder.layers[0].causal
    else:
        assert isinstance(decoder, TransformersDecoder)
        tensors = dict(decoder.model.state_dict())
        causal = bool(getattr(decoder.model.config, "is_causal", False))
    if _has_own_lm_head(checkpoint.config, checkpoint.tensors):
        tensors[LM_HEAD] = checkpoint.tensors.read(LM_HEAD)
    if head is not None:
        tensors |= {HEAD_WEIGHT: head["weight"], HEAD_BIAS: head["bias"]}
    else:
        tensors |= {name: checkpoint.tensors.read(name) for name in head_names(checkpoint.tensors)}
    stated = save or Save()
    settings = EncoderSettings(
        pooling=encoder.pooling,
        max_length=stated.max_length or encoder.max_length,
        doc_max_length=int(checkpoint.encoder_config.get("doc_max_length") or 400),
        skip_instruction=encoder.prompts.skip_instruction,
        causal=bool(causal),
        head=steps if head is not None else checkpoint.encoder_config.get("head") or (),
        embedding_from=None if stated.embedding else base,
        takes_instructions=stated.takes_instructions,
        matryoshka=stated.matryoshka,
    )
    # On a CPU, an encoder in bfloat16 has rounded weights but computes the rest in float32.
    own = "bfloat16" if "bfloat16" in encoder.precision else str(encoder.dtype).removeprefix("torch.")
    dtype = own if save is None else save.precision
    target = checkpoint if layers is None else shear(checkpoint, layers)
    write_model_folder(folder, target, NamedTensors(tensors), settings, DTYPES[dtype])


def write_head(folder: Path, head: Mapping[str, Tensor]) -> None:
    """Write `head.safetensors`, float32: `weight` and `bias`, or those of several layers with their number before."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in head.items()}
    write_tensors(folder / HEAD_FILE, NamedTensors(tensors), {name: name for name in tensors}, torch.float32)


def hub_tensors(
    fused: Mapping[str, Tensor], sources: Mapping[str, Sequence[str]], shapes: TensorSource
) -> dict[str, Tensor]:
    """Return views of our parameters under the hub's names, as `Decoder.sources` fused them.

    Args:
        fused: our parameters by name.
        sources: for each of them, the hub tensors stacked along its first axis.
        shapes: knows the rows of each.
    """
    views: dict[str, Tensor] = {}
    for ours, names in sources.items():
        parts = fused[ours].detach().split([shapes.shape(name)[0] for name in names])
        views.update(zip(names, parts, strict=True))
    return views


def write_model_folder(
    folder: Path,
    checkpoint: Checkpoint,
    tensors: TensorSource,
    settings: EncoderSettings,
    dtype: torch.dtype,
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write `tensors` as a model like `checkpoint`: its configuration and tokenizer, other weights.

    Args:
        folder: must not exist, or be empty.
        tensors: under innermost names; those that the architecture has no place for are left out.
        dtype: precision of the file.
        add_files: writes further files into the folder before it gets its name.

    Raises:
        UsageError: the folder is not empty.
        StorageError: it cannot be written; nothing is left of it then.
    """
    require_new(folder)
    with atomic_folder(folder) as partial:
        in_file = _names_in_file(checkpoint, tensors)
        if settings.embedding_from is not None:
            in_file = {key: name for key, name in in_file.items() if name not in (EMBEDDING, LM_HEAD)}
        write_tensors(partial / "model.safetensors", tensors, in_file, dtype)
        write_json(partial / "config.json", written_config(checkpoint, settings, dtype))
        write_json(partial / "llm2vec_config.json", _encoder_config(checkpoint, settings))
        if names := head_names(tensors):
            short = f"{HEAD_PREFIX}0." if len(names) == 2 else HEAD_PREFIX
            write_head(partial, {name.removeprefix(short): tensors.read(name) for name in names})
        if settings.embedding_from is None:
            write_tokenizer(partial, checkpoint, settings.max_length)
        if add_files is not None:
            add_files(partial)


def require_new(folder: Path) -> None:
    """Refuse a folder that is not empty, or a file.

    Raises:
        UsageError: it is one of these.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already; remove it or choose another --output")


def _names_in_file(checkpoint: Checkpoint, tensors: TensorSource) -> dict[str, str]:
    """Map names in the file to innermost names. With its own language-model head, the file is that of a CausalLM."""
    present = set(tensors.names())
    shape = shape_of(checkpoint.config)
    if shape is None:
        left_out = (LM_HEAD, *head_names(tensors))
        innermost = [name for name in tensors.names() if name not in left_out and "inv_freq" not in name]
    else:
        with torch.device("meta"):
            sources = Decoder(shape).sources()
        innermost = [name for names in sources.values() for name in names if name in present]
    if not _has_own_lm_head(checkpoint.config, tensors):
        return {name: name for name in innermost}
    return {f"model.{name}": name for name in innermost} | {LM_HEAD: LM_HEAD}


def _has_own_lm_head(config: Mapping[str, Any], tensors: TensorSource) -> bool:
    return LM_HEAD in tensors.names() and not config.get("tie_word_embeddings")


def write_tensors(file: Path, tensors: TensorSource, names: Mapping[str, str], dtype: torch.dtype) -> None:
    """Write a safetensors file (https://github.com/huggingface/safetensors#format), one tensor in memory at a time.

    The library's own writer wants all of them at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, name in names.items():
        shape = tensors.shape(name)
        for entry, part, stored in _entries(key, shape, name, dtype):
            size = math.prod(part) * stored.itemsize
            header[entry] = {"dtype": _CODES[stored], "shape": list(part), "data_offsets": [at, at + size]}
            at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for key, name in names.items():
            tensor = tensors.read(name)
            parts = [tensor]
            if len(_entries(key, tuple(tensor.shape), name, dtype)) == 2:
                parts = list(int8_rows(tensor))
            for part, (_, _, stored) in zip(parts, _entries(key, tuple(tensor.shape), name, dtype), strict=True):
                out.write(part.to("cpu", stored).contiguous().flatten().view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())


def _entries(
    key: str, shape: Sequence[int], name: str, dtype: torch.dtype
) -> list[tuple[str, Sequence[int], torch.dtype]]:
    """Return the file's entries for one tensor: key, shape, precision. An int8 matrix also has one for step sizes."""
    if dtype != torch.int8:
        return [(key, shape, dtype)]
    if len(shape) != 2 or name == EMBEDDING:
        return [(key, shape, torch.float32)]
    return [(key, shape, torch.int8), (key + STEP, shape[:1], torch.float32)]


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix [out, in] to 8-bit steps and a step size per row, [out]: weight ~ steps * size.

    The size is chosen, of a few, for the least squared error: the largest number need not be hit.
    """
    weight = weight.float()
    largest = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)  # [out]
    best = torch.full_like(largest, torch.inf)
    size = largest / 127
    for share in (1.0, 0.97, 0.94, 0.9, 0.86, 0.82):
        trial = largest * share / 127
        steps = (weight / trial[:, None]).round().clamp(-127, 127)
        error = (steps * trial[:, None] - weight).square().sum(dim=1)
        size, best = torch.where(error < best, trial, size), torch.minimum(error, best)
    return (weight / size[:, None]).round().clamp(-127, 127).to(torch.int8), size


def written_config(checkpoint: Checkpoint, settings: EncoderSettings, dtype: torch.dtype) -> dict[str, Any]:
    """Make the `config.json` of a model that is written with these settings."""
    config = {key: value for key, value in checkpoint.config.items() if key not in _NOT_OURS}
    if not Path(checkpoint.trained_as).expanduser().exists():
        config["_name_or_path"] = checkpoint.trained_as  # LLM2Vec's own package finds the chat template by it
    factors = config.get("rope_factors")
    rule = llama3_rule(float(config["rope_theta"]), factors) if factors else None
    if rule is not None:
        del config["rope_factors"]
        config["rope_scaling"] = rule
    if settings.embedding_from is not None:
        config[EMBEDDING_FROM] = settings.embedding_from
    stored = torch.float32 if dtype == torch.int8 else dtype
    return hub_config(config, settings.causal) | {"dtype": str(stored).removeprefix("torch.")}


def llama3_rule(theta: float, factors: Sequence[float]) -> dict[str, Any] | None:
    """Find the hub's RoPE rule that gives these divisors of the frequencies, if it is Llama 3's."""
    size = 2 * len(factors)
    plain = Rope(theta).frequencies(size)
    for factor in _LLAMA3_FACTORS:
        stretched = Rope(theta, "llama3", factor, 1.0, 4.0, 8192).frequencies(size)
        if torch.allclose(plain / stretched, torch.tensor(factors), rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, **_LLAMA3_RULE}
    return None


def _encoder_config(checkpoint: Checkpoint, settings: EncoderSettings) -> dict[str, Any]:
    config: dict[str, Any] = {
        "pooling_mode": settings.pooling,
        "max_length": settings.max_length,
        "doc_max_length": settings.doc_max_length,
        "skip_instruction": settings.skip_instruction,
    }
    copied = {key: checkpoint.encoder_config[key] for key in _COPIED_SETTINGS if key in checkpoint.encoder_config}
    config |= copied | ({"causal": True} if settings.causal else {})
    if settings.takes_instructions is not None:
        config["takes_instructions"] = settings.takes_instructions
    if settings.matryoshka:
        config["matryoshka"] = sorted(settings.matryoshka, reverse=True)
    if settings.head:
        config["head"] = [dict(step) for step in settings.head]
    if "prompt_style" in copied:
        return config  # no template
    template = template_for(checkpoint.trained_as, checkpoint.encoder_config)
    stored_settings = {key: value for key, value in asdict(template).items() if value}
    return config | ({"template": stored_settings} if stored_settings else {})


def write_tokenizer(
    folder: Path,
    checkpoint: Checkpoint,
    max_length: int,
    around: tuple[Sequence[int], Sequence[int]] | None = None,
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Args:
        around: ids that the post-processor adds before and after a text; by default BOS and EOS as the model has them.
    """
    ours = checkpoint.tokenizer
    # A copy: the encoder goes on using its own, which has no post-processor.
    tokenizer = Tokenizer.from_str(ours.text.to_str())
    before, after = around or (ours.prefix, ours.suffix)
    if before or after:
        tokenizer.post_processor = _adding(tokenizer, before, after)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = _special_tokens(checkpoint) | {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "model_max_length": max_length,
        "split_special_tokens": True,  # a control token that a user types is ordinary text, as it is here
    }
    write_json(folder / "tokenizer_config.json", settings)


def _adding(tokenizer: Tokenizer, prefix: Sequence[int], suffix: Sequence[int]) -> processors.TemplateProcessing:
    """Make a post-processor that adds ids before and after every text."""
    ids = dict.fromkeys((*prefix, *suffix))
    # Named by number at first, as a token's own text may hold characters that the template gives a meaning to.
    names = {token: f"special{token}" for token in ids}
    before, after = ([names[token] for token in part] for part in (prefix, suffix))
    template = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{name}:1" for name in before), "$B:1", *(f"{name}:1" for name in after)],
        special_tokens=[
            {"id": name, "ids": [token], "tokens": [tokenizer.id_to_token(token)]} for token, name in names.items()
        ],
    )
    # transformers.js reads no ids here: it looks the names up in the vocabulary.
    state = json.loads(template.__getstate__())
    own = {name: tokenizer.id_to_token(token) for token, name in names.items()}
    for piece in (*state["single"], *state["pair"]):
        if special := piece.get("SpecialToken"):
            special["id"] = own[special["id"]]
    state["special_tokens"] = {own[name]: {**entry, "id": own[name]} for name, entry in state["special_tokens"].items()}
    template.__setstate__(json.dumps(state).encode())
    return template


def _special_tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    stored_settings: dict[str, Any] = {}
    if checkpoint.tokenizer_folder is not None:
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            file = checkpoint.tokenizer_folder / name
            if file.is_file():
                stored_settings |= json.loads(file.read_text(encoding="utf-8"))
    settings = {key: stored_settings[key] for key in _TOKENIZER_SETTINGS if key in stored_settings}
    for key in _SPECIAL:
        token = stored_settings.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            settings[key] = content
    tokenizer = checkpoint.tokenizer
    for key, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if token is not None:
            settings[key] = tokenizer.text.id_to_token(token)
    if "eos_token" in settings:
        settings.setdefault("pad_token", settings["eos_token"])  # as LLM2Vec pads
    return settings


def write_json(file: Path, content: Any) -> None:
    """Write JSON as the hub's libraries do."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
