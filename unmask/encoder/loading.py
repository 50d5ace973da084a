"""Load the parts of an `Encoder` as its options say: prompts and decoder, on a device, in a precision."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unmask.checkpoint import Checkpoint, open_checkpoint
from unmask.checkpoint.modules import SENTENCE_TRANSFORMERS
from unmask.encoder.model.architectures import shape_of
from unmask.encoder.model.decoder import Decoder
from unmask.encoder.model.transformers_decoder import TransformersDecoder
from unmask.encoder.options import Compat, DtypeChoice
from unmask.encoder.pooling import POOLINGS
from unmask.encoder.prepacked import load_prepacked
from unmask.encoder.prompts import DefaultPrompts, PromptBuilder, SentencePrompts
from unmask.encoder.reference_prompts import ReferencePrompts
from unmask.encoder.runtime import kernels
from unmask.encoder.runtime.int8 import INT8_PRECISION, quantise
from unmask.encoder.runtime.linear import prepack, terms_of
from unmask.encoder.shear import Layers
from unmask.encoder.templates import template_for
from unmask.errors import CheckpointError, UsageError

# Cache key, as INT8_PRECISION.
ROUNDED_PRECISION = "bfloat16 weights, all else in float32"
SPLIT_PRECISION = "bfloat16 weights, inputs of linear layers in two bfloat16 terms, all else in float32"

# Precision of all weights; for int8, of all but the linear layers.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Everything but the name that decides how `Encoder.load` loads a model; see there for the fields.

    Raises:
        UsageError: an option has a value that does not exist, or this machine cannot compute it.
    """

    adapters: Sequence[str | Path] = ()
    layers: Layers | None = None
    compat: Compat = "default"
    pooling: str | None = None
    skip_instruction: bool | None = None
    max_length: int | None = None
    dtype: DtypeChoice = "auto"
    device: str = "cpu"
    causal: bool | None = None

    def __post_init__(self) -> None:
        if self.compat not in ("default", "reference"):
            raise UsageError(f"compat={self.compat!r}: choose 'default' or 'reference'")
        if self.dtype != "auto" and self.dtype not in _DTYPES:
            raise UsageError(f"dtype={self.dtype!r}: choose one of {', '.join(_DTYPES)}, auto")
        require_device(self.device, self.dtype)


def open_prompts(model: str | Path, options: LoadOptions) -> PromptBuilder:
    """Return the text handling of a model, without reading its weights.

    Raises: as `Encoder.load`.
    """
    return prompts_for(open_checkpoint(model, options.adapters, weights=False), options)[2]


def prompts_for(checkpoint: Checkpoint, options: LoadOptions) -> tuple[str, int, PromptBuilder]:
    """Return pooling, max_length and prompts of a model: from the options, else its own settings, else defaults."""
    config, tokenizer = checkpoint.encoder_config, checkpoint.tokenizer
    pooling = str(options.pooling or config.get("pooling_mode") or "mean")
    skip = options.skip_instruction
    skip = bool(config.get("skip_instruction", True) if skip is None else skip)
    # An explicit 0 is refused, and not read as if nothing were given.
    max_length = config.get("max_length") or 512 if options.max_length is None else options.max_length
    max_length = _require_length("max_length", max_length)
    doc_max_length = _require_length("doc_max_length", config.get("doc_max_length") or 400)
    if pooling not in POOLINGS:
        raise UsageError(f"pooling={pooling!r}: choose one of {', '.join(POOLINGS)}")
    name = checkpoint.name
    if pooling == "bos_token" and not (tokenizer.prefix and tokenizer.prefix[0] == tokenizer.bos_id):
        raise UsageError(f"pooling='bos_token' needs a model whose sequences begin with BOS; {name} adds none")
    if config.get("prompt_style") == SENTENCE_TRANSFORMERS:
        if options.compat == "reference":
            raise UsageError(f"compat='reference' reproduces LLM2Vec's package; {name} is no model of its kind")
        return pooling, max_length, _sentence_prompts(checkpoint, max_length, include_instruction=not skip)
    template = template_for(checkpoint.trained_as, config)
    eos = pooling == "eos_token"
    if eos and options.compat == "default" and tokenizer.eos_id is None:
        raise UsageError(f"pooling='eos_token' needs an end-of-sequence token; {name} names none")
    if options.compat == "reference":
        kind = str(checkpoint.config.get("model_type"))
        prompts = ReferencePrompts(tokenizer, template, max_length, doc_max_length, kind, eos, skip)
    else:
        prompts = DefaultPrompts(tokenizer, template, max_length, eos, skip)
    return pooling, max_length, prompts


def _sentence_prompts(checkpoint: Checkpoint, max_length: int, include_instruction: bool) -> SentencePrompts:
    config = checkpoint.encoder_config
    instructions, default = config.get("instructions") or {}, str(config.get("default_instruction") or "")
    try:
        return SentencePrompts(checkpoint.tokenizer, max_length, include_instruction, instructions, default)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from error


def load_decoder(checkpoint: Checkpoint, options: LoadOptions) -> tuple[nn.Module, int]:
    """Load the decoder of a checkpoint, ready to encode. Returns it and its hidden size."""
    config: dict[str, Any] = dict(checkpoint.config)
    if options.compat == "reference":
        config["sliding_window"] = None  # the reference's mask knows no window
    dtype, device, causal = _DTYPES[options.dtype], options.device, bool(options.causal)
    tensors, shape = checkpoint.tensors, shape_of(config)
    is_float32 = _uses_kernels(options) or (options.dtype == "float32" and torch.device(device).type == "cpu")
    if shape is not None and is_float32:

        def load() -> Decoder:
            with _naming(checkpoint):
                decoder = Decoder.load(shape, tensors, torch.float32, device, causal)
            checkpoint.require_unchanged()  # before they are kept under its revision
            return decoder

        return load_prepacked(checkpoint.revision, shape, dtype, causal, load), shape.hidden_size
    with _naming(checkpoint):
        if shape is not None:
            decoder, dim = Decoder.load(shape, tensors, dtype, device, causal), shape.hidden_size
        else:
            decoder = TransformersDecoder.load(config, tensors, dtype, device, causal)
            dim = int(config["hidden_size"])
    if options.dtype == "int8":
        quantise(decoder)
    prepack(decoder)
    return decoder, dim


@contextmanager
def _naming(checkpoint: Checkpoint) -> Iterator[None]:
    """Name the model in the errors of a block."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{checkpoint.name}: {error}") from error


def precision_of(decoder: nn.Module, options: LoadOptions) -> str:
    """Return the precision of a loaded decoder's linear layers, in words that change whenever its vectors do."""
    if isinstance(decoder, Decoder) and _uses_kernels(options):
        return SPLIT_PRECISION if terms_of(torch.bfloat16) else ROUNDED_PRECISION
    return INT8_PRECISION if options.dtype == "int8" else options.dtype


def _uses_kernels(options: LoadOptions) -> bool:
    """Return whether bfloat16 means linear layers in bfloat16 and everything else in float32, in the compiled kernels.

    Without the kernels it is a decoder in bfloat16, on a CPU through oneDNN.
    """
    on_cpu = torch.device(options.device).type == "cpu"
    return options.dtype == "bfloat16" and on_cpu and kernels.library() is not None


def require_device(device: str, dtype: DtypeChoice) -> None:
    """Check that this machine can compute a model in a precision on a device.

    Raises:
        UsageError: torch does not know the device or there is none, or the precision is not for it.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"device={device!r}: name a device of torch, such as cpu or cuda") from None
    if dtype == "int8" and kind != "cpu":
        raise UsageError(f"dtype='int8' is for CPUs; on {device} choose bfloat16")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device={device!r}: torch {torch.__version__} sees no GPU here; use cpu, or a torch for CUDA")


def return_memory() -> None:
    """Return the memory that loading freed to the system: glibc keeps it otherwise, 100 MB for a model of 135M."""
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _require_length(name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"{name}={value!r}: expected a positive whole number of tokens")
    return value
