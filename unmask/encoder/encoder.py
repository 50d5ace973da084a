"""`Encoder`: a model that maps text to vectors, from loading to the float32 array."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from unmask.checkpoint import Checkpoint, open_checkpoint
from unmask.encoder.head import Head, load_head
from unmask.encoder.load_check import run_load_checks
from unmask.encoder.loading import LoadOptions, load_decoder, precision_of, prompts_for, return_memory
from unmask.encoder.options import Compat, Dtype, DtypeChoice
from unmask.encoder.packing import packs_of
from unmask.encoder.precision import load_fastest
from unmask.encoder.precision_choices import PrecisionChoice
from unmask.encoder.prefetch import prefetch
from unmask.encoder.prompts import Prompt, PromptBuilder
from unmask.encoder.runtime import runtime_for
from unmask.encoder.runtime.linear import bits_per_weight, num_parameters, unpack
from unmask.encoder.shear import Layers, shear
from unmask.encoder.unit_length import unit_length
from unmask.errors import CheckpointError, InputError, UsageError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Texts that are tokenised while a GPU computes those before.
_BLOCK_TEXTS = 2048


class Encoder:
    """A text encoder. Make one with `Encoder.load`.

    Attributes:
        name: the id or path it was loaded by.
        checkpoint: the files behind it; `checkpoint.revision` is their content address.
        prompts: turns texts into token ids and pooled positions.
        pooling, max_length, compat: as loaded.
        causal: the decoder's causal mask is on.
        head: steps behind the pooling, float32 on the host; None where a vector is the pooled state.
        precision: precision of the decoder's linear layers, in words that change whenever its vectors do.
        dtype_choice: the `dtype` it was loaded in, and for "auto" the measurement that led to it.
        hidden_size: length of a hidden state, as `states` returns it.
        dim: length of a vector, behind the head.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: nn.Module,
        prompts: PromptBuilder,
        *,
        pooling: str,
        max_length: int,
        compat: Compat,
        dim: int,
        precision: str = "float32",
        head: Head | None = None,
        causal: bool = False,
    ) -> None:
        self.name = checkpoint.name
        self.checkpoint = checkpoint
        self.prompts = prompts
        self.pooling = pooling
        self.max_length = max_length
        self.compat = compat
        self.precision = precision
        self.dtype_choice = PrecisionChoice(precision, "as made")
        self.head = head
        self.causal = causal
        self.hidden_size = dim
        self.dim = dim if head is None else head.out_features
        self._decoder = decoder
        self._decoder_lock = threading.Lock()
        self._runtime = runtime_for(decoder, pooling, self.device)

    def trainable_decoder(self) -> nn.Module:
        """Return the bidirectional transformer with ordinary parameters, which can be read, changed and trained.

        After loading, weights are stored prepacked. This converts them permanently: encoding on a CPU then takes up to
        a third longer. On a GPU no CUDA graph is used any more, so few texts take longer.
        """
        with self._decoder_lock:
            unpack(self._decoder)
            self._runtime.allow_weight_changes()
        return self._decoder

    def replace_decoder(self, decoder: nn.Module) -> None:
        """Encode with another decoder from now on, on the same device: ids [T] and lengths -> hidden states [T, W]."""
        with self._decoder_lock:
            self._runtime = runtime_for(decoder, self.pooling, self.device)
            self._runtime.allow_weight_changes()
            self._decoder = decoder

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self._decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights; for int8 and bfloat16 on a CPU, of all but the linear layers."""
        return next(self._decoder.parameters()).dtype

    @property
    def bits_per_weight(self) -> int:
        """Bits in which the linear layers keep a weight, the most of any; fewer where they keep every number."""
        return bits_per_weight(self._decoder)

    @property
    def num_parameters(self) -> int:
        """Number of weights of decoder and head, prepacked and 8-bit ones included."""
        return num_parameters(self._decoder) + (0 if self.head is None else num_parameters(self.head))

    @property
    def prefetches(self) -> bool:
        """True if the next texts should be tokenised while the device computes."""
        return self._runtime.prefetches

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
        dtype: DtypeChoice = "auto",
        device: str = "cpu",
        causal: bool | None = None,
    ) -> "Encoder":
        """Load a model by id, folder or `.gguf` file.

        Args:
            model: `unmask/smollm2-embed-6l`, a hub id, a folder in the hub's layout, or a GGUF file. The name of an
                adapter is enough: the base and the adapters below it are found from its configuration.
            adapters: further LoRA adapters, merged in float32 in the order given.
            layers: keep only these layers: their number from the first, or their indices from 0.
            compat: "reference" gives the published LLM2Vec vectors, quirks included; "default" mends them.
            pooling: mean, weighted_mean, eos_token, last_token, first_token or bos_token. Default: from the model's
                `llm2vec_config.json` or `modules.json`, else mean.
            skip_instruction: leave the instruction out of the pooling. Default: from the model, else True.
            max_length: tokens per sequence, everything counted. Default: from the model, else 512.
            dtype: precision of the weights; vectors are float32 in any case. "auto" is the fastest on this machine
                whose vectors of 64 texts of all kinds stay within 1e-4 of float32 (1 - cosine), measured at the first
                load of a model; a rare single word may be further off. `dtype_choice` says which and why. "bfloat16"
                on a CPU rounds the weights of the linear layers, and where the processor has AMX keeps 16 bits of
                their inputs. "int8" computes the linear layers on a CPU in 8 bits: its vectors are further off, so
                auto never takes it, and such an encoder cannot be trained. Name "float32" where several machines must
                give the same vectors, and for training.
            device: a torch device.
            causal: keep the decoder's causal mask, to measure the effect of removing it; False removes it even from an
                embedding model that was trained with it. Default: as the model was made, else False.

        Raises:
            ModelNotFound, CheckpointError, UnsupportedArchitecture, AdapterMismatch: see `unmask.errors`.
            UsageError: an argument has a value that does not exist.
        """
        options = LoadOptions(
            adapters=adapters,
            layers=layers,
            compat=compat,
            pooling=pooling,
            skip_instruction=skip_instruction,
            max_length=max_length,
            dtype=dtype,
            device=device,
            causal=causal,
        )
        encoder = cls.load_with(model, options)
        run_load_checks(encoder)
        return encoder

    @classmethod
    def load_with(cls, model: str | Path, options: LoadOptions) -> "Encoder":
        """As `load`, with the options in one object."""
        checkpoint = open_checkpoint(model, options.adapters)
        if options.layers is not None:
            checkpoint = shear(checkpoint, options.layers)
        if options.causal is None:
            options = replace(options, causal=bool(checkpoint.encoder_config.get("causal", False)))
        causal = bool(options.causal)
        pooling, max_length, prompts = prompts_for(checkpoint, options)

        def load(dtype: str) -> Encoder:
            in_dtype = replace(options, dtype=cast(Dtype, dtype))
            decoder, dim = load_decoder(checkpoint, in_dtype)
            head = load_head(checkpoint.tensors, dim, checkpoint.encoder_config)
            checkpoint.require_unchanged()
            return_memory()
            return cls(
                checkpoint,
                decoder,
                prompts,
                pooling=pooling,
                max_length=max_length,
                compat=options.compat,
                dim=dim,
                precision=precision_of(decoder, in_dtype),
                head=head,
                causal=causal,
            )

        if options.dtype == "auto":
            identity = f"{checkpoint.revision}, pooling {pooling}, causal {causal}, compat {options.compat}"
            encoder, choice = load_fastest(checkpoint.name, identity, options.device, load)
        else:
            encoder, choice = load(options.dtype), PrecisionChoice(options.dtype, "as asked for")
        encoder.dtype_choice = choice
        return encoder

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
            instruction: the task, as in "Given a web search query, retrieve relevant passages that answer the query:".
                The model reads it; it is not averaged into the vector. A model in a sentence-transformers folder reads
                it as that library's `prompt`: joined to the text as it is, and pooled if the model was made so.
            normalize: scale each vector to length 1, after `dimensions`.
            dimensions: keep only the first dimensions of each vector (Matryoshka, arXiv 2205.13147).
            truncate: cut the end off texts that do not fit `max_length`; otherwise they are an error.

        Returns:
            float32 [n, dimensions or dim]. In float32 and int8 on a CPU, a text has the same bits alone and in any
            batch. On a GPU, in 16 bits, or where `transformers` runs the decoder, a batch may change the last digits;
            a float32 vector stays within 1e-5 relative.

        Raises:
            EmptyText, TextTooLong, InstructionTooLong: with the index of the text.
            UsageError: `dimensions` is out of range.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        _require_strings(texts)
        if self.prefetches:
            blocks = (
                self.prompts.build(texts[first : first + _BLOCK_TEXTS], instruction, truncate, first=first)
                for first in range(0, len(texts), _BLOCK_TEXTS)
            )
            empty = np.empty((0, self.dim), dtype=np.float32)
            vectors = np.concatenate([empty, *map(self.encode_prompts, prefetch(blocks))])
        else:
            vectors = self.encode_prompts(self.prompts.build(texts, instruction, truncate))
        return postprocess(vectors, normalize=normalize, dimensions=dimensions)

    def encode_query(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | None = None,
        normalize: bool = False,
        dimensions: int | None = None,
        truncate: bool = True,
    ) -> np.ndarray:
        """Vectors of search queries: `encode` with the model's own query instruction.

        Args:
            instruction: replaces the model's own: "query_instruction" of its `llm2vec_config.json`, or the prompt
                "query" of a sentence-transformers folder. A model without one gets none.
        """
        if instruction is None:
            instruction = self._instruction("query_instruction")
        return self.encode(
            texts, instruction=instruction, normalize=normalize, dimensions=dimensions, truncate=truncate
        )

    def encode_document(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | None = None,
        normalize: bool = False,
        dimensions: int | None = None,
        truncate: bool = True,
    ) -> np.ndarray:
        """Vectors of documents: `encode` with the model's own document instruction, which few models have.

        Args:
            instruction: replaces the model's own: "document_instruction" of its `llm2vec_config.json`, or the prompt
                "document", "passage" or "corpus" of a sentence-transformers folder. A model without one gets none.
        """
        if instruction is None:
            instruction = self._instruction("document_instruction")
        return self.encode(
            texts, instruction=instruction, normalize=normalize, dimensions=dimensions, truncate=truncate
        )

    def similarity(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Cosine similarity of every vector [n, dim] with every other [m, dim]: float32 [n, m]."""
        first, second = (unit_length(np.atleast_2d(np.asarray(x, dtype=np.float32))) for x in (first, second))
        return first @ second.T

    def _instruction(self, key: str) -> str:
        instruction = self.checkpoint.encoder_config.get(key) or ""
        if not isinstance(instruction, str):
            raise CheckpointError(f"llm2vec_config.json of {self.name} has {key}={instruction!r}; it must be a text")
        return instruction

    def encode_prompts(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Raw vectors of prepared prompts, float32 [n, dim], in their order."""
        lengths = [len(prompt.ids) for prompt in prompts]
        packs = packs_of(lengths, self.device)
        vectors = np.empty((len(prompts), self.dim), dtype=np.float32)
        results = self.map_packs(lambda members: self.forward_pack([prompts[i] for i in members]), packs)
        for members, result in zip(packs, results, strict=True):
            vectors[members] = result
        return vectors

    def map_packs(self, function: Callable[[_Item], _Result], packs: Sequence[_Item]) -> list[_Result]:
        """`function` of every pack, in order, as many at the same time as suit the device."""
        return self._runtime.map_packs(function, packs)

    @torch.inference_mode()
    def forward_pack(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """One forward over all prompts given, float32 [n, dim]. Keep prompts of equal length together.

        This is the whole way from prompts to vectors: forward and pooling on the device, then the head. The head runs
        on the host in float32 for every device: a few hundred vectors cost less than a transfer.
        """
        pooled = self._runtime.pooled_states(prompts)  # [N, W]
        return pooled if self.head is None else self.head(torch.from_numpy(pooled)).numpy()

    @torch.inference_mode()
    def states(self, sequences: Sequence[np.ndarray]) -> Tensor:
        """Final hidden states of sequences of token ids, end to end: [T, W], in the weights' precision."""
        ids = torch.from_numpy(np.concatenate(sequences)).to(self.device)  # [T]
        return self._decoder(ids, [len(sequence) for sequence in sequences])

    def count_tokens(self, texts: str | Sequence[str], *, instruction: str = "") -> np.ndarray:
        """Tokens of each text's sequence before any truncation: BOS, template and instruction included.

        Returns:
            int64 [n]. Whatever exceeds `max_length` would be cut.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        _require_strings(texts)
        return np.array(self.prompts.lengths(texts, instruction), dtype=np.int64)


def check_dimensions(dimensions: int | None, dim: int) -> None:
    """Refuse a number of dimensions that vectors of `dim` cannot be cut to; None leaves them whole.

    Raises:
        UsageError: `dimensions` is not between 1 and dim.
    """
    if dimensions is not None and not 1 <= dimensions <= dim:
        raise UsageError(f"dimensions={dimensions}: this model's vectors have 1 to {dim}")


def postprocess(vectors: np.ndarray, *, normalize: bool, dimensions: int | None) -> np.ndarray:
    """Cut raw vectors [n, dim] to `dimensions`, then scale them to length 1 if `normalize`.

    Raises:
        UsageError: as `check_dimensions`.
    """
    check_dimensions(dimensions, vectors.shape[1])
    if dimensions is not None:
        vectors = np.ascontiguousarray(vectors[:, :dimensions])
    return unit_length(vectors) if normalize else vectors


def _require_strings(texts: Sequence[str]) -> None:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise InputError(f"input {index} is {kind}, not str; an instruction goes into instruction=...", index)
