"""The word-level tasks: corpora, label columns and label inventories.

Data lie in a folder per corpus, one sentence per line of `train`, `dev` and `test.jsonl(.gz)`: `tokens` and a list
of the same length for each kind of label. CoNLL-2003 (Tjong Kim Sang and De Meulder, W03-0419) marks spans as in
its release, IOB1; the LLM2Vec paper took the hub's copy, which is IOB2, so spans are converted here.
"""

import hashlib
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from unmask.errors import UsageError
from unmask.tables import open_binary, open_table

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

# Label inventories of the hub's conll2003, in its order, labels that never occur in English included:
# https://github.com/McGill-NLP/llm2vec/blob/main/experiments/run_word_task.py
_PENN = (
    "\" '' # $ ( ) , . : `` CC CD DT EX FW IN JJ JJR JJS LS MD NN NNP NNPS NNS NN|SYM PDT POS PRP PRP$ RB RBR RBS RP "
    "SYM TO UH VB VBD VBG VBN VBP VBZ WDT WP WP$ WRB"
)
_CHUNKS = ("ADJP", "ADVP", "CONJP", "INTJ", "LST", "NP", "PP", "PRT", "SBAR", "UCP", "VP")
_ENTITIES = ("PER", "ORG", "LOC", "MISC")
# https://universaldependencies.org/u/pos/
_UNIVERSAL = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X"


@dataclass(frozen=True)
class WordTask:
    """One label per word.

    Attributes:
        name: name in reports.
        folder: of the corpus, below the folder of data.
        column: key of the labels in a sentence's JSON.
        labels: the inventory; the probe has one output per label.
        spans: the labels mark spans in IOB1 and are read as IOB2.
    """

    name: str
    folder: str
    column: str
    labels: tuple[str, ...]
    spans: bool = False


def _iob2_labels(kinds: Sequence[str]) -> tuple[str, ...]:
    return ("O", *(f"{place}-{kind}" for kind in kinds for place in "BI"))


WORD_TASKS: Mapping[str, WordTask] = {
    task.name: task
    for task in (
        WordTask("CoNLL2003Chunking", "conll2003", "chunk", _iob2_labels(_CHUNKS), spans=True),
        WordTask("CoNLL2003NER", "conll2003", "ner", _iob2_labels(_ENTITIES), spans=True),
        WordTask("CoNLL2003POS", "conll2003", "pos", tuple(_PENN.split())),
        WordTask("UDEWTUniversalPOS", "ud_ewt", "upos", tuple(_UNIVERSAL.split())),
    )
}


class Sentence(NamedTuple):
    """Words of a sentence, and one label per word."""

    words: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class WordData:
    """All sentences of a task by split, and 16 hex digits over the decompressed corpus."""

    splits: Mapping[Split, list[Sentence]]
    digest: str


def find_word_task(name: str) -> WordTask:
    """Return the task with this name.

    Raises:
        UsageError: there is no such task.
    """
    if name not in WORD_TASKS:
        raise UsageError(f"no word-level task {name!r}; there are {', '.join(WORD_TASKS)}")
    return WORD_TASKS[name]


def read_word_data(task: WordTask, data: Path) -> WordData:
    """Read the corpus of a task from the folder of data.

    Raises:
        UsageError: a file is missing or damaged, or holds a label that is not in the inventory.
    """
    digest = hashlib.sha256()
    splits: dict[Split, list[Sentence]] = {}
    for split in SPLITS:
        file, content = _corpus_file(data / task.folder, split)
        digest.update(hashlib.sha256(content).digest())
        splits[split] = _sentences(task, file, content)
    return WordData(splits, digest.hexdigest()[:16])


def select(sentences: Sequence[Sentence], count: int | None) -> list[Sentence]:
    """Return `count` sentences spread over the corpus, in its order; all of them for None.

    The selection is by a hash of the sentence's index. It is the same on every machine and with every version of a
    random generator, and a larger count keeps the sentences of a smaller one.
    """
    if count is None or count >= len(sentences):
        return list(sentences)
    shuffled = sorted(range(len(sentences)), key=lambda index: hashlib.sha256(str(index).encode()).digest())
    return [sentences[index] for index in sorted(shuffled[:count])]


def iob2(labels: Sequence[str]) -> tuple[str, ...]:
    """Convert span labels from IOB1 (B- only between neighbouring spans of a kind) to IOB2 (B- opens every span).

    Labels that are IOB2 already stay as they are.

    >>> iob2(["I-NP", "I-NP", "B-NP", "O", "I-VP", "I-PP"])
    ('B-NP', 'I-NP', 'B-NP', 'O', 'B-VP', 'B-PP')
    """
    converted = []
    open_kind = ""
    for label in labels:
        place, _, kind = label.partition("-")
        converted.append(f"B-{kind}" if place == "I" and kind != open_kind else label)
        open_kind = kind
    return tuple(converted)


def _corpus_file(folder: Path, split: Split) -> tuple[Path, bytes]:
    """Return the file of a split and its decompressed content."""
    plain = folder / f"{split}.jsonl"
    file = plain if plain.is_file() else folder / f"{split}.jsonl.gz"
    try:
        with open_binary(file) as stream:
            return file, stream.read()
    except FileNotFoundError as error:
        raise UsageError(f"{folder} lacks {file.name}; --data names the folder that holds {folder.name}/") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


def _sentences(task: WordTask, file: Path, content: bytes) -> list[Sentence]:
    labels_of_task = set(task.labels)
    column = (task.column, tuple[str, ...])
    fields = msgspec.defstruct("fields", [("tokens", tuple[str, ...]), column])
    sentences = []
    for row in open_table(io.BytesIO(content), "jsonl", str(file)).rows():
        place = f"{file}, line {row.number}"
        try:
            words, labels = msgspec.structs.astuple(msgspec.convert(row.fields, fields))
        except msgspec.ValidationError as error:
            raise UsageError(f"{place}: no tokens and {task.column}: {error}") from error
        if task.spans:
            labels = iob2(labels)
        if len(words) != len(labels):
            raise UsageError(f"{place}: {len(words)} tokens, but {len(labels)} of {task.column}")
        unknown_label = next((label for label in labels if label not in labels_of_task), None)
        if unknown_label is not None:
            raise UsageError(f"{place}: {unknown_label!r} is not a label of {task.name}")
        if words:
            sentences.append(Sentence(words, labels))
    if not sentences:
        raise UsageError(f"{file} holds no sentence")
    return sentences
