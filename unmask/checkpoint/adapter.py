"""LoRA adapters in PEFT's format, merged into the weights they were trained for, without PEFT.

W' = W + scale * B @ A, with scale = alpha / r, or alpha / sqrt(r) when `use_rslora` is set
(LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732). All arithmetic is float32 whatever the files hold.

LLM2Vec's published adapters were made on the inner `LlamaModel`, so their keys read
`base_model.model.layers...`; adapters of a CausalLM read `base_model.model.model.layers...`. Both are accepted.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from unmask.checkpoint.adapter_config import AdapterConfig
from unmask.checkpoint.digest import file_sha256
from unmask.checkpoint.tensors import (
    EMBEDDING,
    LM_HEAD,
    TensorSource,
    innermost,
    read_pickled,
    require_finite,
    require_unquantised,
)
from unmask.errors import AdapterMismatch, CheckpointError

_HALF = re.compile(
    r"^(?P<module>.+)\.lora_(?P<half>embedding_A|embedding_B|A|B|magnitude_vector)(?:\.default)?(?:\.weight)?$"
)
_TOKENS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?$")
# Wrappers of PEFT's around a module that it writes whole.
_WRAPPERS = re.compile(r"\.(?:base_layer|token_adapter|modules_to_save(?:\.default)?)(?=\.)")


class Adapter:
    """One adapter's deltas, keyed by the innermost name of the weight they change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = AdapterConfig.read(folder)
        self.weights_file, tensors = _read_weights(folder)
        self._halves: dict[str, dict[str, torch.Tensor]] = {}
        # Tensors that replace the base's: `modules_to_save`, and an embedding that PEFT writes whole.
        self.whole: dict[str, torch.Tensor] = {}
        # Rows that replace rows of an embedding, or follow its last: ids and rows [n, hidden_size].
        self.rows: dict[str, tuple[Sequence[int], torch.Tensor]] = {}
        for key, tensor in tensors.items():
            require_unquantised(tensor, key, self.weights_file)
            require_finite(tensor, key, self.weights_file)
            name = innermost(key)
            if (match := _HALF.match(name)) is not None:
                self._require_target(key.partition(".lora_")[0].removeprefix("base_model.model."))
                half = match["half"].removeprefix("embedding_")
                self._halves.setdefault(match["module"], {})[half] = tensor
            elif (match := _TOKENS.match(name)) is not None:
                self.rows[match["module"]] = self._token_rows(match["module"], tensor)
            elif ".original_module." not in name:  # the base's own tensor, beside the one that replaces it
                self.whole[self._whole_name(name)] = tensor
        for module, halves in self._halves.items():
            self._check(module, halves)
        for module in self.config.modules_to_save:
            if module != "lm_head" and not any(f"{module}." in name for name in self.whole):
                raise AdapterMismatch(f"{self.weights_file} holds no tensor of {module}, which modules_to_save names")
        for module in self.config.token_indices:
            if module != "lm_head" and not any(name.endswith(module) for name in self.rows):
                raise AdapterMismatch(f"{self.weights_file} holds no rows of {module} for trainable_token_indices")

    def _require_target(self, module: str) -> None:
        """Refuse a LoRA weight that PEFT would leave out, since the configuration does not target its module."""
        if not self.config.targets.includes_name(module):
            raise AdapterMismatch(
                f"{self.weights_file} holds LoRA weights of {module}, which target_modules, exclude_modules and "
                "layers_to_transform in adapter_config.json do not name; the two files do not belong together"
            )

    def _whole_name(self, name: str) -> str:
        """Name of the tensor that a whole one replaces. PEFT writes embeddings undeclared, and nothing else."""
        plain = _WRAPPERS.sub("", name)
        if plain not in (EMBEDDING, LM_HEAD) and not self.config.saves_whole(plain):
            raise AdapterMismatch(
                f"{self.weights_file} holds {name!r}, which is neither a LoRA weight nor of a module that "
                "modules_to_save names; merge it with PEFT (merge_and_unload) and load the merged folder"
            )
        return plain

    def _token_rows(self, module: str, rows: torch.Tensor) -> tuple[Sequence[int], torch.Tensor]:
        indices = [ids for name, ids in self.config.token_indices.items() if module.endswith(name)]
        if len(indices) != 1 or rows.ndim != 2 or len(indices[0]) != rows.shape[0]:
            raise AdapterMismatch(
                f"{self.weights_file}: {module} has {tuple(rows.shape)} token rows, which do not fit "
                "trainable_token_indices in adapter_config.json"
            )
        return indices[0], rows

    def _check(self, module: str, halves: Mapping[str, torch.Tensor]) -> None:
        parts = {"A", "B", "magnitude_vector"} if self.config.dora else {"A", "B"}
        if set(halves) != parts:
            raise AdapterMismatch(
                f"{self.weights_file}: {module} has lora_{', lora_'.join(sorted(halves))} only; both A and B are needed"
                + (", and with use_dora the magnitude" if self.config.dora else "")
            )
        a, b = halves["A"], halves["B"]
        rank = self.config.expected_rank(module)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterMismatch(
                f"{self.weights_file}: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}, "
                f"which do not fit rank {rank} in adapter_config.json"
            )

    def digest(self) -> str:
        """Return the content address of its weights, 16 hex digits."""
        return file_sha256(self.weights_file).hex()[:16]

    @property
    def modules(self) -> Sequence[str]:
        return list(self._halves)

    def halves(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [rank, in] and B [out, rank] in float32. B is multiplied by the scale, so that `delta` is B @ A."""
        replaced = [name for name in (*self.whole, *self.rows) if not name.startswith("lm_head")]
        if self.config.dora or replaced or self._transposed(module) != self.config.fan_in_fan_out:
            raise AdapterMismatch(
                f"{self.folder} is more than LoRA on linear layers (DoRA, an embedding or whole modules), "
                "so it cannot be trained further or stacked; merge it into its base first"
            )
        halves = self._halves[module]
        a, b = halves["A"].float(), self.config.scale(module) * halves["B"].float()
        return (b.T, a.T) if self.config.fan_in_fan_out else (a, b)

    def delta(self, module: str) -> torch.Tensor:
        """Return scale * B @ A in float32, shaped like the module's weight."""
        halves = self._halves[module]
        delta = (halves["B"].float() @ halves["A"].float()).mul_(self.config.scale(module))
        return delta.T if self._transposed(module) else delta

    def _transposed(self, module: str) -> bool:
        return self.config.fan_in_fan_out or module.endswith("embed_tokens")

    def merged_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor after `merge`, from its shape before. A resized embedding has other rows."""
        module = name.removesuffix(".weight")
        if name in self.whole:
            shape = tuple(self.whole[name].shape)
        if module in self.rows and name.endswith(".weight"):
            shape = (max(shape[0], 1 + max(self.rows[module][0], default=-1)), *shape[1:])
        return shape

    def merge(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Add this adapter's change to a tensor of the base."""
        module = name.removesuffix(".weight")
        tensor = self.whole.get(name, tensor)
        if module in self._halves and name.endswith(".weight"):
            # Into the delta, which is ours: fresh memory for each sum took longer than the sum.
            tensor = self.delta(module).add_(tensor)
            magnitude = self._halves[module].get("magnitude_vector")
            if magnitude is not None:  # arXiv 2402.09353, equation 5: a length for each output
                inputs = 0 if self._transposed(module) else 1
                length = torch.linalg.norm(tensor, dim=inputs)
                tensor.mul_((magnitude.float() / length).unsqueeze(inputs))
        if module in self.rows and name.endswith(".weight"):
            ids, rows = self.rows[module]
            tensor = tensor.float()
            new = tensor.new_empty(self.merged_shape(name, tuple(tensor.shape))[0] - len(tensor), tensor.shape[1])
            tensor = torch.cat((tensor, new)).index_copy_(0, torch.tensor(ids), rows.float())
        return tensor


def _read_weights(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.is_file():
        try:
            return safe, load_file(safe)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{safe} is damaged or truncated ({error}); delete it and fetch it again") from error
    if pickled.is_file():
        return pickled, read_pickled(pickled)
    raise CheckpointError(f"{folder} holds no adapter weights: looked for {safe.name} and {pickled.name}")


class MergedTensors:
    """A tensor source with adapters added in the order given, each tensor merged as it is read.

    An adapter that was trained after `resize_token_embeddings` gives the token embedding other rows. A language head
    of another vocabulary than the embedding's is then left out.
    """

    def __init__(self, source: TensorSource, adapters: Sequence[Adapter]) -> None:
        self._source = source
        self._adapters = adapters
        self._shapes = {name: source.shape(name) for name in source.names()}
        for adapter in adapters:
            self._check_fit(adapter)
            self._shapes = {name: adapter.merged_shape(name, shape) for name, shape in self._shapes.items()}
        if LM_HEAD in self._shapes and self._shapes[LM_HEAD] != self._shapes.get(EMBEDDING):
            del self._shapes[LM_HEAD]

    def _check_fit(self, adapter: Adapter) -> None:
        made_for = f"it was made for {adapter.config.base or 'an unnamed base'}"
        modules = [module for module in adapter.modules if not self._is_absent_head(module)]
        unmatched = [module for module in modules if f"{module}.weight" not in self._shapes]
        changed = {*modules, *adapter.rows, *adapter.whole}
        if not changed or (modules and len(unmatched) == len(modules)):
            example = f" (for example {unmatched[0]!r})" if unmatched else ""
            raise AdapterMismatch(f"no tensor of the adapter {adapter.folder} matches the model{example}; {made_for}")
        if unmatched:
            raise AdapterMismatch(
                f"{len(unmatched)} of {len(modules)} modules of the adapter {adapter.folder} are not in the "
                f"model, for example {unmatched[0]!r}; {made_for}"
            )
        self._check_whole(adapter, made_for)
        for module in modules:
            self._check_module(adapter, module, made_for)
        for module, (ids, rows) in adapter.rows.items():
            if not self._is_absent_head(module):
                self._check_rows(adapter, module, ids, rows, made_for)
        self._check_targets(adapter)

    def _is_absent_head(self, module: str) -> bool:
        """True for the language head where the model has none: an encoder needs none."""
        return module == "lm_head" and LM_HEAD not in self._shapes

    def _check_whole(self, adapter: Adapter, made_for: str) -> None:
        for name, tensor in sorted(adapter.whole.items()):
            if self._is_absent_head(name.partition(".")[0]):
                continue
            if name not in self._shapes:
                raise AdapterMismatch(
                    f"{adapter.weights_file} holds {name!r}, which is neither a linear layer's LoRA weight nor a "
                    "tensor of the model; merge it with PEFT (merge_and_unload) and load the merged folder"
                )
            have, shape = self._shapes[name], tuple(tensor.shape)
            resized = name in (EMBEDDING, LM_HEAD) and shape[1:] == have[1:]
            if shape != have and not resized:
                raise AdapterMismatch(
                    f"the adapter {adapter.folder} holds {name} whole (modules_to_save) with shape {shape}, but the "
                    f"model's is {have}; {made_for}"
                )

    def _check_module(self, adapter: Adapter, module: str, made_for: str) -> None:
        halves, name = adapter._halves[module], f"{module}.weight"
        delta = (halves["B"].shape[0], halves["A"].shape[1])
        delta = delta[::-1] if adapter._transposed(module) else delta
        have = tuple(adapter.whole[name].shape) if name in adapter.whole else self._shapes[name]
        if delta != have:
            raise AdapterMismatch(
                f"the adapter {adapter.folder} changes {module} by a {delta} matrix, but the model's is {have}; "
                f"{made_for}"
            )
        magnitude = halves.get("magnitude_vector")
        outputs = have[1] if adapter._transposed(module) else have[0]
        if magnitude is not None and tuple(magnitude.shape) != (outputs,):
            raise AdapterMismatch(
                f"{adapter.weights_file}: {module} has a magnitude of shape {tuple(magnitude.shape)}, "
                f"but {outputs} outputs"
            )

    def _check_rows(self, adapter: Adapter, module: str, ids: Sequence[int], rows: torch.Tensor, made_for: str) -> None:
        name = f"{module}.weight"
        have = tuple(adapter.whole[name].shape) if name in adapter.whole else self._shapes.get(name, ())
        if len(have) != 2 or rows.shape[1] != have[1] or min(ids, default=0) < 0:
            raise AdapterMismatch(
                f"the adapter {adapter.folder} changes rows of {module} (trainable_token_indices) that the model "
                f"does not have; {made_for}"
            )
        lacking = sorted(set(range(have[0], 1 + max(ids, default=-1))) - set(ids))
        if lacking:
            raise AdapterMismatch(
                f"the adapter {adapter.folder} changes row {max(ids)} of {module} (trainable_token_indices), but the "
                f"model has {have[0]} rows and the adapter none for token {lacking[0]}; save it with "
                "save_embedding_layers=True"
            )

    def _check_targets(self, adapter: Adapter) -> None:
        present = set(adapter.modules) | {name.removesuffix(".weight") for name in adapter.whole}
        # A matrix is a linear layer or an embedding; PEFT adapts nothing else.
        matrices = (
            name.removesuffix(".weight")
            for name, shape in self._shapes.items()
            if name.endswith(".weight") and not name.startswith("lm_head.") and len(shape) == 2
        )
        lacking = sorted(
            module for module in matrices if adapter.config.targets.includes(module) and module not in present
        )
        if lacking:
            raise AdapterMismatch(
                f"{adapter.weights_file} lacks the tensors of {len(lacking)} modules that its target_modules name, for "
                f"example {lacking[0]!r}; save the adapter again, whole, or name the layers in layers_to_transform"
            )

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        for adapter in self._adapters:
            tensor = adapter.merge(name, tensor)
        return tensor
