"""The model under training: an encoder whose decoder takes gradients, in the precision the run computes in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.checkpoint.adapter import Adapter
from unmask.checkpoint.resolve import resolve
from unmask.checkpoint.shipped import SHIPPED
from unmask.encoder import Encoder
from unmask.encoder.head import Head
from unmask.encoder.model.decoder import Decoder, Layer
from unmask.encoder.pooling import pool
from unmask.encoder.prompts import DefaultPrompts, Prompt
from unmask.errors import UnsupportedArchitecture, UsageError
from unmask.training.device import compute_dtype
from unmask.training.distributed import Processes
from unmask.training.head import linear_head
from unmask.training.lora import LoraLinear, add_lora, load_adapter
from unmask.training.master_weights import MasterLinear, use_master_weights
from unmask.training.recipe import Recipe
from unmask.training.sharding import group_by_kind, shard

# A pack is filled up to a multiple of _ROWS tokens, with sequences of at most _FILLING tokens.
_ROWS, _FILLING = 64, 16


class TrainingModel:
    """The model that an objective trains: an encoder whose parameters are updated.

    Attributes:
        encoder: the encoder. Its vectors are those of the current weights.
        adapted: layers with adapters; empty in full fine-tuning.
        parameters: the parameters that the optimiser updates, by name, float32.
        head: the linear layer after the pooling, or the base's own steps, if the model has any.
        exit_heads: the head of each early exit, by its number of layers.
        sharded: the weights are sharded over the processes, so all must run equally many forwards.
    """

    def __init__(self, recipe: Recipe, device: torch.device, processes: Processes | None = None) -> None:
        self.processes = processes or Processes()
        self.sharded = bool(recipe.shard) and self.processes.size > 1
        self.encoder = Encoder.load(
            recipe.base,
            adapters=recipe.adapters,
            layers=recipe.layers,
            pooling=recipe.pooling,
            max_length=recipe.max_length,
            device=str(device),
            causal=recipe.causal,
            dtype="float32",
        )
        decoder = self.encoder.trainable_decoder()
        if not isinstance(decoder, Decoder):
            kind = self.encoder.checkpoint.config.get("model_type")
            raise UnsupportedArchitecture(
                f"{recipe.base} is a {kind}, which has no row in unmask.encoder.model.architectures; "
                "it cannot be trained"
            )
        self.decoder, self.device = decoder, device
        self.dtype = compute_dtype(recipe.precision, device)
        self.seed, self.forward_tokens = recipe.seed, recipe.batch.forward_tokens
        self.graph_tokens = recipe.batch.graph_tokens or recipe.batch.forward_tokens
        torch.manual_seed(recipe.seed)
        self.adapted: list[LoraLinear] = []
        if recipe.lora is not None:
            self.adapted = add_lora(decoder, recipe.lora, self.dtype, unmerged=self.sharded)
            if recipe.lora.init_from is not None:
                load_adapter(
                    self.adapted, initial_adapter(recipe.lora.init_from, recipe.base, recipe.adapters), recipe.lora
                )
        elif recipe.freeze_embedding:
            decoder.embedding.requires_grad_(False)
        self.master_layers: list[MasterLinear] = []
        if recipe.lora is None and self.dtype != torch.float32 and not self.sharded:
            self.master_layers = use_master_weights(decoder, self.dtype)
        if recipe.objective == "simcse":
            for layer in decoder.layers:
                assert isinstance(layer, Layer)
                layer.attention_dropout = recipe.simcse.attention_dropout
        decoder.checkpointing = recipe.gradient_checkpointing
        if self.sharded:
            shard(decoder, device, self.processes, within_machines=recipe.shard == "machine")
        # Frozen ones too. Taken later, sharded ones could be the gathered copies of a forward.
        self._decoder_parameters = dict(decoder.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in self._decoder_parameters.items() if parameter.requires_grad
        }
        self.head: nn.Linear | Head | None = None
        self.exit_heads: dict[int, nn.Linear] = {}
        deepest = max((each.layers for each in recipe.exits), default=0)
        if deepest >= len(decoder.layers):
            raise UsageError(
                f"exits: {deepest} layers, but the model has {len(decoder.layers)}; an exit needs fewer than the model"
            )
        self.average: dict[str, Tensor] = {}
        self._ema = recipe.ema
        self._set_head_of_base()

    def _set_head_of_base(self) -> None:
        """Take over the base's head, which is not trained."""
        own = self.encoder.head
        if own is not None and own.linear is not None:
            weight, bias = own.linear.plain_weight(), own.linear.bias
            self.set_head(linear_head(weight.numpy(), bias.detach().numpy(), self.device), trained=False)
        elif own is not None:
            self.head = own.trainable(self.device)

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return self.encoder.dim if self.head is None else self.head.out_features

    @property
    def depths(self) -> int:
        """Number of models that one forward trains: the full depth and each exit."""
        return 1 + len(self.exit_heads)

    def set_head(self, head: nn.Linear, trained: bool) -> None:
        """Set the linear layer after the pooling."""
        self.head = head
        self._train_head("head", head, trained)

    def set_exit_head(self, layers: int, head: nn.Linear, trained: bool) -> None:
        """Set the head of the early exit after `layers` layers."""
        self.exit_heads[layers] = head
        self._train_head(f"head.exit{layers}", head, trained)

    def _train_head(self, name: str, head: nn.Linear, trained: bool) -> None:
        head.requires_grad_(trained)
        own = {f"{name}.{part}": parameter for part, parameter in head.named_parameters()}
        self.parameters = {n: p for n, p in self.parameters.items() if n not in own} | (own if trained else {})

    def trained_decoder(self) -> dict[str, Tensor]:
        """Return every parameter of the decoder by name, frozen ones too."""
        return dict(self._decoder_parameters)

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the exponential moving average of the parameters."""
        if self._ema is None:
            return
        if not self.average:
            self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            return
        for names in group_by_kind(self.parameters):
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]: torch has no public name for it
                [self.average[name] for name in names],
                [self.parameters[name].detach() for name in names],
                1 - self._ema,
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the moving average as parameters inside the block. Does nothing without `ema`."""
        if not self.average:
            yield
            return
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self._set(self.average)
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        self.merge()

    def merge(self) -> None:
        """Bring the weights that the forward uses up to date. Call it after every update of the parameters."""
        for linear in self.adapted:
            linear.merge()
        for layer in self.master_layers:
            layer.refresh()

    def prompts(self, texts: Sequence[str], instruction: str, max_length: int | None = None) -> list[Prompt]:
        """Build prompts, truncated to `max_length` or the run's length. A text without a token is an error."""
        builder = self.encoder.prompts
        assert isinstance(builder, DefaultPrompts)
        return (builder.at_most(max_length) if max_length else builder).build(texts, instruction)

    def hidden(self, sequences: Sequence[np.ndarray]) -> Tensor:
        """Forward a pack: hidden states [T, hidden_size], with gradients."""
        ids, lengths = np.concatenate(sequences), [len(sequence) for sequence in sequences]
        filling = self._filling(len(ids))
        filled = torch.from_numpy(np.concatenate((ids, np.zeros(sum(filling), ids.dtype)))).to(self.device)
        with self._autocast():
            return self.decoder(filled, lengths + filling)[: len(ids)]

    def _filling(self, tokens: int) -> list[int]:
        """Lengths of the sequences that fill up a pack. Their states are not used.

        oneDNN compiles a kernel for every number of rows of a product. With any number of tokens a pack, a step spent
        more time in its compiler than in its kernels.
        """
        missing = -tokens % _ROWS if self.master_layers and self.device.type == "cpu" else 0
        return [_FILLING] * (missing // _FILLING) + ([missing % _FILLING] if missing % _FILLING else [])

    def vectors(self, prompts: Sequence[Prompt]) -> Tensor:
        """Compute the vectors of one pack, float32 [n, dimensions], with gradients."""
        pooled = self.pooled(prompts)
        return pooled if self.head is None else self.head(pooled)

    def vectors_of_depths(self, prompts: Sequence[Prompt]) -> Tensor:
        """Compute the vectors of the full depth and of each exit, side by side, float32 [n, depths * dimensions]."""
        if not self.exit_heads:
            return self.vectors(prompts)
        states, exit_states = self._states_after(prompts, tuple(self.exit_heads))
        pooled = [pool(each, prompts, self.encoder.pooling) for each in (states, *exit_states)]
        heads = [self.head, *self.exit_heads.values()]
        return torch.cat([each if head is None else head(each) for head, each in zip(heads, pooled, strict=True)], 1)

    def pooled(self, prompts: Sequence[Prompt], layers: int | None = None) -> Tensor:
        """Compute the pooled states of one pack, before the head, float32 [n, hidden_size], with gradients.

        Args:
            layers: number of layers after which the decoder is cut; default: all.
        """
        if layers is None:
            return pool(self.hidden([prompt.ids for prompt in prompts]), prompts, self.encoder.pooling)
        _, (states,) = self._states_after(prompts, (layers,))
        return pool(states, prompts, self.encoder.pooling)

    def _states_after(self, prompts: Sequence[Prompt], layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """States [T, hidden_size] of the whole decoder, and of the decoder cut after each number of layers."""
        by_layer: dict[int, Tensor] = {}

        def hook(count: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            return lambda _layer, _inputs, states: by_layer.update({count: _snapshot(states)})

        hooks = [self.decoder.layers[count - 1].register_forward_hook(hook(count)) for count in layers]
        try:
            states = self.hidden([prompt.ids for prompt in prompts])
        finally:
            for handle in hooks:
                handle.remove()
        with self._autocast():
            return states, [self.decoder.norm(by_layer[count][: len(states)]) for count in layers]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Encode texts to unit vectors, float32 [n, dimensions].

        Each process computes its share and gets all vectors. All processes must call it with the same texts.
        """
        return F.normalize(self._encode(texts, instruction, self.vectors, self.dimensions), dim=1).cpu().numpy()

    @torch.no_grad()
    def encode_depths(self, texts: Sequence[str], instruction: str = "") -> list[np.ndarray]:
        """Encode texts to unit vectors of the full depth and of each exit, in the way of `encode`."""
        vectors = self._encode(texts, instruction, self.vectors_of_depths, self.depths * self.dimensions)
        return [F.normalize(each, dim=1).cpu().numpy() for each in vectors.split(self.dimensions, dim=1)]

    @torch.no_grad()
    def encode_pooled(self, texts: Sequence[str], layers: int | None = None) -> np.ndarray:
        """Compute the pooled states of texts before the head, float32 [n, hidden_size], in the way of `encode`.

        Args:
            layers: number of layers after which the decoder is cut; default: all.
        """

        def forward(prompts: Sequence[Prompt]) -> Tensor:
            return self.pooled(prompts, layers)

        return self._encode(texts, "", forward, self.decoder.shape.hidden_size).cpu().numpy()

    def _encode(
        self, texts: Sequence[str], instruction: str, forward: Callable[[Sequence[Prompt]], Tensor], dimensions: int
    ) -> Tensor:
        prompts = self.prompts(texts, instruction)
        micro_batches = self.micro_batches([len(prompt.ids) for prompt in prompts])
        parts = [torch.empty(0, dimensions, device=self.device)]
        # A process without work computes one text that does not count, as in `vectors_of`.
        parts += [
            forward([prompts[i] for i in micro_batch] or prompts[:1])[: len(micro_batch)]
            for micro_batch in micro_batches
        ]
        return self.processes.gather(
            torch.cat(parts), [i for micro_batch in micro_batches for i in micro_batch], len(prompts)
        )

    def vectors_of(self, prompts: Sequence[Prompt], chosen: Sequence[int]) -> Tensor:
        """Vectors of some prompts, float32 [n, depths * W], with gradients; of none at the price of one."""
        return self.vectors_of_depths([prompts[i] for i in chosen] or [prompts[0]])[: len(chosen)]

    def micro_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Split this process's share of a batch into micro-batches, one for each forward.

        Sharded, all processes have as many as the busiest one; the surplus ones are empty.
        """
        packs_of = [
            [[own[i] for i in pack] for pack in self.packs([lengths[i] for i in own])]
            for own in self.processes.shares(lengths)
        ]
        own = packs_of[self.processes.rank]
        busiest = max(len(packs) for packs in packs_of)
        return own + [[] for _ in range(busiest - len(own))] if self.sharded else own

    def packs(self, lengths: Sequence[int]) -> list[list[int]]:
        """Split sequences into micro-batches of about equal size, none above the recipe's `forward_tokens`.

        Equal lengths lie side by side, since they share an attention call.
        """
        count = max(1, -(-sum(lengths) // self.forward_tokens))
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        packs: list[list[int]] = [[] for _ in range(count)]
        tokens = [0] * count
        for index in order:
            lightest = min(range(len(packs)), key=tokens.__getitem__)
            if tokens[lightest] + lengths[index] > self.forward_tokens and packs[lightest]:
                packs.append([])
                tokens.append(0)
                lightest = len(packs) - 1
            packs[lightest].append(index)
            tokens[lightest] += lengths[index]
        return [pack for pack in packs if pack]

    def _autocast(self) -> AbstractContextManager:
        # Adapted and master layers have their weights in the compute precision; only sharded float32 ones have not.
        if self.adapted or self.master_layers or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def _snapshot(states: Tensor) -> Tensor:
    # Without gradients the next layer adds to the residual stream in place, where its update has another precision.
    return states if torch.is_grad_enabled() else states.clone()


def adapter_base(base: str, adapters: Sequence[str]) -> str:
    """Return the name that a trained adapter states as its base, so that its own name is enough to load it.

    It is the last adapter below it, if that one leads to all the others; else the decoder.

    Args:
        base: the recipe's base.
        adapters: the recipe's adapters.
    """
    name = base
    if adapters:
        full, last = resolve(base, adapters), resolve(adapters[-1])
        if (full.base, full.adapters) == (last.base, last.adapters):
            name = adapters[-1]
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in SHIPPED and path.exists() else name


def embedding_base(base: str) -> str:
    """Return the name of the model that holds the token embedding of a base.

    A folder written without an embedding states this name.
    """
    location = resolve(base)
    while location.embedding is not None:
        location = location.embedding
    path = Path(location.name).expanduser()
    return str(path.absolute()) if location.name not in SHIPPED and path.exists() else location.name


def initial_adapter(name: str, base: str, adapters: Sequence[str]) -> Adapter:
    """Open the adapter that a run trains further.

    Args:
        name: `lora.init_from`.
        base: the recipe's base.
        adapters: the recipe's adapters.

    Raises:
        UsageError: it was not trained on this run's base.
    """
    start, below = resolve(name), resolve(base, adapters)
    if not start.adapters:
        raise UsageError(f"lora.init_from: {name} is a whole model, not an adapter; make it the base instead")
    if (start.base, start.adapters[:-1]) != (below.base, below.adapters):
        trained_on = " + ".join(str(path) for path in (start.base, *start.adapters[:-1]))
        raise UsageError(f"lora.init_from: {name} was trained on {trained_on}, not on this run's base {base}")
    return Adapter(start.adapters[-1])
