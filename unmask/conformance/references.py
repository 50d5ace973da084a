"""`References`: the right vectors of a model's canary texts, the limits of each precision, and the wrong references."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import msgspec
import numpy as np

from unmask.conformance.canaries import CanaryText, canary_set_version, canary_texts, fixed_texts
from unmask.conformance.unpublished_canaries import UnpublishedCanaries, draw_prompts
from unmask.conformance.wrong_references import WrongReference, canary_prompts, wrong_references
from unmask.disk import atomic_write
from unmask.encoder import Dtype, Encoder, LoadOptions
from unmask.encoder.prompts import PromptBuilder
from unmask.encoder.unit_length import unit_length
from unmask.errors import CheckpointError, InputError
from unmask.home import home

PrecisionClass = Literal["exact", "float16", "bfloat16", "int8"]

# Most exact first. Values: worst and mean of 1 - cosine. "exact" is float32 with other kernels. The figures are floors:
# the limit of a model is three times the distance of our own engine in that precision, if that is more.
FLOORS: dict[PrecisionClass, tuple[float, float]] = {
    "exact": (1e-5, 1e-6),
    "float16": (1e-4, 2e-5),
    "bfloat16": (2e-3, 5e-4),
    "int8": (1e-2, 1e-3),
}
# Class of each precision of a model.
PRECISION_CLASSES: dict[Dtype, PrecisionClass] = {
    "float32": "exact",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "int8": "int8",
}
_MEASURED: tuple[tuple[PrecisionClass, Dtype], ...] = (
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("int8", "int8"),
)
_MARGIN = 3.0

# Vectors of these may be mixed in one index.
SHARED_PRECISIONS: tuple[PrecisionClass, ...] = ("exact", "float16")

# Where a model's own rounding comes near this distance, no limit could tell right from wrong any more.
_MAX_LIMIT = 5e-2

# A mistake that moves no text by more than this is no mistake for the model.
_NO_MISTAKE = 3e-5

_FORMAT = 2


@dataclass(frozen=True, eq=False)
class References:
    """The right vectors of a model, and wrong ones by their fault: the answers of a provider are compared with them.

    Attributes:
        model, revision: id of the model, and the content address of its weights.
        pooling, compat: of the model; part of the vector space.
        max_tokens: longest sequence of the model.
        canaries: the canary texts; all arrays below are in their order.
        vectors: the right vectors, float32 [canaries, dim], of length 1.
        norms: lengths of the raw vectors, float32 [canaries].
        num_tokens: tokens of each text's sequence, int64 [canaries].
        limits: precision class -> most worst and mean distance, most exact class first.
        bank: the vectors under each mistake that changes any.
        unpublished: further canary texts, which only this machine knows.
    """

    model: str
    revision: str
    pooling: str
    compat: str
    max_tokens: int
    canaries: tuple[CanaryText, ...]
    vectors: np.ndarray
    norms: np.ndarray
    num_tokens: np.ndarray
    limits: dict[PrecisionClass, tuple[float, float]]
    bank: tuple[WrongReference, ...]
    unpublished: UnpublishedCanaries

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.vectors.shape[1]

    def vector_space(self, precision: PrecisionClass) -> str:
        """Return the id of the model's vector space in a precision, see `vector_space`."""
        return vector_space(self.model, self.revision, self.pooling, self.compat, precision)

    @property
    def set_version(self) -> str:
        """Digest of the canary texts."""
        return canary_set_version(self.canaries)


@cache
def vector_space(model: str, revision: str, pooling: str, compat: str, precision: PrecisionClass) -> str:
    """Return the id of a vector space. Vectors of one id may be mixed in an index, and no others.

    It does not depend on the canary texts: new ones must not make anybody embed an index again.

    Args:
        model, revision, pooling, compat: as in `References`.
        precision: of the vectors; exact and float16 ones may be mixed.
    """
    parts = [model, revision, pooling, compat]
    if precision not in SHARED_PRECISIONS:
        parts.append(precision)
    return f"vs_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"


def space_precisions(precision: PrecisionClass) -> tuple[PrecisionClass, ...]:
    """Return the precisions whose vectors are of the same space as those of one."""
    return SHARED_PRECISIONS if precision in SHARED_PRECISIONS else (precision,)


def distances(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return 1 - cosine of each pair of rows, float64 [n].

    Computed as half the squared distance of the scaled vectors: 1 minus a cosine near 1 would lose all its digits.
    """
    a, b = (unit_length(np.asarray(rows, dtype=np.float64)) for rows in (vectors, others))
    return ((a - b) ** 2).sum(axis=1) / 2


def build_references(
    source: str,
    *,
    model: str,
    compat: Literal["default", "reference"] = "default",
    draw: random.Random | None = None,
    canaries: Sequence[CanaryText] | None = None,
) -> References:
    """Compute the references of a model with our own engine.

    Loads the weights once for each precision, for the causal mask, and for each adapter left out.

    Args:
        source: id, folder or file of the weights.
        model: id of the model.
        compat: its text handling.
        draw: source of chance for the unpublished texts; None for the system's.
        canaries: other texts than the canary texts of this package; there are no unpublished ones then.

    Raises:
        CheckpointError: the weights cannot be used.
    """
    options = LoadOptions(compat=compat, dtype="float32")
    encoder = Encoder.load_with(source, options)
    unpublished = {} if canaries is not None else draw_prompts(encoder, draw or random.SystemRandom())
    canaries = canary_texts(encoder.prompts, encoder.max_length) if canaries is None else tuple(canaries)
    prompts = canary_prompts(encoder, canaries)
    all_prompts = [*prompts, *unpublished.values()]
    all_raw = encoder.encode_prompts(all_prompts)
    all_vectors = unit_length(all_raw, in_float64=True)
    vectors = all_vectors[: len(prompts)]
    limits: dict[PrecisionClass, tuple[float, float]] = {"exact": FLOORS["exact"]}
    for precision, dtype in _MEASURED:
        rounded = Encoder.load_with(source, replace(options, dtype=dtype)).encode_prompts(all_prompts)
        if not np.isfinite(rounded).all():
            continue  # some models overflow in float16: nobody can be right in it
        off = distances(rounded, all_vectors)
        worst, mean = (
            max(f, _MARGIN * float(m)) for f, m in zip(FLOORS[precision], (off.max(), off.mean()), strict=True)
        )
        if worst <= _MAX_LIMIT:
            limits[precision] = worst, mean
    bank = tuple(
        mistake
        for mistake in wrong_references(encoder, canaries, source, options)
        if distances(mistake.vectors, vectors).max() > _NO_MISTAKE
    )
    return References(
        model=model,
        revision=encoder.checkpoint.revision,
        pooling=encoder.pooling,
        compat=compat,
        max_tokens=encoder.max_length,
        canaries=canaries,
        vectors=vectors,
        norms=np.linalg.norm(all_raw[: len(prompts)], axis=1),
        num_tokens=np.array([len(prompt.ids) for prompt in prompts], dtype=np.int64),
        limits=limits,
        bank=bank,
        unpublished=UnpublishedCanaries(
            texts=tuple(unpublished),
            vectors=all_vectors[len(prompts) :],
            num_tokens=np.array([len(prompt.ids) for prompt in unpublished.values()], dtype=np.int64),
        ),
    )


def references_file(model: str, revision: str, compat: str) -> Path:
    """Return the place of stored references: a file under `UNMASK_HOME/conformance`."""
    texts = canary_set_version(fixed_texts())
    return home() / "conformance" / model.replace("/", "--") / f"{revision}-{compat}-{_FORMAT}-{texts}.npz"


def store_references(references: References, file: Path) -> None:
    """Write references to an .npz file.

    Raises:
        StorageError: it cannot be written.
    """
    described: dict[str, Any] = {
        name: getattr(references, name) for name in ("model", "revision", "pooling", "compat", "max_tokens", "limits")
    }
    described |= {
        "format": _FORMAT,
        "canaries": msgspec.to_builtins(references.canaries),
        "faults": [mistake.fault for mistake in references.bank],
        "unpublished": references.unpublished.texts,
    }
    with atomic_write(file) as partial, partial.open("wb") as opened:
        partial.chmod(0o600)  # whoever reads the unpublished texts can answer them
        np.savez(
            opened,
            description=np.array(json.dumps(described)),
            vectors=references.vectors,
            norms=references.norms,
            num_tokens=references.num_tokens,
            bank=np.stack([mistake.vectors for mistake in references.bank]),
            unpublished_vectors=references.unpublished.vectors,
            unpublished_num_tokens=references.unpublished.num_tokens,
        )


def read_references(file: Path) -> References:
    """Read references from an .npz file.

    Raises:
        CheckpointError: there is no such file, or it is damaged or of another version.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            described = json.loads(str(stored["description"]))
            if described.pop("format") != _FORMAT:
                raise ValueError("it is of another version of unmask")
            faults, texts = described.pop("faults"), described.pop("unpublished")
            return References(
                canaries=msgspec.convert(described.pop("canaries"), tuple[CanaryText, ...]),
                limits={name: tuple(limit) for name, limit in described.pop("limits").items()},
                vectors=stored["vectors"],
                norms=stored["norms"],
                num_tokens=stored["num_tokens"],
                bank=tuple(map(WrongReference, faults, stored["bank"])),
                unpublished=UnpublishedCanaries(
                    tuple(texts), stored["unpublished_vectors"], stored["unpublished_num_tokens"]
                ),
                **described,
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise CheckpointError(
            f"{file} holds no references of canary texts: {error}. Delete it to compute them again"
        ) from error


def require_same_model(
    references: References, prompts: PromptBuilder, *, pooling: str, compat: str, max_tokens: int
) -> None:
    """Check that references from elsewhere are of the model whose text handling is here, by the tokens of every text.

    Args:
        references: made on another machine.
        prompts, pooling, compat, max_tokens: of the model here.

    Raises:
        CheckpointError: they differ; providers would be asked for one model and charged for by another's tokens.
    """
    here = {"pooling": pooling, "compat": compat, "max_tokens": max_tokens}
    for name, value in here.items():
        if (theirs := getattr(references, name)) != value:
            raise CheckpointError(f"the references of {references.model} have {name} {theirs}, its files here {value}")
    texts = [(canary.text, canary.instruction) for canary in references.canaries]
    texts += [(text, "") for text in references.unpublished.texts]
    counts = [*references.num_tokens, *references.unpublished.num_tokens]
    for (text, instruction), count in zip(texts, counts, strict=True):
        try:
            own = len(prompts.build([text], instruction, truncate=False)[0].ids)
        except InputError as error:
            raise CheckpointError(
                f"the references of {references.model} have a text that is none here: {error}"
            ) from None
        if own != count:
            raise CheckpointError(
                f"the references of {references.model} count {count} tokens for a canary text, and its files here "
                f"{own}: the tokenizer or the template is another model's"
            )


def load_references(
    source: str, *, model: str, revision: str, compat: Literal["default", "reference"] = "default"
) -> References:
    """Return the stored references of weights, or compute and store them.

    Args:
        source: id, folder or file of the weights.
        model: id of the model.
        revision: content address of the weights.
        compat: text handling.

    Raises:
        CheckpointError: the weights cannot be used, or the stored file is damaged.
        StorageError: the file cannot be written.
    """
    file = references_file(model, revision, compat)
    if file.is_file():
        return read_references(file)
    references = build_references(source, model=model, compat=compat)
    store_references(references, file)
    return references
