"""Figures of a model, from its measurements: means by category, speeds, and the numbers that lists sort by."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from unmask.catalogue.measurement import (
    COST,
    LOCAL,
    MTEB,
    ONBOARDING,
    PARITY,
    PEAK_MEMORY,
    SPEED,
    TEXTS_PER_SECOND,
    TOKENS_PER_SECOND,
    WORDS,
    Measurement,
    Origin,
    newest,
    parity_quantity,
)

# Number of tasks of each category in the suites. A mean over fewer tasks is not the suite's mean.
SUITES: dict[str, dict[str, int]] = {
    MTEB: {
        "Retrieval": 15,
        "Reranking": 4,
        "Clustering": 11,
        "PairClassification": 3,
        "Classification": 12,
        "STS": 10,
        "Summarization": 1,
    },
    LOCAL: {"STS": 4, "Classification": 3, "Clustering": 3, "Retrieval": 3, "Reranking": 1},
}


@dataclass(frozen=True)
class CategoryScores:
    """One category of a suite as one origin has it.

    Attributes:
        tasks: its measurements, in the suite's order of arrival.
        expected: number of tasks of the suite in this category.
        mean: over all of them; None if some are missing.
    """

    category: str
    tasks: list[Measurement]
    expected: int

    @property
    def mean(self) -> float | None:
        return _mean(self.tasks) if self.tasks and len(self.tasks) >= self.expected else None


@dataclass(frozen=True)
class SuiteScores:
    """A suite as one origin has it."""

    suite: str
    origin: Origin
    categories: list[CategoryScores]

    @property
    def tasks(self) -> list[Measurement]:
        return [task for category in self.categories for task in category.tasks]

    @property
    def expected(self) -> int:
        return sum(category.expected for category in self.categories)

    @property
    def mean(self) -> float | None:
        """Over all tasks, each counted once; None if some are missing."""
        return _mean(self.tasks) if len(self.tasks) >= self.expected else None


@dataclass(frozen=True)
class ParityFigure:
    """Cosines of a model's vectors in another runtime with its own.

    Attributes:
        runtime: without its version, which the note of the measurements states.
        precision: of the exported weights.
    """

    runtime: str
    precision: str
    mean: Measurement
    worst: Measurement


@dataclass(frozen=True)
class Figures:
    """The figures of one model. None means not known."""

    suites: dict[tuple[str, Origin], SuiteScores] = field(default_factory=dict)
    words: list[Measurement] = field(default_factory=list)
    stated: list[Measurement] = field(default_factory=list)
    cost: dict[str, Measurement] = field(default_factory=dict)
    sweep: list[Measurement] = field(default_factory=list)
    gates: list[Measurement] = field(default_factory=list)
    parity: list[ParityFigure] = field(default_factory=list)
    mteb: float | None = None
    local: float | None = None

    @property
    def texts_per_second(self) -> Measurement | None:
        return self.cost.get(TEXTS_PER_SECOND)

    @property
    def tokens_per_second(self) -> Measurement | None:
        return self.cost.get(TOKENS_PER_SECOND)

    @property
    def peak_memory(self) -> Measurement | None:
        return self.cost.get(PEAK_MEMORY)


def figures(measurements: Sequence[Measurement]) -> Figures:
    """Compute the figures. Of several values for one quantity from one origin, the last one counts."""
    current = newest(measurements).values()
    suites: dict[tuple[str, Origin], SuiteScores] = {}
    origins: tuple[Origin, ...] = ("published", "measured")
    for suite, counts in SUITES.items():
        for origin in origins:
            scores = [m for m in current if m.group == suite and m.origin == origin and m.category]
            if scores:
                suites[suite, origin] = SuiteScores(
                    suite,
                    origin,
                    [CategoryScores(c, [m for m in scores if m.category == c], n) for c, n in counts.items()],
                )
    ours, theirs = suites.get((MTEB, "measured")), suites.get((MTEB, "published"))
    local = suites.get((LOCAL, "measured"))
    return Figures(
        suites=suites,
        words=[m for m in current if m.group == WORDS],
        stated=[m for m in current if m.group == MTEB and not m.category],
        cost={m.what: m for m in current if m.group == COST},
        sweep=[m for m in current if m.group == SPEED],
        gates=[m for m in current if m.group == ONBOARDING],
        parity=_parity([m for m in current if m.group == PARITY]),
        mteb=next((s.mean for s in (ours, theirs) if s and s.mean is not None), None),
        local=local.mean if local else None,
    )


def _parity(measurements: Sequence[Measurement]) -> list[ParityFigure]:
    """Pair means and worst cosines of each runtime and precision."""
    by_what = {m.what: m for m in measurements}
    pairs = [(m, by_what.get(parity_quantity(m.category, m.metric, "worst"))) for m in measurements]
    return [
        ParityFigure(mean.category, mean.metric, mean, worst)
        for mean, worst in pairs
        if worst is not None and mean.what == parity_quantity(mean.category, mean.metric, "mean")
    ]


def _mean(tasks: Sequence[Measurement]) -> float:
    return sum(task.value for task in tasks) / len(tasks)
