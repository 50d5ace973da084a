"""`Encoder`: a model that maps text to vectors, from loading to the float32 array."""

import ctypes
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from unmask.checkpoint import Checkpoint, open_checkpoint
from unmask.encoder.head import load_head
from unmask.encoder.model.architectures import shape_of
from unmask.encoder.model.decoder import Decoder
from unmask.encoder.model.transformers_decoder import TransformersDecoder
from unmask.encoder.packing import packs_of
from unmask.encoder.pooling import POOLINGS, pool
from unmask.encoder.prefetch import prefetch
from unmask.encoder.prompts import DefaultPrompts, Prompt
from unmask.encoder.reference_prompts import ReferencePrompts
from unmask.encoder.runtime.cuda import Gpu, pipelined_map
from unmask.encoder.runtime.int8 import METHOD, quantise
from unmask.encoder.runtime.linear import Linear, num_parameters, parallel_map, prepack, unpack
from unmask.encoder.shear import Layers, shear
from unmask.encoder.templates import template_for
from unmask.errors import CheckpointError, InputError, UsageError

Compat = Literal["default", "reference"]

Dtype = Literal["float32", "bfloat16", "float16", "int8"]

_Pack = TypeVar("_Pack")
_Result = TypeVar("_Result")

# Texts that are tokenised while a GPU computes those before.
_BLOCK_TEXTS = 2048

# What the parts of a decoder other than its products are in.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}


class Encoder:
    """A text encoder. Make one with `Encoder.load`.

    Attributes:
        name: the id or path it was loaded by.
        checkpoint: the files behind it; `checkpoint.revision` is their content address.
        pooling, max_length, compat: as loaded.
        head: linear layer behind the pooling, float32 on the host; None where a vector is the pooled state.
        precision: what its products are computed in and how, in words that change when its vectors do.
        dim: length of a vector.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: nn.Module,
        prompts: DefaultPrompts | ReferencePrompts,
        *,
        pooling: str,
        max_length: int,
        compat: Compat,
        dim: int,
        precision: str = "float32",
        head: Linear | None = None,
    ) -> None:
        self.name = checkpoint.name
        self.checkpoint = checkpoint
        self._decoder = decoder
        self._decoder_lock = threading.Lock()
        self.prompts = prompts
        self.pooling = pooling
        self.max_length = max_length
        self.compat = compat
        self.precision = precision
        self.head = head
        self.dim = dim if head is None else head.out_features
        self._gpu = Gpu(decoder, pooling) if self.device.type == "cuda" else None

    def trainable_decoder(self) -> nn.Module:
        """Return the bidirectional transformer with ordinary parameters, which can be read, changed and trained.

        After loading, weights are stored prepacked for oneDNN. This converts them permanently: encoding on a CPU then
        takes 3 to 6 % longer. On a GPU no CUDA graph is used any more, so few texts take longer.
        """
        with self._decoder_lock:
            unpack(self._decoder)
            if self._gpu is not None:
                self._gpu.forget()
        return self._decoder

    def replace_decoder(self, decoder: nn.Module) -> None:
        """Encode with another decoder from now on: `decoder(ids [T], lengths)` gives hidden states [T, W]."""
        with self._decoder_lock:
            self._decoder = decoder
            if self._gpu is not None:
                self._gpu = Gpu(decoder, self.pooling)
                self._gpu.forget()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights, or of all but the products for int8."""
        return next(self._decoder.parameters()).dtype

    @property
    def num_parameters(self) -> int:
        """Number of weights of decoder and head, prepacked and 8-bit ones included."""
        return num_parameters(self._decoder) + (0 if self.head is None else num_parameters(self.head))

    @property
    def parameters(self) -> int:
        """Old name of `num_parameters`, kept for one release."""
        return self.num_parameters

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        adapters: Sequence[str | Path] = (),
        layers: Layers | None = None,
        compat: Compat = "default",
        pooling: str | None = None,
        skip_instruction: bool | None = None,
        max_length: int | None = None,
        dtype: Dtype = "float32",
        device: str = "cpu",
        causal: bool = False,
    ) -> "Encoder":
        """Load a model by id, folder or `.gguf` file.

        Args:
            model: `unmask/smollm2-135m-embed`, a hub id, a folder in the hub's layout, or a GGUF file. An adapter's
                name is enough: the base and the adapters below it are found from its configuration.
            adapters: further LoRA adapters, merged in float32 in the order given.
            layers: keep only these layers: how many from the first, or their numbers from 0.
            compat: "reference" gives the published LLM2Vec vectors, quirks included; "default" mends them.
            pooling: mean, weighted_mean, eos_token, last_token or bos_token. Left out: what the model's
                `llm2vec_config.json` says, else mean.
            skip_instruction: leave the instruction out of the pooling. Left out: as the model says, else True.
            max_length: tokens per sequence, everything counted. Left out: as the model says, else 512.
            dtype: precision of the weights; vectors are float32 in any case. "int8" computes the products on a CPU in 8
                bits, at almost twice the speed; such an encoder cannot be trained.
            device: a torch device.
            causal: keep the decoder's causal mask, to measure what removing it is worth.

        Raises:
            ModelNotFound, CheckpointError, UnsupportedArchitecture, AdapterMismatch: see `unmask.errors`.
            UsageError: an argument has a value that does not exist.
        """
        if compat not in ("default", "reference"):
            raise UsageError(f"compat={compat!r}: choose 'default' or 'reference'")
        if dtype not in _DTYPES:
            raise UsageError(f"dtype={dtype!r}: choose one of {', '.join(_DTYPES)}")
        require_device(device, dtype)
        checkpoint = open_checkpoint(model, adapters)
        if layers is not None:
            checkpoint = shear(checkpoint, layers)
        said = checkpoint.encoder_config
        pooling = str(pooling or said.get("pooling_mode") or "mean")
        skip = bool(said.get("skip_instruction", True) if skip_instruction is None else skip_instruction)
        length = _length("max_length", max_length or said.get("max_length") or 512)
        doc_length = _length("doc_max_length", said.get("doc_max_length") or 400)
        if pooling not in POOLINGS:
            raise UsageError(f"pooling={pooling!r}: choose one of {', '.join(POOLINGS)}")
        tokenizer = checkpoint.tokenizer
        if pooling == "bos_token" and not (tokenizer.prefix and tokenizer.prefix[0] == tokenizer.bos_id):
            raise UsageError(f"pooling='bos_token' needs a model whose sequences begin with BOS; {model} adds none")
        template = template_for(checkpoint.trained_as, said)
        eos = pooling == "eos_token"
        if eos and compat == "default" and tokenizer.eos_id is None:
            raise UsageError(f"pooling='eos_token' needs an end-of-sequence token; {model} names none")
        if compat == "reference":
            kind = str(checkpoint.config.get("model_type"))
            prompts = ReferencePrompts(tokenizer, template, length, doc_length, kind, eos, skip)
        else:
            prompts = DefaultPrompts(tokenizer, template, length, eos, skip)
        decoder, dim = _build(checkpoint, compat, _DTYPES[dtype], device, causal)
        if dtype == "int8":
            quantise(decoder)
        prepack(decoder)
        _return_memory()
        return cls(
            checkpoint,
            decoder,
            prompts,
            pooling=pooling,
            max_length=length,
            compat=compat,
            dim=dim,
            precision=METHOD if dtype == "int8" else dtype,
            head=load_head(checkpoint.tensors, dim),
        )

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str = "",
        normalize: bool = False,
        dimensions: int | None = None,
        truncate: bool = True,
    ) -> np.ndarray:
        """Vectors of texts, in their order.

        Args:
            texts: one text (gives one row) or many. An empty text has no vector and is an error.
            instruction: what to look for, as in "Given a web search query, retrieve relevant passages that answer
                the query:". The model reads it; it is never averaged into the vector.
            normalize: scale each vector to length 1, after `dimensions`.
            dimensions: keep only the first so many numbers of each vector (Matryoshka, arXiv 2205.13147).
            truncate: cut the end off texts that do not fit `max_length`; otherwise they are an error.

        Returns:
            float32 [n, dimensions or dim]. A text gets the same vector alone and in any batch, to 1e-5 relative.

        Raises:
            EmptyText, TextTooLong, InstructionTooLong: with the index of the text.
            UsageError: `dimensions` is out of range.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        _require_strings(texts)
        if self._gpu is None:  # nothing to gain from tokenising ahead: whoever does holds a core
            vectors = self.encode_prompts(self.prompts.build(texts, instruction, truncate))
        else:
            blocks = (
                self.prompts.build(texts[first : first + _BLOCK_TEXTS], instruction, truncate, first=first)
                for first in range(0, len(texts), _BLOCK_TEXTS)
            )
            nothing = np.empty((0, self.dim), dtype=np.float32)
            vectors = np.concatenate([nothing, *map(self.encode_prompts, prefetch(blocks))])
        return postprocess(vectors, normalize=normalize, dimensions=dimensions)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Raw vectors of prepared prompts, float32 [n, dim], in their order."""
        lengths = [len(prompt.ids) for prompt in prompts]
        packs = packs_of(lengths, self.device)
        vectors = np.empty((len(prompts), self.dim), dtype=np.float32)
        results = self.map_packs(lambda members: self.forward_pack([prompts[i] for i in members]), packs)
        for members, result in zip(packs, results, strict=True):
            vectors[members] = result
        return vectors

    def map_packs(self, function: Callable[[_Pack], _Result], packs: Sequence[_Pack]) -> list[_Result]:
        """`function` of every pack, in order, as many of them at once as suits the device."""
        return parallel_map(function, packs) if self._gpu is None else pipelined_map(function, packs)

    @torch.inference_mode()
    def forward_pack(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """One forward over all prompts given, float32 [n, dim]. Keep prompts of equal length together."""
        if self._gpu is not None:
            pooled = self._gpu.vectors(prompts)
        else:
            pooled = pool(self.states([prompt.ids for prompt in prompts]), prompts, self.pooling).cpu().numpy()
        # On the host in float32, on every device: a few hundred vectors cost less than a transfer.
        return pooled if self.head is None else self.head(torch.from_numpy(pooled)).numpy()

    @torch.inference_mode()
    def states(self, sequences: Sequence[np.ndarray]) -> Tensor:
        """Final hidden states of sequences of token ids, end to end: [T, W], in the weights' precision."""
        ids = torch.from_numpy(np.concatenate(sequences)).to(self.device)  # [T]
        return self._decoder(ids, [len(sequence) for sequence in sequences])

    def count_tokens(self, texts: str | Sequence[str], *, instruction: str = "") -> np.ndarray:
        """Tokens that each text's sequence has before any truncation: BOS, template and instruction included.

        Returns:
            int64 [n]. Compare with `max_length` to see what would be cut.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        _require_strings(texts)
        return np.array(self.prompts.lengths(texts, instruction), dtype=np.int64)


def postprocess(vectors: np.ndarray, *, normalize: bool, dimensions: int | None) -> np.ndarray:
    """Cut and scale raw vectors [n, dim] as a caller asked.

    Raises:
        UsageError: more dimensions than there are, or fewer than one.
    """
    if dimensions is not None:
        if not 1 <= dimensions <= vectors.shape[1]:
            raise UsageError(f"dimensions={dimensions}: this model's vectors have 1 to {vectors.shape[1]}")
        vectors = np.ascontiguousarray(vectors[:, :dimensions])
    if normalize:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return vectors


def _build(
    checkpoint: Checkpoint, compat: Compat, dtype: torch.dtype, device: str, causal: bool
) -> tuple[nn.Module, int]:
    config: dict[str, Any] = dict(checkpoint.config)
    if compat == "reference":
        config["sliding_window"] = None  # the reference's mask knows no window
    shape = shape_of(config)
    try:
        if shape is None:
            decoder = TransformersDecoder.load(config, checkpoint.tensors, dtype, device, causal)
            return decoder, int(config["hidden_size"])
        return Decoder.load(shape, checkpoint.tensors, dtype, device, causal), shape.hidden_size
    except CheckpointError as error:
        raise type(error)(f"{checkpoint.name}: {error}") from error


def require_device(device: str, dtype: Dtype) -> None:
    """Nothing, where a model in this precision can be computed on this device here.

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


def _return_memory() -> None:
    """Give the system back what loading took and freed: glibc keeps it otherwise, 100 MB for a model of 135M."""
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _length(name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"{name}={value!r}: expected a positive whole number of tokens")
    return value


def _require_strings(texts: Sequence[str]) -> None:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise InputError(f"input {index} is {kind}, not str; an instruction goes into instruction=...", index)
