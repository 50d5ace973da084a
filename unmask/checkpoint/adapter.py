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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmask.checkpoint.tensors import TensorSource, innermost, read_pickled
from unmask.errors import AdapterMismatch, CheckpointError

_HALF = re.compile(r"^(?P<module>.+)\.lora_(?P<half>embedding_A|embedding_B|A|B)(?:\.default)?(?:\.weight)?$")


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
            )
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder} is not an adapter: it has no adapter_config.json") from error
        except KeyError as error:
            raise CheckpointError(f"{file} has no {error.args[0]!r}; it describes no LoRA adapter") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a usable adapter configuration: {error}") from error
        kind = raw.get("peft_type") or "LORA"
        unsupported = {
            f"peft_type {kind}": str(kind).upper() != "LORA",
            "DoRA (use_dora)": raw.get("use_dora"),
            "trained biases (bias)": raw.get("bias", "none") not in (None, "none"),
            "LoRA biases (lora_bias)": raw.get("lora_bias"),
            "whole trained modules (modules_to_save)": raw.get("modules_to_save"),
            "replicated layers (layer_replication)": raw.get("layer_replication"),
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
        for key, tensor in tensors.items():
            match = _HALF.match(innermost(key))
            if match is None or match["half"].startswith("embedding"):
                raise AdapterMismatch(
                    f"{self.weights_file} holds {key!r}, which is not a linear layer's LoRA weight; "
                    "merge it with PEFT (merge_and_unload) and load the merged folder"
                )
            self._halves.setdefault(match["module"], {})[match["half"]] = tensor
        for module, halves in self._halves.items():
            self._check(module, halves)

    def _check(self, module: str, halves: Mapping[str, torch.Tensor]) -> None:
        if set(halves) != {"A", "B"}:
            raise AdapterMismatch(
                f"{self.weights_file}: {module} has lora_{next(iter(halves))} only; both A and B are needed"
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
        """A [rank, in] and B [out, rank] in float32, the scale within B, so that `delta` is B @ A."""
        halves = self._halves[module]
        a, b = halves["A"].float(), self.config.scale(module) * halves["B"].float()
        return (b.T, a.T) if self.config.fan_in_fan_out else (a, b)

    def delta(self, module: str) -> torch.Tensor:
        """scale * B @ A in float32, shaped like the module's weight."""
        halves = self._halves[module]
        delta = (halves["B"].float() @ halves["A"].float()).mul_(self.config.scale(module))
        return delta.T if self.config.fan_in_fan_out else delta


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
        unmatched = [module for module in adapter.modules if f"{module}.weight" not in names]
        if not adapter.modules or len(unmatched) == len(adapter.modules):
            example = f" (for example {unmatched[0]!r})" if unmatched else ""
            raise AdapterMismatch(
                f"no tensor of the adapter {adapter.folder} matches the model{example}; "
                f"it was made for {adapter.config.base or 'an unnamed base'}"
            )
        if unmatched:
            raise AdapterMismatch(
                f"{len(unmatched)} of {len(adapter.modules)} modules of the adapter {adapter.folder} are not in the "
                f"model, for example {unmatched[0]!r}; it was made for {adapter.config.base or 'an unnamed base'}"
            )
        for module in adapter.modules:
            halves = adapter._halves[module]
            delta = (halves["B"].shape[0], halves["A"].shape[1])
            delta = delta[::-1] if adapter.config.fan_in_fan_out else delta
            have = self._source.shape(f"{module}.weight")
            if delta != have:
                raise AdapterMismatch(
                    f"the adapter {adapter.folder} changes {module} by a {delta} matrix, but the model's is {have}; "
                    f"it was made for {adapter.config.base or 'an unnamed base'}"
                )

    def names(self) -> Sequence[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        module = name.removesuffix(".weight")
        for adapter in self._adapters:
            if module in adapter._halves:
                # Into the delta, which is ours: fresh memory for each sum took longer than the sum.
                tensor = adapter.delta(module).add_(tensor)
        return tensor
