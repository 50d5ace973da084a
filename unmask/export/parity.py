"""Parity: the vectors of exported files in another runtime beside our own, text by text, and the name of a fault.

Texts, documents and queries are compared apart, each text alone and in a batch. Where a runtime is outside its gate,
the bank of wrong references of `conformance` says which mistake explains it.
"""

import tomllib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from unmask.conformance import CanaryAnswers, PrecisionClass, build_references, examine
from unmask.conformance.canaries import CanaryText, boundary_pair, canary_texts, fixed_texts
from unmask.conformance.references import distances
from unmask.encoder import Encoder
from unmask.encoder.model.architectures import shape_of
from unmask.encoder.unit_length import unit_length
from unmask.export.capabilities import ExportedModel, ExportVerdict, Target, TextException, judge, traits_of
from unmask.export.runtimes import PROMPT_NAMES, OtherRuntime, RuntimeKind, TextUse, open_runtimes

# Lowest mean and worst cosine by precision; measured figures and reasons are in docs/export.md.
GATES: Mapping[str, tuple[float, float]] = {
    "float32": (0.999999, 0.99999),
    "float16": (0.9999, 0.999),
    "bfloat16": (0.999, 0.995),
    "q8": (0.999, 0.995),
}
# llama.cpp computes attention in 16 bits whatever the file's precision.
_LLAMA_CPP_GATE = (0.99999, 0.9999)
_PRECISIONS: Mapping[str, PrecisionClass] = {
    "float32": "exact",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "q8": "int8",
}
_TARGETS: Mapping[RuntimeKind, Target] = {
    "unmask": "hub",
    "sentence-transformers": "hub",
    "vLLM": "hub",
    "onnxruntime": "onnx",
    "fastembed": "onnx",
    "transformers.js": "onnx",
    "llama.cpp": "gguf",
}

_BATCH = 8
_QUERIES = 24  # texts that are also asked for as queries
_UNIT_LENGTH = 1e-3  # largest error of a length of 1
_LONGEST = 2048  # tokens; a longer text would cost more than all others together
# Tokens by which one text goes beyond a window that the others do not reach, and the most that it may have.
_BEYOND, _LONGEST_BEYOND = 512, 8192


@dataclass(frozen=True)
class ParityRow:
    """The comparison of some texts in one runtime.

    Attributes:
        use: texts, documents or queries; a colon and a kind follow for texts that the runtime is known to read
            otherwise.
        batching: "alone" or "in a batch".
        mean, worst: of the cosines.
        difference: largest difference of two numbers of vectors of length 1.
        worst_text: the text of the worst cosine.
        gate: lowest mean and worst cosine; None for texts that are not judged.
    """

    runtime: str
    dtype: str
    use: str
    batching: str
    count: int
    mean: float
    worst: float
    difference: float
    worst_text: str
    gate: tuple[float, float] | None

    @property
    def passed(self) -> bool:
        """The cosines keep the gate, if there is one."""
        return self.gate is None or (self.mean >= self.gate[0] and self.worst >= self.gate[1])


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of one target.

    Attributes:
        faults: a sentence per runtime that failed.
        notes: what was not compared, and cuts that were made.
    """

    rows: tuple[ParityRow, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Every runtime keeps its gates."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Return the report for parity.json."""
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        return {"passed": self.passed, "faults": list(self.faults), "notes": list(self.notes), "rows": rows}


def parity_texts(encoder: Encoder, *, truncating: bool, own: Sequence[str] = ()) -> list[CanaryText]:
    """Return the texts of a comparison: canary texts, further traps, two texts of the longest length.

    Where the decoder has a window that these do not reach, one more text goes beyond it.

    Args:
        truncating: add a text that is too long.
        own: these texts instead.
    """
    if own:
        return [CanaryText("plain", text) for text in own]
    data = tomllib.loads(files("unmask.export").joinpath("parity_texts.toml").read_text(encoding="utf-8"))
    texts = [canary for canary in fixed_texts() if not canary.instruction]
    texts += [CanaryText("traps", text) for text in data["texts"]]
    longest = min(encoder.max_length, _LONGEST)
    texts += [canary for canary in canary_texts(encoder.prompts, encoder.max_length) if canary.boundary == longest]
    if (beyond := _length_beyond_window(encoder)) is not None:
        texts.append(boundary_pair(encoder.prompts, beyond)[0])
    if truncating and encoder.max_length <= _LONGEST // 2:
        texts.append(CanaryText("paragraphs", f"{texts[-1].text} {texts[-1].text}"))
    return texts


def _length_beyond_window(encoder: Encoder) -> int | None:
    """Length at which the shortest window shows, if no usual text is so long and one may be; else None."""
    shape = shape_of(encoder.checkpoint.config)
    window = min((window for window in shape.windows if window is not None), default=0) if shape is not None else 0
    length = min(encoder.max_length, window + _BEYOND)
    return length if _LONGEST <= window < length <= _LONGEST_BEYOND else None


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Vectors of one use of texts, ours and theirs; float32 [texts, dimensions]."""

    use: TextUse
    instruction: str
    texts: Sequence[CanaryText]
    exceptions: Sequence[TextException | None]
    ours: np.ndarray
    alone: np.ndarray
    batch: np.ndarray

    @property
    def judged(self) -> np.ndarray:
        """Rows of the texts that the runtime can read as the model does."""
        return np.array([i for i, exception in enumerate(self.exceptions) if exception is None])


def check_parity(
    encoder: Encoder,
    model: ExportedModel,
    target: str,
    *,
    model_name: str = "",
    texts: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> ParityReport:
    """Compare every runtime that reads `target` with our own vectors.

    Args:
        encoder: the model in float32.
        model: the same model, with the instructions of the comparison.
        target: folder, file or URL.
        model_name: the model to ask an endpoint for.
        texts: other texts than those that ship.
        say: gets a line per runtime.

    Raises:
        UsageError: no runtime here reads the target.
        CheckpointError: a runtime refuses it.
    """
    runtimes = open_runtimes(target, prompt_texts(model), model_name)
    return compare_runtimes(encoder, model, runtimes, texts=texts, say=say)


def compare_runtimes(
    encoder: Encoder,
    model: ExportedModel,
    runtimes: Iterable[OtherRuntime],
    *,
    texts: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> ParityReport:
    """Compare runtimes that read files of one model with our own vectors, one runtime after the other.

    Args:
        encoder: the model in float32.
        model: the same model, with the instructions of the comparison.
        runtimes: closed here.
        texts: other texts than those that ship.
        say: gets a line per runtime.

    Raises:
        CheckpointError: a runtime refuses its files.
    """
    own_vectors = _OwnVectors(encoder)
    rows: list[ParityRow] = []
    faults: list[str] = []
    notes: list[str] = []
    for runtime in runtimes:
        say(f"comparing with {runtime.name}")
        try:
            comparisons = _compare(own_vectors, model, runtime, texts)
        except _OtherLength as error:
            faults.append(f"{runtime.name} {error}")
            continue
        finally:
            runtime.close()
        if missing := {"documents", "queries"} - set(runtime.uses):
            notes.append(f"{runtime.name}: {' and '.join(sorted(missing))} were not asked for")
        gate = _LLAMA_CPP_GATE if runtime.kind == "llama.cpp" and runtime.dtype == "float32" else GATES[runtime.dtype]
        own = [row for comparison in comparisons for row in _rows(comparison, runtime, gate)]
        rows += own
        if fault := _length_fault(comparisons, model):
            faults.append(f"{runtime.name} {fault}")
        elif not all(row.passed for row in own):
            faults.append(f"{runtime.name} {_name_fault(encoder, runtime, comparisons, own)}")
    return ParityReport(tuple(rows), tuple(faults), tuple(notes))


def prompt_texts(model: ExportedModel) -> dict[TextUse, str]:
    """Return the text that a caller puts before a text, by its use, for files that hold no prompts."""
    prompts: dict[TextUse, str] = {use: _prompt_text(model, name) for use, name in PROMPT_NAMES.items()}
    return {**prompts, "texts": prompts["documents"] if model.parts.plain_head and not model.is_plain else ""}


class _OtherLength(Exception):
    """Vectors of another length than the model's, in words."""


def _prompt_text(model: ExportedModel, name: str) -> str:
    text = model.instructions[name]
    return text if model.is_plain else model.prompts.opening(text)


def _verdict_on(runtime: OtherRuntime, model: ExportedModel) -> ExportVerdict | None:
    target = _TARGETS.get(runtime.kind)
    return None if target is None or runtime.kind == "unmask" else judge(target, traits_of(model))


class _OwnVectors:
    """The model's own vectors, computed once for all runtimes."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._vectors: dict[tuple[str, str], np.ndarray] = {}

    def encode(self, texts: Sequence[str], instruction: str) -> np.ndarray:
        """Return float32 [n, dimensions]."""
        missing = [text for text in dict.fromkeys(texts) if (instruction, text) not in self._vectors]
        if missing:
            vectors = self.encoder.encode(missing, instruction=instruction)
            self._vectors |= {(instruction, text): row for text, row in zip(missing, vectors, strict=True)}
        return np.stack([self._vectors[instruction, text] for text in texts])


def _compare(
    own_vectors: _OwnVectors, model: ExportedModel, runtime: OtherRuntime, own: Sequence[str]
) -> list[_Comparison]:
    encoder = own_vectors.encoder
    verdict = _verdict_on(runtime, model)
    exceptions = {} if verdict is None else verdict.exceptions
    texts = parity_texts(encoder, truncating=runtime.truncates, own=own)
    comparisons = []
    for use in runtime.uses:
        instruction = model.instructions.get(PROMPT_NAMES.get(use, ""), "")
        chosen = texts
        if use != "texts":
            if not instruction and use == "queries":
                continue  # the same as documents
            short = [text for text in texts if not text.boundary and len(text.text) < 400]
            traps = [text for text in short if text.group == "traps"]
            chosen = [*traps, *(text for text in short if text.group != "traps")][:_QUERIES]
        if not runtime.truncates:  # such a runtime refuses long texts
            prompts = [encoder.prompts.build([text.text], instruction)[0] for text in chosen]
            chosen = [text for text, prompt in zip(chosen, prompts, strict=True) if not prompt.truncated]
        strings = [text.text for text in chosen]
        ours = own_vectors.encode(strings, instruction)
        alone, batch = (_of_length(ours, runtime.encode(strings, use, size), model) for size in (1, _BATCH))
        ours = np.ascontiguousarray(ours[:, : alone.shape[1]])
        kinds = _exceptions(encoder, chosen, instruction, exceptions)
        comparisons.append(_Comparison(use, instruction, chosen, kinds, ours, alone, batch))
    return comparisons


def _of_length(ours: np.ndarray, theirs: np.ndarray, model: ExportedModel) -> np.ndarray:
    """Check the length of vectors [n, dimensions]: that of the model, or of its cut."""
    if theirs.shape[1] not in (ours.shape[1], model.dimensions):
        raise _OtherLength(f"gives vectors of {theirs.shape[1]} numbers; the model's have {ours.shape[1]}")
    return theirs


def _exceptions(
    encoder: Encoder,
    texts: Sequence[CanaryText],
    instruction: str,
    exceptions: Mapping[TextException, str],
) -> list[TextException | None]:
    """Find the texts of the kinds that a runtime is known to read otherwise."""
    usual = encoder.prompts.build(["a"], instruction)[0].pooled[0]
    tokens = encoder.checkpoint.tokenizer.text.get_added_tokens_decoder().values()
    controls = [token.content for token in tokens if token.special]

    def kind(text: CanaryText) -> TextException | None:
        if "control tokens" in exceptions and any(control in text.text for control in controls):
            return "control tokens"
        if "decomposed letters" in exceptions and unicodedata.normalize("NFC", text.text) != text.text:
            return "decomposed letters"
        if "outer blanks" in exceptions and text.text != text.text.strip():
            return "outer blanks"
        if "joining space" in exceptions and instruction:
            first = encoder.prompts.build([text.text], instruction)[0].pooled[0]
            return "joining space" if first != usual else None
        return None

    return [kind(text) for text in texts]


def _rows(comparison: _Comparison, runtime: OtherRuntime, gate: tuple[float, float]) -> list[ParityRow]:
    """Summarise a comparison: a row for texts alone, one for texts in a batch, and one per kind of excepted texts."""
    rows = []
    for batching, theirs in (("alone", comparison.alone), ("in a batch", comparison.batch)):
        for exception in dict.fromkeys([None, *comparison.exceptions]):
            members = [i for i, kind in enumerate(comparison.exceptions) if kind == exception]
            if not members:
                continue
            a, b = comparison.ours[members].astype(np.float64), theirs[members].astype(np.float64)
            off = distances(b, a)
            rows.append(
                ParityRow(
                    runtime=runtime.name,
                    dtype=runtime.dtype,
                    use=comparison.use if exception is None else f"{comparison.use}: {exception}",
                    batching=batching,
                    count=len(members),
                    mean=1 - float(off.mean()),
                    worst=1 - float(off.max()),
                    difference=float(np.abs(unit_length(a) - unit_length(b)).max()),
                    worst_text=comparison.texts[members[int(off.argmax())]].text[:60],
                    gate=gate if exception is None else None,
                )
            )
    return rows


def _length_fault(comparisons: Sequence[_Comparison], model: ExportedModel) -> str:
    """Name vectors that are not scaled to length 1, or not finite. Cut vectors are shorter by nature."""
    vectors = np.concatenate([part for comparison in comparisons for part in (comparison.alone, comparison.batch)])
    if not np.isfinite(vectors).all():
        return f"gives numbers that are not finite, for {int((~np.isfinite(vectors)).any(axis=1).sum())} texts"
    lengths = np.linalg.norm(vectors, axis=1)
    if model.dimensions is None and (np.abs(lengths - 1) > _UNIT_LENGTH).any():
        return f"does not scale vectors to length 1: they are {lengths.min():.3g} to {lengths.max():.3g} long"
    return ""


def _name_fault(
    encoder: Encoder, runtime: OtherRuntime, comparisons: Sequence[_Comparison], rows: Sequence[ParityRow]
) -> str:
    """Name the mistake that explains vectors outside the gate, by the bank of wrong references."""
    failed = next(row for row in rows if not row.passed)
    assert failed.gate is not None
    figures = (
        f"{failed.use} {failed.batching}: cosine {failed.worst:.6f} at worst and {failed.mean:.6f} in the mean, where "
        f"{failed.gate[1]} and {failed.gate[0]} are the least for {runtime.dtype} (worst text: {failed.worst_text!r})"
    )
    if comparisons[0].ours.shape[1] != encoder.dim:
        return f"differs: {figures}"
    compared = [comparison for comparison in comparisons if comparison.use != "documents"]
    canaries, alone, batch = [], [], []
    for comparison in compared:
        for row in comparison.judged:
            text = comparison.texts[row]
            group = "instructions" if comparison.instruction else text.group
            canaries.append(CanaryText(group, text.text, comparison.instruction, text.boundary))
            alone.append(comparison.alone[row])
            batch.append(comparison.batch[row])
    # Texts that the encoder cuts are left out: the bank of wrong references needs their boundary pairs and lengths.
    prompts = [encoder.prompts.build([canary.text], canary.instruction)[0] for canary in canaries]
    fits = [i for i, prompt in enumerate(prompts) if not prompt.truncated]
    canaries, alone, batch = ([part[i] for i in fits] for part in (canaries, alone, batch))
    references = build_references(encoder.name, model=encoder.name, canaries=canaries)
    answers = CanaryAnswers(
        rows=np.arange(len(canaries)),
        vectors=alone,
        raw=(),
        repeats=list(enumerate(alone)),
        arrangements=list(enumerate(batch)),
        unpublished=(),
        num_tokens=int(references.num_tokens.sum()),
        their_tokens=None,
    )
    finding = examine(references, answers, _PRECISIONS[runtime.dtype])
    return f"{finding.fault or 'differs'}: {figures}"
