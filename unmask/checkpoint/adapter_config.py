"""`adapter_config.json` of a LoRA adapter: every setting of PEFT's `LoraConfig` is honoured, harmless, or refused."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from unmask.errors import AdapterMismatch, CheckpointError

# Value of `target_modules` for every linear layer but the language head.
_ALL_LINEAR = "all-linear"

# Values of `init_lora_weights` that leave the base as it is; a test runs PEFT's own code for each. EVA chooses A from
# the activations, and ranks by layer, which are saved as `rank_pattern` and `alpha_pattern`. The others (pissa, olora,
# corda, loftq, lora_ga) change the base before training, so B @ A does not belong to the base that is named.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

Treatment = Literal["honoured", "harmless", "refused"]

# Every field of PEFT's LoraConfig: honoured, harmless (it changes no vector of a trained adapter), or refused by name
# where it is set, since it changes what a layer computes. docs/models.md shows this table; tests compare it with PEFT
# and with the page.
LORA_FIELDS: Mapping[str, tuple[Treatment, str]] = {
    "r": ("honoured", "rank; a whole number of at least 1"),
    "lora_alpha": ("honoured", "scale: B A is multiplied by alpha / r"),
    "use_rslora": ("honoured", "scale by alpha / sqrt(r)"),
    "rank_pattern": ("honoured", "ranks by regular expression for the end of a module's name"),
    "alpha_pattern": ("honoured", "alphas by regular expression, likewise"),
    "fan_in_fan_out": ("honoured", "weights that are stored transposed; refused together with DoRA"),
    "base_model_name_or_path": ("honoured", "the base, or the adapter below"),
    "target_modules": (
        "honoured",
        "ends of names, a regular expression, or `all-linear`; tensors for each are required",
    ),
    "exclude_modules": ("honoured", "as `target_modules`, and stronger"),
    "layers_to_transform": ("honoured", "layers that have tensors"),
    "layers_pattern": ("honoured", "name of the list of layers"),
    "modules_to_save": ("honoured", "whole modules, which replace the base's"),
    "use_dora": ("honoured", "DoRA, on linear layers and on the token embedding"),
    "trainable_token_indices": ("honoured", "rows that replace the embedding's"),
    "init_lora_weights": ("honoured", "refused where it changes the base: PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA"),
    "peft_type": ("honoured", "`LORA`; others are refused"),
    "bias": ("honoured", "`none`; trained biases are refused"),
    "lora_bias": ("honoured", "false; biases of B are refused"),
    "task_type": ("harmless", "class to load the adapter with"),
    "auto_mapping": ("harmless", "class to load the adapter with"),
    "peft_version": ("harmless", "written by PEFT"),
    "revision": ("harmless", "of the base on the hub; the files at hand are read"),
    "inference_mode": ("harmless", "whether the adapter can be trained"),
    "lora_dropout": ("harmless", "in training alone"),
    "megatron_core": ("harmless", "module for `megatron_config`"),
    "loftq_config": ("harmless", "settings of an initialisation, which `init_lora_weights` names"),
    "eva_config": ("harmless", "settings of an initialisation; its ranks are saved in `rank_pattern`"),
    "corda_config": ("harmless", "settings of an initialisation, which `init_lora_weights` names"),
    "lora_ga_config": ("harmless", "settings of an initialisation, which `init_lora_weights` names"),
    "runtime_config": ("harmless", "where PEFT keeps weights while it works"),
    "qalora_group_size": ("harmless", "for `use_qalora`"),
    "ensure_weight_tying": ("harmless", "ties adapters at their making; the saved tensors are read"),
    "velora_config": ("harmless", "another backward pass"),
    "layer_replication": ("refused", "repeats layers"),
    "target_parameters": ("refused", "adapts parameters that are no layers, as those of experts"),
    "alora_invocation_tokens": ("refused", "the adapter begins at a token"),
    "use_qalora": ("refused", "pools the input of A"),
    "use_bdlora": ("refused", "block-diagonal factors"),
    "arrow_config": ("refused", "routes between adapters"),
    "kasa_config": ("refused", "changes the base by its singular values"),
    "monteclora_config": ("refused", "draws the factors"),
    "megatron_config": ("refused", "parallel layers of Megatron"),
}


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
                rank=_whole_number("r", raw["r"]),
                alpha=_number("lora_alpha", raw["lora_alpha"]),
                rslora=bool(raw.get("use_rslora")),
                rank_pattern=_by_regex("rank_pattern", raw.get("rank_pattern"), _whole_number),
                alpha_pattern=_by_regex("alpha_pattern", raw.get("alpha_pattern"), _number),
                fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
                base=raw.get("base_model_name_or_path"),
                targets=TargetModules.of(raw),
                dora=bool(raw.get("use_dora")),
                modules_to_save=_listed("modules_to_save", raw.get("modules_to_save")),
                token_indices=_token_indices(raw.get("trainable_token_indices")),
            )
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder} is not an adapter: it has no adapter_config.json") from error
        except KeyError as error:
            raise CheckpointError(f"{file} has no {error.args[0]!r}; it describes no LoRA adapter") from error
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise CheckpointError(f"{file} is not a usable adapter configuration: {error}") from error
        kind = raw.get("peft_type") or "LORA"
        init = raw.get("init_lora_weights", True)
        unsupported = {
            f"peft_type {kind}": str(kind).upper() != "LORA",
            "trained biases (bias)": raw.get("bias", "none") not in (None, "none"),
            "LoRA biases (lora_bias)": raw.get("lora_bias"),
            f"init_lora_weights={init!r}, which changes the base before training": init not in _PLAIN_INITS,
            "DoRA (use_dora) with fan_in_fan_out": config.dora and config.fan_in_fan_out,
            **{name: raw.get(name) for name, (treatment, _) in LORA_FIELDS.items() if treatment == "refused"},
            **{f"the unknown setting {name}": value for name, value in raw.items() if name not in LORA_FIELDS},
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

    def saves_whole(self, name: str) -> bool:
        """True if `modules_to_save` names a module with this tensor. PEFT compares the ends of names."""
        parts = name.split(".")[:-1]
        paths = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        return any(path.endswith(module) for path in paths for module in self.modules_to_save)

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
        layers = [layers] if isinstance(layers, int) else layers
        return cls(
            _names("target_modules", raw.get("target_modules")),
            _names("exclude_modules", raw.get("exclude_modules")),
            tuple(_whole_number("layers_to_transform", layer) for layer in layers) if layers else None,
            (patterns,) if isinstance(patterns, str) else tuple(patterns),
        )

    def includes(self, module: str) -> bool:
        """True if PEFT adapts this module. Adapters of an inner model and of a CausalLM name it differently."""
        return any(self.includes_name(name) for name in (module, f"model.{module}"))

    def includes_name(self, name: str) -> bool:
        """True if PEFT adapts the module of this name, in the words of the model that the adapter was made on."""
        if self.modules == _ALL_LINEAR:
            named = name.rpartition(".")[2] not in ("embed_tokens", "lm_head")
        else:
            named = _matches(self.modules, name)
        if _matches(self.excluded, name) or not named:
            return False
        if self.layers is None or isinstance(self.modules, str):
            return True
        patterns = self.patterns or (r"[^.]*",)
        matches = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)
        number = next((int(match[1]) for match in matches if match), None)
        return number in self.layers


def _names(setting: str, value: Any) -> str | tuple[str, ...]:
    """A regular expression, or a list of names."""
    if isinstance(value, str):
        re.compile(value)
        return value
    return _listed(setting, value)


def _listed(setting: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{setting}={value!r:.80} is no list of names")
    return tuple(value)


def _whole_number(setting: str, value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{setting}={value!r:.80} is no whole number")
    return value


def _number(setting: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{setting}={value!r:.80} is no number")
    return float(value)


_Number = TypeVar("_Number", int, float)


def _by_regex(setting: str, value: Any, read: Callable[[str, Any], _Number]) -> dict[str, _Number]:
    for pattern in value or {}:
        re.compile(pattern)
    return {pattern: read(setting, number) for pattern, number in (value or {}).items()}


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _token_indices(value: Any) -> Mapping[str, Sequence[int]]:
    by_module = value if isinstance(value, dict) else {"embed_tokens": value} if value else {}
    return {
        str(module): tuple(_whole_number("trainable_token_indices", index) for index in indices)
        for module, indices in by_module.items()
    }


def _by_pattern(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    # PEFT: a key is a regular expression for the end of the module's name, with anything before a dot.
    # A pattern written for the wrapped name (`model.layers...`) is matched against that name too.
    for pattern, value in patterns.items():
        for name in (module, f"model.{module}"):
            if re.match(rf"(?:.*\.)?(?:{pattern})$", name):
                return value
    return otherwise
