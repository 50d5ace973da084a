"""`examine`: judge the answers to canary texts, and name the fault in one sentence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmask.conformance.canary_run import CanaryAnswers
from unmask.conformance.references import PrecisionClass, References, distances
from unmask.encoder.unit_length import unit_length

_PRECISIONS: tuple[PrecisionClass, ...] = ("exact", "float16", "bfloat16", "int8")  # most exact first

# Share of the ten nearest neighbours that must be the same as among the references; a smaller share for rounded
# vectors.
_NEIGHBOURS = 10
_SAME_NEIGHBOURS = {"exact": 0.95}
_SAME_NEIGHBOURS_ROUNDED = 0.9

# More texts than this share have the vector of another text only if the order is wrong. A model that knows no case or
# no accents has a few such texts.
_MOVED = 0.25

_UNIT_NORM = 1e-3  # largest error of a length of 1

# A wrong reference explains the answers if it is as near as rounding allows, and much nearer than the right one.
_EXPLAINS_BETTER = 0.25

_GROUP_FAULTS = {
    "case": "changes the case of texts",
    "accents": "changes accents or their Unicode form",
    "scripts": "reads scripts other than Latin differently: its tokenizer is another one",
    "whitespace": "changes or strips white space",
    "control": "reads control tokens in a user's text",
    "instructions": "handles the instruction or the prompt differently",
    "short": "handles very short texts differently",
    "paragraphs": "differs on long texts only",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The verdict on a full run.

    Attributes:
        passed: the answers are the model's, in the declared precision or a better one.
        precision: the most exact class whose limits all vectors keep; None for none.
        worst, mean: of 1 - cosine over all texts; 1.0 where vectors could not be compared.
        noise: largest 1 - cosine between two answers to the same request.
        normalised: vectors came in length 1; if not, they are scaled here and nothing is lost.
        fault: a clause that names the fault, such as "pools the last token; the model pools the mean"; "" if passed.
        num_texts, num_tokens: size of the run.
        their_tokens: its tokens by the count of whoever answered; None if they did not say.
    """

    passed: bool
    precision: PrecisionClass | None
    worst: float
    mean: float
    noise: float
    normalised: bool
    fault: str
    num_texts: int
    num_tokens: int
    their_tokens: int | None = None

    @classmethod
    def unusable(cls, fault: str, *, num_texts: int = 0, num_tokens: int = 0) -> "Finding":
        """Make the finding of answers that no distance can be computed for."""
        return cls(
            passed=False,
            precision=None,
            worst=1.0,
            mean=1.0,
            noise=0.0,
            normalised=False,
            fault=fault,
            num_texts=num_texts,
            num_tokens=num_tokens,
        )


def examine(references: References, answers: CanaryAnswers, declared: PrecisionClass = "float16") -> Finding:
    """Compare the answers of a full run with the references.

    Args:
        references: of the model.
        answers: of the run.
        declared: least exact precision class that is allowed.
    """
    fault = _unusable(references, answers)
    if fault:
        return Finding.unusable(fault, num_texts=len(answers.rows), num_tokens=answers.num_tokens)
    vectors = np.stack(answers.vectors).astype(np.float64)
    right = references.vectors[answers.rows]
    off = distances(vectors, right)
    noise = _noise(answers)
    precision = precision_class(references, off)
    if precision is not None and not _same_ranking(vectors, right, precision):
        precision = None
    fault = _fault(references, answers, vectors, off, noise, precision, declared)
    if not fault and not _knows_other_texts(references, answers, declared):
        fault = "answers published canary texts rightly and other texts wrongly"
    return Finding(
        passed=not fault,
        precision=precision,
        worst=float(off.max()),
        mean=float(off.mean()),
        noise=noise,
        normalised=bool((np.abs(np.linalg.norm(vectors, axis=1) - 1) <= _UNIT_NORM).all()),
        fault=fault,
        num_texts=len(answers.rows),
        num_tokens=answers.num_tokens,
        their_tokens=answers.their_tokens,
    )


def light_distance(references: References, rows: Sequence[int], vectors: np.ndarray) -> float:
    """Return the largest 1 - cosine of the vectors [n, dim] of a light run; infinity if they cannot be compared.

    Args:
        references: of the model.
        rows: unpublished texts, as `light_rows` draws them.
        vectors: of these texts.
    """
    if vectors.shape != (len(rows), references.dim) or not usable(vectors):
        return float("inf")
    return float(distances(vectors, references.unpublished.vectors[list(rows)]).max())


def _knows_other_texts(references: References, answers: CanaryAnswers, declared: PrecisionClass) -> bool:
    """True if the answers to unpublished texts are right, or the references have none."""
    if not references.unpublished.texts:
        return True
    rows, vectors = [row for row, _ in answers.unpublished], [vector for _, vector in answers.unpublished]
    same = {len(vector) for vector in vectors} == {references.dim}
    return same and light_distance(references, rows, np.stack(vectors)) <= worst_limit(references, declared)


def usable(vectors: np.ndarray) -> bool:
    """True if all numbers are finite and no vector [n, dim] is zero."""
    return bool(np.isfinite(vectors).all() and (np.abs(vectors).max(axis=-1) > 0).all())


def worst_limit(references: References, declared: PrecisionClass) -> float:
    """Return the largest 1 - cosine that a declared precision allows a single vector."""
    return references.limits[_allowed(references, declared)][0]


def precision_class(references: References, off: np.ndarray) -> PrecisionClass | None:
    """Return the most exact class whose limits the distances [n] keep; None for none."""
    name: PrecisionClass
    for name in _PRECISIONS:
        worst, mean = references.limits.get(name, (-1.0, -1.0))
        if off.max() <= worst and off.mean() <= mean:
            return name
    return None


def _allowed(references: References, declared: PrecisionClass) -> PrecisionClass:
    """The declared class, or the next more exact one where the model has no limit for it."""
    no_coarser = _PRECISIONS[: _PRECISIONS.index(declared) + 1]
    candidates: list[PrecisionClass] = [name for name in no_coarser if name in references.limits]
    return candidates[-1]


def _is_coarser(precision: PrecisionClass, than: PrecisionClass) -> bool:
    return _PRECISIONS.index(precision) > _PRECISIONS.index(than)


def _unusable(references: References, answers: CanaryAnswers) -> str:
    """Name a fault for which no distance can be computed; "" if there is none."""
    dim = references.dim
    lengths = {len(vector) for vector in answers.vectors}
    if lengths != {dim}:
        form = _other_encoding(references, answers)
        if form:
            return f"encodes vectors as {form}; base64 must hold little-endian float32"
        if len(lengths) > 1:
            return f"gives vectors of different lengths, {min(lengths)} to {max(lengths)} numbers"
        length = lengths.pop()
        if length < dim:
            cut = references.vectors[answers.rows][:, :length]
            short = np.stack(answers.vectors)
            if usable(short) and usable(cut) and distances(short, cut).max() <= references.limits["exact"][0] * 100:
                return f"cuts vectors to {length} numbers; the model's have {dim}"
        elif length % dim == 0:
            return f"does not pool: gives {length} numbers, as many as {length // dim} tokens have"
        return f"gives vectors of {length} numbers; the model's have {dim}"
    vectors = np.stack(answers.vectors)
    form = _other_encoding(references, answers)
    if form:
        return f"encodes vectors as {form}; base64 must hold little-endian float32"
    if not np.isfinite(vectors).all():
        return f"gives numbers that are not finite, for {int((~np.isfinite(vectors)).any(axis=1).sum())} texts"
    if not usable(vectors):
        return "gives a vector of zeros"
    further = [vector for _, vector in (*answers.repeats, *answers.arrangements)]
    if any(len(vector) != dim or not usable(vector) for vector in further):
        return "gives an unusable vector when it is asked for the same text again"
    return ""


def _other_encoding(references: References, answers: CanaryAnswers) -> str:
    """Return the name of another number format in which the bytes are the right vectors; "" if there is none."""
    right = references.vectors[answers.rows]
    for name, dtype in (("float16", "<f2"), ("float64", "<f8"), ("big-endian float32", ">f4")):
        size = np.dtype(dtype).itemsize * references.dim
        if not answers.raw or any(len(content) != size for content in answers.raw):
            continue
        with np.errstate(invalid="ignore"):  # another format's bytes are any numbers
            vectors = np.stack([np.frombuffer(content, dtype=dtype).astype(np.float64) for content in answers.raw])
        if usable(vectors) and distances(vectors, right).max() <= 1e-4:
            return name
    return ""


def _noise(answers: CanaryAnswers) -> float:
    """Largest distance between two answers for the same text alone."""
    by_row: dict[int, list[np.ndarray]] = {}
    for row, vector in answers.repeats:
        by_row.setdefault(row, []).append(vector)
    pairs = [(first, other) for first, *others in by_row.values() for other in others]
    return max((float(distances(first[None], other[None])[0]) for first, other in pairs), default=0.0)


def _depends_on_batch(answers: CanaryAnswers, limit: float) -> bool:
    """True if a text among others is further from its vector alone than rounding explains."""
    alone = dict(answers.repeats)
    return any(
        distances(vector[None], alone[row][None])[0] > limit for row, vector in answers.arrangements if row in alone
    )


def _same_ranking(vectors: np.ndarray, right: np.ndarray, precision: PrecisionClass) -> bool:
    """True if every vector is nearest to its own reference, and most of its nearest neighbours are the right ones."""
    unit = unit_length(vectors)
    right = right.astype(np.float64)
    across, among = unit @ right.T, right @ right.T
    # Twins, whose references are as near to each other as rounding, may change places.
    if (across.max(axis=1) - across.diagonal() > 1e-3).any():
        return False
    count = min(_NEIGHBOURS, len(right) - 2)
    shares = []
    for row in range(len(right)):
        others = np.arange(len(right)) != row
        order = np.sort(among[row][others])[::-1]
        threshold = order[count - 1]
        ours = np.argsort(-(unit[row] @ unit.T)[others])[:count]
        # Of references that are equally near, any may be among the nearest.
        shares.append(np.mean(among[row][others][ours] >= threshold - 1e-4))
    return float(np.mean(shares)) >= _SAME_NEIGHBOURS.get(precision, _SAME_NEIGHBOURS_ROUNDED)


def _fault(
    references: References,
    answers: CanaryAnswers,
    vectors: np.ndarray,
    off: np.ndarray,
    noise: float,
    precision: PrecisionClass | None,
    declared: PrecisionClass,
) -> str:
    """Return the first explanation that fits; "" if the answers are right."""
    allowed = _allowed(references, declared)
    limit = references.limits[allowed][0]
    if fault := _out_of_order(references, answers, vectors, off):
        return fault  # it explains everything below as well
    if noise > limit / 4:
        return f"gives another vector each time it is asked for the same text (1 - cosine up to {noise:.1e})"
    # A lower precision than declared rounds differently in a batch. Then the precision is the fault, and not the batch.
    rounding = limit if precision is None else max(limit, references.limits[precision][0])
    if _depends_on_batch(answers, rounding):
        return "gives a text another vector depending on its neighbours or on what came before"
    if precision is not None and not _is_coarser(precision, allowed):
        return ""
    right = references.vectors[answers.rows]
    explanations = (
        _nearest_mistake(references, answers, vectors, off),
        _cut_at(references, answers, vectors, off),
        _single_group([references.canaries[row].group for row in answers.rows], off, limit),
        f"has a lower precision than declared ({declared}): like {precision}" if precision else "",
        _coarse(vectors, right, off),
        _rotated(vectors, right, off),
        f"is another model: mean cosine {1 - off.mean():.2f}",
    )
    return next(filter(None, explanations))


def _out_of_order(references: References, answers: CanaryAnswers, vectors: np.ndarray, off: np.ndarray) -> str:
    """Name an order that is wrong: each vector is the right one of another text."""
    limit = references.limits[_allowed(references, "int8")][0]
    if off.max() <= limit:
        return ""
    right = references.vectors[answers.rows].astype(np.float64)
    unit = unit_length(vectors)
    nearest = (unit @ right.T).argmax(axis=1)
    moved = (nearest != np.arange(len(right))).mean() > _MOVED
    is_permutation = moved and distances(vectors, right[nearest]).max() <= limit
    return "returns the vectors of a request out of order" if is_permutation else ""


def _nearest_mistake(references: References, answers: CanaryAnswers, vectors: np.ndarray, off: np.ndarray) -> str:
    """Return the fault of the wrong reference that is nearest to the answers, if it explains them."""
    limit = references.limits[_allowed(references, "int8")][0]
    candidates = []
    for mistake in references.bank:
        distance = distances(vectors, mistake.vectors[answers.rows])
        candidates.append((float(distance.max()), float(distance.mean()), mistake.fault))
    worst, _, fault = min(candidates, default=(np.inf, np.inf, ""))
    return fault if worst <= limit and worst <= _EXPLAINS_BETTER * off.max() else ""


def _cut_at(references: References, answers: CanaryAnswers, vectors: np.ndarray, off: np.ndarray) -> str:
    """Name the length at which texts are cut: the two texts of longer boundary pairs have one vector."""
    pairs: dict[int, list[int]] = {}
    for index, row in enumerate(answers.rows):
        if boundary := references.canaries[row].boundary:
            pairs.setdefault(boundary, []).append(index)
    equal = [
        boundary
        for boundary, pair in pairs.items()
        if len(pair) == 2 and distances(vectors[pair[:1]], vectors[pair[1:]])[0] < 1e-7
    ]
    rest = [index for index, row in enumerate(answers.rows) if not references.canaries[row].boundary]
    if not equal or off[rest].max() > references.limits[_allowed(references, "int8")][0]:
        return ""
    last_right = max((boundary for boundary in pairs if boundary < min(equal)), default=0)
    return f"cuts texts between {last_right} and {min(equal)} tokens"


def _single_group(groups: Sequence[str], off: np.ndarray, limit: float) -> str:
    """Name the fault of the one group of texts outside the limit."""
    outside = {group for group, distance in zip(groups, off, strict=True) if distance > limit}
    return _GROUP_FAULTS.get(outside.pop(), "") if len(outside) == 1 else ""


def _coarse(vectors: np.ndarray, right: np.ndarray, off: np.ndarray) -> str:
    """Name a precision below all classes: every vector is off by about the same, and its own reference is nearest."""
    unit = unit_length(vectors)
    across = unit @ right.astype(np.float64).T
    own_nearest = (across.argmax(axis=1) == np.arange(len(right))).mean() >= 0.9
    if own_nearest and off.mean() < 0.1 and off.max() < 10 * off.mean():
        return f"has too low a precision: 1 - cosine is {off.max():.1e} at worst"
    return ""


def _rotated(vectors: np.ndarray, right: np.ndarray, off: np.ndarray) -> str:
    """Name a rotated space: inner products among texts are right although the vectors are not."""
    unit = unit_length(vectors)
    right = right.astype(np.float64)
    difference = np.abs(unit @ unit.T - right @ right.T).max()
    return "rotates or mirrors the space: only inner products are right" if difference < 1e-2 < off.mean() else ""
