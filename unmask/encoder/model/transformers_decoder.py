"""Decoders without a row in our table, run by `transformers` with `config.is_causal = False`: slower, same result."""

import copy
import math
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.checkpoint.tensors import TensorSource
from unmask.encoder.model.architectures import rope_types
from unmask.encoder.model.attention import PackLayout
from unmask.encoder.model.decoder import check_names
from unmask.errors import CheckpointError, UnsupportedArchitecture

# transformers writes floats that JSON lacks as {"__float__": "Infinity"}.
_FLOAT_TAG = "__float__"
_SPECIAL_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


class TransformersDecoder(nn.Module):
    """Any decoder of the transformers library, with the methods of `Decoder` that a runtime calls.

    With RoPE of type "dynamic" or "longrope" the angles of a batch depend on its longest sequence, and "dynamic" keeps
    those of earlier calls. So such a model (`by_length`) runs each length alone, from its initial angles, as
    transformers runs a single sequence.
    """

    def __init__(self, model: nn.Module, by_length: bool = False) -> None:
        super().__init__()
        self.model = model
        self._by_length = by_length
        self._angles_lock = threading.Lock()

    def forward(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """ids [T] and the lengths of their sequences -> final hidden states [T, W]."""
        if not self._by_length:
            return self._padded(ids, lengths)
        rows = ids.split(lengths)
        states: list[Tensor] = list(rows)
        with self._angles_lock:
            for length in sorted(set(lengths)):
                members = [i for i, other in enumerate(lengths) if other == length]
                self._reset_angles()
                hidden = self._padded(torch.cat([rows[i] for i in members]), [length] * len(members))
                for member, sequence in zip(members, hidden.split(length), strict=True):
                    states[member] = sequence
        return torch.cat(states)

    def _reset_angles(self) -> None:
        for module in self.model.modules():
            if hasattr(module, "original_max_seq_len"):
                for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                    setattr(module, name, module.original_max_seq_len)
                for name, buffer in list(module.named_buffers(recurse=False)):
                    if name.endswith("original_inv_freq"):
                        module.register_buffer(name.replace("original_", ""), buffer.clone(), persistent=False)

    def _padded(self, ids: Tensor, lengths: list[int]) -> Tensor:
        rows = ids.split(lengths)
        padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # [n, longest]
        real = torch.arange(padded.shape[1], device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
        hidden = self.model(input_ids=padded, attention_mask=real.long(), use_cache=False).last_hidden_state
        return hidden[real]  # [T, W]

    def forward_pack(self, ids: Tensor, positions: Tensor, layout: PackLayout) -> Tensor:
        """As `forward`; the model computes its own positions."""
        return self(ids.long(), layout.lengths)

    def can_capture(self) -> bool:
        """False: the padded shape depends on the lengths."""
        return False

    @classmethod
    def load(
        cls, config: Mapping[str, Any], tensors: TensorSource, dtype: torch.dtype, device: str, causal: bool = False
    ) -> "TransformersDecoder":
        """Build the model from a hub config, fill it, and prove that no causal mask is left.

        Raises:
            UnsupportedArchitecture: transformers does not know the model_type, or keeps it causal.
            CheckpointError: weights are missing, left over or of the wrong shape, or the config is not of its type.
        """
        # By their own modules: `from transformers import` makes a type checker read the modules of all models, which
        # takes it as long as a quarter of this package.
        from huggingface_hub.errors import StrictDataclassError
        from transformers.models.auto.configuration_auto import AutoConfig
        from transformers.models.auto.modeling_auto import AutoModel

        kind = config["model_type"]
        values = {
            key: value for key, value in config.items() if key not in ("model_type", "_name_or_path", "is_causal")
        }
        try:
            built = AutoConfig.for_model(kind, **_with_special_floats(values), is_causal=causal)
            model = AutoModel.from_config(built, dtype=dtype)
        except StrictDataclassError as error:
            raise CheckpointError(f"config.json is not one of {kind!r}: {' '.join(str(error).split())}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UnsupportedArchitecture(
                f"architecture {kind!r} is neither in unmask's table nor buildable with transformers: "
                f"{str(error).splitlines()[0]}"
            ) from error
        state = model.state_dict()
        unused = ("inv_freq", *(model._keys_to_ignore_on_load_unexpected or ()))
        check_names({name: [name] for name in state}, tensors, unused)
        with torch.no_grad():
            for name, target in state.items():
                if tensors.shape(name) != tuple(target.shape):
                    raise CheckpointError(
                        f"wrong shape: {name} is {list(tensors.shape(name))}, {kind} needs {list(target.shape)}"
                    )
                target.copy_(tensors.read(name))
        by_length = not rope_types(built.to_dict()).isdisjoint(("dynamic", "longrope"))
        decoder = cls(model.to(device).eval(), by_length)
        if not causal:
            decoder._require_bidirectional(kind, device)
        return decoder

    @torch.no_grad()
    def _require_bidirectional(self, kind: str, device: str) -> None:
        first = torch.tensor([1, 2, 3, 1, 2, 4], device=device)
        states = self(first, [3, 3])
        if torch.equal(states[:2], states[3:5]):
            raise UnsupportedArchitecture(
                f"architecture {kind!r} stays causal in transformers (a later token changes no earlier state), "
                "so it cannot be an encoder here"
            )
        causal = self._causal_layers(first[:3])
        if causal:
            some = ", ".join(map(str, list(causal)[:8])) + (", ..." if len(causal) > 8 else "")
            raise UnsupportedArchitecture(
                f"architecture {kind!r} stays causal in transformers in {len(causal)} layers ({some}: "
                f"{', '.join(sorted(set(causal.values())))}), so it cannot be an encoder here; a model with a causal "
                "mask by its makers' settings, or causal=True, can use it"
            )

    def _causal_layers(self, ids: Tensor) -> dict[int, str]:
        """Find layers with a part that a later token changes nothing in, but an earlier one does: number -> kind.

        The parts of a layer (attention, convolution, recurrence) are tested one by one: the state of a token depends on
        later ones as soon as any layer below reads both ways.

        Args:
            ids: three tokens.
        """
        layers = getattr(self.model, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            return {}
        calls: list[tuple[int, nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        hooks = [
            part.register_forward_pre_hook(
                lambda module, args, kwargs, number=number: calls.append((number, module, args, kwargs)),
                with_kwargs=True,
            )
            for number, layer in enumerate(layers)
            for part in layer.children()
        ]
        try:
            self(ids, [len(ids)])
        finally:
            for hook in hooks:
                hook.remove()
        types = getattr(self.model.config, "layer_types", None) or ()
        return {
            number: str(types[number]) if number < len(types) else type(part).__name__
            for number, part, args, kwargs in calls
            if _reads_back_only(part, args, kwargs)
        }


def _with_special_floats(value: Any) -> Any:
    """Return a part of a config with infinities and NaN as numbers."""
    if isinstance(value, Mapping):
        if set(value) == {_FLOAT_TAG}:
            return _SPECIAL_FLOATS.get(value[_FLOAT_TAG], value)
        return {key: _with_special_floats(item) for key, item in value.items()}
    return [_with_special_floats(item) for item in value] if isinstance(value, list) else value


def _reads_back_only(part: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True if the second of three tokens changes what a part of a layer gives for the third, but not for the first."""
    states = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if states is None or not states.is_floating_point() or states.shape[:2] != (1, 3):
        return False  # an expert layer that takes tokens one by one
    # In 16 bits, a weak recurrence is lost in the rounding.
    exact = part if states.dtype == torch.float32 else copy.deepcopy(part).float()

    def output(hidden: Tensor) -> Tensor | None:
        def replaced(value: Any) -> Any:
            return hidden if value is states else _in_float32(value)

        result = exact(*map(replaced, args), **{key: replaced(value) for key, value in kwargs.items()})
        result = result[0] if isinstance(result, tuple) else result
        return result if isinstance(result, Tensor) and result.shape[:2] == (1, 3) else None

    changed = states.float().clone()
    changed[:, 1] = changed[:, 1].flip(-1)
    before, after = output(states.float()), output(changed)
    if before is None or after is None:
        return False
    # Experts round otherwise for other groups of tokens.
    noise = 16 * torch.finfo(torch.float32).eps * float(before.abs().max())
    return torch.equal(before[:, 0], after[:, 0]) and float((before - after)[:, 2].abs().max()) > noise


def _in_float32(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_in_float32, value))
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
