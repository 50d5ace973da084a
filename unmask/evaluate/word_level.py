"""Word-level tasks: a linear probe predicts labels of single words from the states of a frozen encoder.

As in LLM2Vec (arXiv 2404.05961, section 4.1): chunking, named entities and parts of speech on CoNLL-2003; and
universal parts of speech on UD English-EWT, whose licence lets anyone repeat it. The score is accuracy over words.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from unmask.encoder import Encoder
from unmask.encoder.runtime.threads import parallel_map
from unmask.errors import UsageError
from unmask.evaluate.linear_probe import fit_probe
from unmask.evaluate.word_states import STATES, States, WordTokens, tokenize_words, word_states
from unmask.evaluate.word_tasks import (
    SPLITS,
    WORD_TASKS,
    Sentence,
    Split,
    WordTask,
    find_word_task,
    read_word_data,
    select,
)

__all__ = ["WORD_TASKS", "States", "WordScore", "WordTask", "run_word_task"]

# Sentences of each split unless `full` is set: about 110k tokens of CoNLL-2003 for
# its three tasks together and 80k of UD-EWT, five minutes of SmolLM2-135M on two cores. An accuracy of 90 % over the
# test words then has a 95 % interval of +-0.5.
SENTENCES: Mapping[str, Mapping[Split, int]] = {
    "conll2003": {"train": 3000, "dev": 500, "test": 1500},
    "ud_ewt": {"train": 2500, "dev": 500, "test": 1500},
}


class WordScore(msgspec.Struct, kw_only=True):
    """The score of one encoder on one word-level task.

    Attributes:
        task: as in `WORD_TASKS`.
        accuracy: of the test words, 0-100; the mean of `values` x 100.
        values: for each test word 1 if its label was predicted and 0 if not, float32 [test_words], in the order of
            the data. Words without a state (truncated or blank) count as 0.
        states: kind of states behind the score.
        labels: label -> number of test words with it, for the whole inventory.
        train_words, test_words: numbers of words for fitting and for testing the probe.
        data: digest of the corpus, 16 hex digits.
        seconds: duration of this call, with reading states from disk, without computing them in earlier calls.
        details: accuracies on dev and test for each kind of states ("same_token_dev", "same_token", ...) and of the
            commonest label ("majority"); numbers of truncated words ("cut_words") and blank words, sentences and
            tokens.
    """

    task: str
    accuracy: float
    values: np.ndarray
    states: States
    labels: dict[str, int]
    train_words: int
    test_words: int
    data: str
    seconds: float
    details: dict[str, float | int | str] = {}


def run_word_task(
    task: str,
    encoder: Encoder,
    data: Path,
    cache: Path,
    *,
    revision: str,
    states: States | None = None,
    full: bool = False,
    progress: Callable[[int], None] | None = None,
) -> WordScore:
    """Measure the accuracy of a linear probe on an encoder's states of words.

    The states are computed once for all tasks of a corpus and both kinds of states, and stored; after that a task
    takes seconds.

    Args:
        task: a name in `WORD_TASKS`.
        encoder: the model, bidirectional or causal; its weights do not change.
        data: folder that holds `conll2003/` and `ud_ewt/`.
        cache: folder for the states of words, for example `home() / "words"`.
        revision: content address of everything that decides a state: weights, precision, causal mask.
        states: "same_token", "next_token" (LLM2Vec's choice for MNTP-trained models), or None for the
            better of the two on the dev sentences. The test sentences never decide.
        full: read every sentence, as the paper does, instead of `SENTENCES`.
        progress: called with the number of sentences that each step finished, over all three splits.

    Raises:
        UsageError: no such task or states, or the data are missing or damaged.
        StorageError: the cache cannot be written.
    """
    start = time.perf_counter()
    if states is not None and states not in STATES:
        raise UsageError(f"states={states!r}: choose {', '.join(STATES)}, or none for the better one on dev")
    word_task = find_word_task(task)
    corpus = read_word_data(word_task, data)
    splits: dict[Split, _SplitWords] = {}
    for split in SPLITS:
        sentences = select(corpus.splits[split], None if full else SENTENCES[word_task.folder][split])
        tokens = tokenize_words(encoder.checkpoint.tokenizer, [s.words for s in sentences], encoder.max_length)
        split_states = word_states(encoder, tokens, cache, revision, progress)
        splits[split] = _split_words(word_task, sentences, tokens, split_states)
    train, dev, test = (splits[split] for split in SPLITS)
    if not len(train.with_state):
        raise UsageError(f"{encoder.name} keeps no word of {task} within max_length={encoder.max_length}")
    details: dict[str, float | int | str] = {}
    values: dict[States, np.ndarray] = {}
    kinds: tuple[States, ...] = STATES if states is None else (states,)
    answers = train.labels[train.with_state]
    probes = parallel_map(lambda kind: fit_probe(train.states[kind], answers, len(word_task.labels)), kinds)
    for kind, predict in zip(kinds, probes, strict=True):
        details[f"{kind}_dev"] = _accuracy(dev.correct(kind, predict))
        values[kind] = test.correct(kind, predict)
        details[kind] = _accuracy(values[kind])
    best = max(values, key=lambda kind: details[f"{kind}_dev"])
    counts = Counter(test.labels.tolist())
    commonest = int(np.bincount(train.labels).argmax())
    details |= {
        "majority": 100 * counts[commonest] / len(test.labels),
        "cut_words": sum(words.truncated for words in splits.values()),
        "cut_test_words": test.truncated,
        "blank_words": sum(words.blank for words in splits.values()),
        "sentences": sum(words.sentences for words in splits.values()),
        "tokens": sum(words.tokens for words in splits.values()),
    }
    return WordScore(
        task=task,
        accuracy=_accuracy(values[best]),
        values=values[best],
        states=best,
        labels={label: counts[index] for index, label in enumerate(word_task.labels)},
        train_words=len(train.with_state),
        test_words=len(test.labels),
        data=corpus.digest,
        seconds=time.perf_counter() - start,
        details=details,
    )


class _SplitWords(NamedTuple):
    """The words of one split.

    Attributes:
        labels: index of the label of every word, int64 [words].
        with_state: indices of the words that have a state, int64 [n], ascending.
        states: for each kind [n, W], in the order of `with_state`.
        truncated, blank: numbers of words without a state, as in `WordTokens`.
    """

    labels: np.ndarray
    with_state: np.ndarray
    states: dict[States, np.ndarray]
    truncated: int
    blank: int
    sentences: int
    tokens: int

    def correct(self, kind: States, predict: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return 1 where the probe predicts a word's label, else 0, also without a state; float32 [words]."""
        values = np.zeros(len(self.labels), dtype=np.float32)
        values[self.with_state] = predict(self.states[kind]) == self.labels[self.with_state]
        return values


def _split_words(
    task: WordTask, sentences: Sequence[Sentence], tokens: Sequence[WordTokens], states: dict[States, np.ndarray]
) -> _SplitWords:
    index = {label: number for number, label in enumerate(task.labels)}
    starts = np.cumsum([0, *(len(sentence.words) for sentence in sentences)])
    return _SplitWords(
        labels=np.array([index[label] for sentence in sentences for label in sentence.labels], dtype=np.int64),
        with_state=np.concatenate([start + each.with_state for start, each in zip(starts, tokens, strict=False)]),
        states=states,
        truncated=sum(each.truncated for each in tokens),
        blank=sum(each.blank for each in tokens),
        sentences=len(sentences),
        tokens=sum(len(each.ids) for each in tokens),
    )


def _accuracy(values: np.ndarray) -> float:
    return 100 * float(values.mean(dtype=np.float64))
