"""LoRA adapters in PEFT's format, merged into the weights they were trained for, without PEFT.

W' = W + scale * B @ A, with scale = alpha / r, or alpha / sqrt(r) when `use_rslora` is set
(LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732). All arithmetic is float32 whatever the files hold.

LLM2Vec's published adapters were made on the inner `LlamaModel`, so their keys read
`base_model.model.layers...`; adapters of a CausalLM read `base_model.model.model.layers...`. Both are accepted.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unmask.checkpoint.tensors import TensorSource, innermost, read_pickled, require_finite
from unmask.errors import AdapterMismatch, CheckpointError

_HALF = re.compile(
    r"^(?P<module>.+)\.lora_(?P<half>embedding_A|embedding_B|A|B|magnitude_vector)(?:\.default)?(?:\.weight)?$"
)
_TOKENS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?$")

# Values of `init_lora_weights` that leave the base as it is; a test runs PEFT's own code for each. EVA chooses A from
# the activations, and ranks by layer, which are saved as `rank_pattern` and `alpha_pattern`. The others (pissa, olora,
# corda, loftq, lora_ga) change the base before training, so B @ A does not belong to the base that is named.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

# Every field of PEFT's LoraConfig. Honoured: read below.
HONOURED_FIELDS = frozenset(
    {
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "base_model_name_or_path",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "use_dora",
        "trainable_token_indices",
        "init_lora_weights",
        "peft_type",
        "bias",
        "lora_bias",
    }
)
# Harmless: they concern training, a class to load the adapter with, or settings of an initialisation.
HARMLESS_FIELDS = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "velora_config",
    }
)
# Refused by name where they are set: each changes what a layer computes.
REFUSED_FIELDS = frozenset(
    {
        "layer_replication",
        "target_parameters",
        "alora_invocation_tokens",
        "use_qalora",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
        "megatron_config",
    }
)


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of `adapter_config.json` that decide the change of each weight."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool
    base: str | None
    targets: "TargetModules"
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Read and check `adapter_config.json`.

        Raises:
            CheckpointError: not there, not JSON, or a field is of the wrong type.
            AdapterMismatch: a kind of adapter that would change the result if it were ignored.
        """
        file = folder / "adapter_config.json"
        try:
            raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            config = cls(
                rank=int(raw["r"]),
                alpha=float(raw["lora_alpha"]),
                rslora=bool(raw.get("use_rslora")),
                rank_pattern={str(k): int(v) for k, v in (raw.get("rank_pattern") or {}).items()},
                alpha_pattern={str(k): float(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
                fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
                base=raw.get("base_model_name_or_path"),
                targets=TargetModules.of(raw),
                dora=bool(raw.get("use_dora")),
                modules_to_save=tuple(raw.get("modules_to_save") or ()),
                token_indices=_token_indices(raw.get("trainable_token_indices")),
            )
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder} is not an adapter: it has no adapter_config.json") from error
        except KeyError as error:
            raise CheckpointError(f"{file} has no {error.args[0]!r}; it describes no LoRA adapter") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a usable adapter configuration: {error}") from error
        kind = raw.get("peft_type") or "LORA"
        init = raw.get("init_lora_weights", True)
        unsupported = {
            f"peft_type {kind}": str(kind).upper() != "LORA",
            "trained biases (bias)": raw.get("bias", "none") not in (None, "none"),
            "LoRA biases (lora_bias)": raw.get("lora_bias"),
            f"init_lora_weights={init!r}, which changes the base before training": init not in _PLAIN_INITS,
            "DoRA (use_dora) with fan_in_fan_out": config.dora and config.fan_in_fan_out,
            **{name: raw.get(name) for name in sorted(REFUSED_FIELDS)},
            **{
                f"the unknown setting {name}": value
                for name, value in raw.items()
                if name not in HONOURED_FIELDS | HARMLESS_FIELDS | REFUSED_FIELDS
            },
        }
        named = [name for name, present in unsupported.items() if present]
        if named:
            raise AdapterMismatch(
                f"{file} uses {' and '.join(named)}, which unmask does not merge; "
                "merge it with PEFT (merge_and_unload) and load the merged folder"
            )
        if config.rank < 1 or any(rank < 1 for rank in config.rank_pattern.values()):
            raise CheckpointError(f"{file} has rank r={config.rank}; it must be at least 1")
        return config

    def scale(self, module: str) -> float:
        """The factor on B @ A for one module, by its innermost name."""
        rank = _by_pattern(self.rank_pattern, module, self.rank)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def expected_rank(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))


@dataclass(frozen=True)
class TargetModules:
    """The modules that an adapter's configuration targets, by PEFT's rules.

    Attributes:
        modules: a regular expression for a whole name, or ends of names.
        excluded: as `modules`, and stronger.
        layers: layers that are adapted; None for all.
        patterns: names of the list of layers, where `layers` is given.
    """

    modules: str | tuple[str, ...]
    excluded: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    patterns: tuple[str, ...] = ()

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "TargetModules":
        layers, patterns = raw.get("layers_to_transform"), raw.get("layers_pattern") or ()
        return cls(
            _names(raw.get("target_modules")),
            _names(raw.get("exclude_modules")),
            None if layers is None or layers == [] else (layers,) if isinstance(layers, int) else tuple(layers),
            (patterns,) if isinstance(patterns, str) else tuple(patterns),
        )

    def includes(self, module: str) -> bool:
        """True if PEFT adapts this module. Adapters of an inner model and of a CausalLM name it differently."""
        return any(self._includes(name) for name in (module, f"model.{module}"))

    def _includes(self, name: str) -> bool:
        if _matches(self.excluded, name) or not _matches(self.modules, name):
            return False
        if self.layers is None or isinstance(self.modules, str):
            return True
        patterns = self.patterns or (r"[^.]*",)
        matches = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)
        number = next((int(match[1]) for match in matches if match), None)
        return number in self.layers


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(str(name) for name in value or ())


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _token_indices(value: Any) -> Mapping[str, Sequence[int]]:
    by_module = value if isinstance(value, dict) else {"embed_tokens": value} if value else {}
    return {str(module): tuple(map(int, indices)) for module, indices in by_module.items()}


def _by_pattern(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    # PEFT: a key is a regular expression for the end of the module's name, with anything before a dot.
    # A pattern written for the wrapped name (`model.layers...`) is matched against that name too.
    for pattern, value in patterns.items():
        for name in (module, f"model.{module}"):
            if re.match(rf"(?:.*\.)?(?:{pattern})$", name):
                return value
    return otherwise


class Adapter:
    """One adapter's deltas, keyed by the innermost name of the weight they change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = AdapterConfig.read(folder)
        self.weights_file, tensors = _read_weights(folder)
        self._halves: dict[str, dict[str, torch.Tensor]] = {}
        # Tensors that replace the base's: `modules_to_save`, and an embedding that PEFT writes whole.
        self.whole: dict[str, torch.Tensor] = {}
        # Rows that replace rows of an embedding: ids and rows [n, hidden_size].
        self.rows: dict[str, tuple[Sequence[int], torch.Tensor]] = {}
        for key, tensor in tensors.items():
            require_finite(tensor, key, self.weights_file)
            name = innermost(key)
            if (match := _HALF.match(name)) is not None:
                half = match["half"].removeprefix("embedding_")
                self._halves.setdefault(match["module"], {})[half] = tensor
            elif (match := _TOKENS.match(name)) is not None:
                self.rows[match["module"]] = self._token_rows(match["module"], tensor)
            elif name.startswith("lm_head."):
                continue  # an encoder has no language head
            else:
                self.whole[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = tensor
        for module, halves in self._halves.items():
            self._check(module, halves)
        for module in self.config.modules_to_save:
            if module != "lm_head" and not any(re.search(rf"(^|\.){module}\.", name) for name in self.whole):
                raise AdapterMismatch(f"{self.weights_file} holds no tensor of {module}, which modules_to_save names")
        for module in self.config.token_indices:
            if module != "lm_head" and not any(name.endswith(module) for name in self.rows):
                raise AdapterMismatch(f"{self.weights_file} holds no rows of {module} for trainable_token_indices")

    def _token_rows(self, module: str, rows: torch.Tensor) -> tuple[Sequence[int], torch.Tensor]:
        indices = [ids for name, ids in self.config.token_indices.items() if module.endswith(name)]
        if len(indices) != 1 or rows.ndim != 2 or len(indices[0]) != rows.shape[0]:
            raise AdapterMismatch(
                f"{self.weights_file}: {module} has {tuple(rows.shape)} token rows, which do not fit "
                "trainable_token_indices in adapter_config.json"
            )
        return indices[0], rows

    def _check(self, module: str, halves: Mapping[str, torch.Tensor]) -> None:
        parts = {"A", "B", "magnitude_vector"} if self.config.dora and module != "embed_tokens" else {"A", "B"}
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
        """Content address of its weights, 16 hex digits."""
        with self.weights_file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    @property
    def modules(self) -> Sequence[str]:
        return list(self._halves)

    def halves(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [rank, in] and B [out, rank] in float32. B is multiplied by the scale, so that `delta` is B @ A."""
        if self.config.dora or self.whole or self.rows or self._transposed(module) != self.config.fan_in_fan_out:
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

    def merge(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Add this adapter's change to a tensor of the base."""
        module = name.removesuffix(".weight")
        tensor = self.whole.get(name, tensor)
        if module in self._halves and name.endswith(".weight"):
            # Into the delta, which is ours: fresh memory for each sum took longer than the sum.
            tensor = self.delta(module).add_(tensor)
            magnitude = self._halves[module].get("magnitude_vector")
            if magnitude is not None:  # arXiv 2402.09353, equation 5
                tensor.mul_((magnitude.float() / torch.linalg.norm(tensor, dim=1)).unsqueeze(1))
        if module in self.rows and name.endswith(".weight"):
            ids, rows = self.rows[module]
            tensor = tensor.float().index_copy(0, torch.tensor(ids), rows.float())
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
    """A tensor source with adapters added in the order given, each tensor merged as it is read."""

    def __init__(self, source: TensorSource, adapters: Sequence[Adapter]) -> None:
        self._source = source
        self._adapters = adapters
        names = set(source.names())
        for adapter in adapters:
            self._check_fit(adapter, names)

    def _check_fit(self, adapter: Adapter, names: set[str]) -> None:
        made_for = f"it was made for {adapter.config.base or 'an unnamed base'}"
        unmatched = [module for module in adapter.modules if f"{module}.weight" not in names]
        changed = {*adapter.modules, *adapter.rows, *adapter.whole}
        if not changed or (adapter.modules and len(unmatched) == len(adapter.modules)):
            example = f" (for example {unmatched[0]!r})" if unmatched else ""
            raise AdapterMismatch(f"no tensor of the adapter {adapter.folder} matches the model{example}; {made_for}")
        if unmatched:
            raise AdapterMismatch(
                f"{len(unmatched)} of {len(adapter.modules)} modules of the adapter {adapter.folder} are not in the "
                f"model, for example {unmatched[0]!r}; {made_for}"
            )
        odd = sorted({name for name in adapter.whole if name not in names})
        if odd:
            raise AdapterMismatch(
                f"{adapter.weights_file} holds {odd[0]!r}, which is neither a linear layer's LoRA weight nor a tensor "
                "of the model; merge it with PEFT (merge_and_unload) and load the merged folder"
            )
        for name, tensor in adapter.whole.items():
            have = self._source.shape(name)
            if tuple(tensor.shape) != have:
                raise AdapterMismatch(
                    f"the adapter {adapter.folder} holds {name} whole (modules_to_save) with shape "
                    f"{tuple(tensor.shape)}, but the model's is {have}; if its vocabulary was resized, merge it with "
                    "PEFT (merge_and_unload), save the tokenizer beside it and load the merged folder"
                )
        for module in adapter.modules:
            halves = adapter._halves[module]
            delta = (halves["B"].shape[0], halves["A"].shape[1])
            delta = delta[::-1] if adapter._transposed(module) else delta
            have = self._source.shape(f"{module}.weight")
            if delta != have:
                raise AdapterMismatch(
                    f"the adapter {adapter.folder} changes {module} by a {delta} matrix, but the model's is {have}; "
                    f"{made_for}"
                )
            magnitude = halves.get("magnitude_vector")
            if magnitude is not None and tuple(magnitude.shape) != have[:1]:
                raise AdapterMismatch(
                    f"{adapter.weights_file}: {module} has a magnitude of shape {tuple(magnitude.shape)}, "
                    f"but {have[0]} rows"
                )
        for module, (ids, rows) in adapter.rows.items():
            have = self._source.shape(f"{module}.weight") if f"{module}.weight" in names else ()
            if len(have) != 2 or rows.shape[1] != have[1] or not all(0 <= token < have[0] for token in ids):
                raise AdapterMismatch(
                    f"the adapter {adapter.folder} changes rows of {module} (trainable_token_indices) that the model "
                    f"does not have; {made_for}"
                )
        self._check_targets(adapter, names)

    def _check_targets(self, adapter: Adapter, names: set[str]) -> None:
        present = set(adapter.modules) | {name.removesuffix(".weight") for name in adapter.whole}
        # A matrix is a linear layer or an embedding; PEFT adapts nothing else.
        matrices = (
            name.removesuffix(".weight")
            for name in names
            if name.endswith(".weight") and not name.startswith("lm_head.") and len(self._source.shape(name)) == 2
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
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        for adapter in self._adapters:
            tensor = adapter.merge(name, tensor)
        return tensor
