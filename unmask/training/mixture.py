"""Draw batches from data sets. The order depends only on the seed.

Each batch comes from one data set, drawn by weight, so that in-batch negatives are of one kind; with `batch.sets`, from
several. Every process of a run draws the same batches, and a resumed run draws those of an uninterrupted one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from unmask.errors import UsageError
from unmask.training.decontamination import Decontaminator
from unmask.training.examples import Example, Examples, read_examples
from unmask.training.recipe import Batch, DataSource
from unmask.training.rows import BadRows

SEVERAL = " + "  # between the names of a batch's data sets


@dataclass(frozen=True, slots=True)
class Part:
    """Examples of one data set within a batch."""

    source: DataSource
    examples: list[Example]


@dataclass(frozen=True, slots=True)
class TextBatch:
    """The examples of one step, by data set."""

    parts: list[Part]

    @property
    def examples(self) -> list[Example]:
        """All examples, data set by data set."""
        return [example for part in self.parts for example in part.examples]

    @property
    def name(self) -> str:
        """Names of the data sets, for logs."""
        return SEVERAL.join(part.source.name for part in self.parts)


def examples_per_draw(batch: Batch, source: DataSource) -> int:
    """Return the number of examples of a source each time it is drawn; a batch has `batch.sets` draws."""
    return max(1, (source.batch or batch.size) // batch.sets)


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Options for reading streamed data sets.

    Attributes:
        root: the data folder.
        decontaminator: drops examples that overlap with evaluation data.
        max_bad_rows: share of unreadable rows above which reading stops.
        shuffle_buffer: number of examples from which the next one is drawn.
    """

    root: Path | None = None
    decontaminator: Decontaminator | None = None
    max_bad_rows: float = 0.01
    shuffle_buffer: int = 100_000


class Mixture:
    """Endless batches of several data sets.

    Args:
        sources: all data sets, with their weights.
        sets: examples of those in memory; streamed sources are not among them.
        batch: size of a batch, and number of data sets that it is drawn from.
        seed: decides the order.
        stream: for streamed sources; None if there are none.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        sets: Sequence[Examples],
        batch: Batch,
        seed: int,
        stream: StreamOptions | None = None,
    ) -> None:
        self._sources, self._batch, self._seed = sources, batch, seed
        self._stream = stream or StreamOptions()
        self._sets = {examples.source.name: examples for examples in sets}
        weights = [source.weight or len(self._sets[source.name].train) for source in sources]
        self._weights = np.array(weights, dtype=float) / sum(weights)

    def steps_of(self, epochs: float) -> int:
        """Return the number of steps after which every data set has been seen `epochs` times."""
        choices = self._choices()
        left = [epochs * len(self._sets[source.name].train) for source in self._sources]
        steps = 0
        while any(examples > 0 for examples in left):
            for which in (next(choices) for _ in range(self._batch.sets)):
                left[which] -= examples_per_draw(self._batch, self._sources[which])
            steps += 1
        return steps

    def _choices(self) -> Iterator[int]:
        generator = np.random.default_rng([self._seed, 0])
        while True:
            yield int(generator.choice(len(self._sources), p=self._weights))

    def batches(self, skip: int = 0) -> Iterator[TextBatch]:
        """Yield batches from number `skip` on. Earlier ones are drawn and discarded."""
        streams = [self._examples(source) for source in self._sources]
        choices = self._choices()
        for number in count():
            drawn: dict[int, list[Example]] = {}
            for which in (next(choices) for _ in range(self._batch.sets)):
                examples = [next(streams[which]) for _ in range(examples_per_draw(self._batch, self._sources[which]))]
                drawn.setdefault(which, []).extend(examples)
            if number >= skip:
                yield TextBatch([Part(self._sources[which], examples) for which, examples in drawn.items()])

    def _examples(self, source: DataSource) -> Iterator[Example]:
        seed = [self._seed, *source.name.encode()]
        if source.stream:
            yield from self._streamed(source, seed)
        examples = self._sets[source.name].train
        by_label: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            if example.label is not None:
                by_label.setdefault(example.label, []).append(index)
        epoch = 0
        while True:
            generator = np.random.default_rng([*seed, epoch])
            for index in generator.permutation(len(examples)):
                example = examples[index]
                if example.label is None:
                    yield example
                    continue
                # Draw another text of the same label; the last one replaces the text itself. A text alone with its
                # label is its own positive, and the loss never counts it as a negative.
                same = by_label[example.label]
                drawn = same[generator.integers(max(1, len(same) - 1))]
                other = same[-1] if drawn == index else drawn
                yield Example(example.query, examples[other].query, (), example.label)
            epoch += 1

    def _overlaps(self, example: Example) -> bool:
        decontaminator = self._stream.decontaminator
        return decontaminator is not None and any(map(decontaminator.overlaps, example.texts()))

    def _streamed(self, source: DataSource, seed: list[int]) -> Iterator[Example]:
        """Yield rows through a shuffle buffer: each new row replaces a random one. Endless."""
        epoch = 0
        while True:
            generator = np.random.default_rng([*seed, epoch])
            bad = BadRows(self._stream.max_bad_rows)
            buffer: list[Example] = []
            for example in read_examples(source, self._stream.root, bad):
                if self._overlaps(example):
                    continue
                if len(buffer) < self._stream.shuffle_buffer:
                    buffer.append(example)
                    continue
                place = int(generator.integers(len(buffer)))
                buffer[place], example = example, buffer[place]
                yield example
            bad.close()
            if not buffer:
                raise UsageError(f"data {source.name!r}: no usable row in {source.path} ({bad.seen} seen)")
            for index in generator.permutation(len(buffer)):
                yield buffer[index]
            epoch += 1
