"""Examples of the offline tasks: one function per layout of files.

A table is a mapping from column to equally long lists, in the columns that mteb's task classes expect:
    pairs           test: sentence1, sentence2, score
    classification  train, test: text, label
    clustering      test: sentences, labels
    search          corpus: id, title, text; queries: id, text; judged: query, document, relevance (for reranking, all
                    candidates of every query)

Samples are not random: a sample is the rows whose text has the smallest hash. It is the same on every machine and with
every version of every library, and a larger sample contains the smaller one.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from unmask.errors import UsageError
from unmask.tables import read_table

Table = dict[str, list[Any]]
Tables = dict[str, Table]
TextRow = dict[str, str]
T = TypeVar("T")

FETCH_ADVICE = "to build it from public sources: unmask data fetch local --output FOLDER"


def digest(tables: Tables) -> str:
    """Return 16 hex digits over every example, so that a changed file or another sample is another task."""
    return hashlib.sha256(msgspec.json.encode(tables, order="sorted")).hexdigest()[:16]


def read_tsv(file: Path) -> list[TextRow]:
    """Read a tab-separated file with a header and no quoting, gzipped or not.

    Raises:
        UsageError: the file is missing or damaged.
    """
    try:
        return [row.fields for row in read_table(file)]
    except FileNotFoundError as error:
        raise UsageError(
            f"{file} is missing; --data names the folder that holds {file.parent.name}/. {FETCH_ADVICE}"
        ) from error
    except (OSError, UsageError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


def sample(items: Sequence[T], count: int, text: Callable[[T], str]) -> list[T]:
    """Return `count` of the items, in their order: those whose text has the smallest hash."""
    ranked = sorted(range(len(items)), key=lambda i: (hashlib.sha256(text(items[i]).encode()).digest(), i))
    return [items[i] for i in sorted(ranked[:count])]


def pairs(data: Path, file: str, source: str | None = None) -> Tables:
    """Read sentence pairs with a gold score; with `source`, only rows whose source ends in it."""
    rows = [row for row in read_tsv(data / file) if source is None or row["source"].endswith(source)]
    return {
        "test": {
            "sentence1": [row["sentence1"] for row in rows],
            "sentence2": [row["sentence2"] for row in rows],
            "score": [float(row["score"]) for row in rows],
        }
    }


def banking(data: Path) -> Tables:
    """Read all of Banking77, so that mteb's own protocol gives mteb's own score."""
    files = {split: data / "banking77" / f"{split}.tsv" for split in ("train", "test")}
    return {split: _columns(read_tsv(file), text="text", label="label") for split, file in files.items()}


def slurp(data: Path, label: str, per_intent: int, tested: int) -> Tables:
    """Read SLURP: train on `devel`, test on `test`; intents with too few examples in `devel` are left out.

    The texts are the same for every label.
    """
    rows = read_tsv(data / "slurp/devtest.tsv")
    by_intent = _grouped((row for row in rows if row["split"] == "devel"), "intent")
    usable = {intent: group for intent, group in by_intent.items() if len(group) >= _SAMPLES_PER_LABEL}
    train = [row for group in usable.values() for row in sample(group, per_intent, _text)]
    test = sample([row for row in rows if row["split"] == "test" and row["intent"] in usable], tested, _text)
    return {"train": _columns(train, text="text", label=label), "test": _columns(test, text="text", label=label)}


def clusters(
    data: Path, file: str, text: str, label: str, per_label: int, group: Callable[[str], str] = str, at_least: int = 1
) -> Tables:
    """Read `per_label` different texts of every label with `at_least` texts; `group` coarsens labels first."""
    unique: dict[str, TextRow] = {}
    for row in read_tsv(data / file):
        if row[text].strip():
            unique.setdefault(row[text], {"text": row[text], "label": group(row[label])})
    large = [rows for rows in _grouped(unique.values(), "label").values() if len(rows) >= at_least]
    rows = [row for rows in large for row in sample(rows, per_label, _text)]
    return {"test": _columns(rows, sentences="text", labels="label")}


def arxiv_abstracts(data: Path, queries: int, documents: int, characters: int) -> Tables:
    """Read titles as queries for their abstracts, truncated to `characters`."""
    rows = sample(read_tsv(data / "arxiv/titles_abstracts.tsv.gz"), documents, lambda row: row["arxiv_id"])
    query_rows = sample(rows, queries, lambda row: row["title"])
    return _search(
        corpus={row["arxiv_id"]: ("", beginning(row["abstract"], characters)) for row in rows},
        queries={row["arxiv_id"]: row["title"] for row in query_rows},
        judged={row["arxiv_id"]: {row["arxiv_id"]: 1} for row in query_rows},
    )


def qa_passages(data: Path, queries: int, documents: int) -> Tables:
    """Read questions as queries for the passage that answers them, among the passages of other questions."""
    rows = read_tsv(data / "qa_passages/pairs.tsv.gz")
    # A few questions occur twice, with two passages: both are answers.
    answers: dict[str, dict[str, int]] = defaultdict(dict)
    for row in rows:
        answers[row["question"]][_name(row["passage"])] = 1
    questions = sample(list(answers), queries, str)
    passages = list(dict.fromkeys(row["passage"] for row in rows))
    needed = {name for question in questions for name in answers[question]}
    others = [passage for passage in passages if _name(passage) not in needed]
    in_corpus = needed | {_name(passage) for passage in sample(others, max(0, documents - len(needed)), str)}
    return _search(
        corpus={_name(passage): ("", passage) for passage in passages if _name(passage) in in_corpus},
        queries={_name(question): question for question in questions},
        judged={_name(question): answers[question] for question in questions},
    )


def cisi(data: Path, queries: int, documents: int, characters: int) -> Tables:
    """Read the queries with the fewest relevant documents, so that a small corpus can hold them all.

    Documents are a title and the beginning of the text.
    """
    relevant: dict[str, dict[str, int]] = defaultdict(dict)
    for row in read_tsv(data / "ir_cisi/qrels.tsv"):
        relevant[row["qid"]][row["docid"]] = int(row["rel"])
    query_ids = sorted(relevant, key=lambda query: (len(relevant[query]), int(query)))[:queries]
    rows = read_tsv(data / "ir_cisi/corpus.tsv.gz")
    needed = {document for query in query_ids for document in relevant[query]}
    others = [row for row in rows if row["id"] not in needed]
    in_corpus = needed | {row["id"] for row in sample(others, max(0, documents - len(needed)), _text)}
    texts = {row["id"]: row["query"] for row in read_tsv(data / "ir_cisi/queries.tsv")}
    return _search(
        corpus={
            row["id"]: (row["title"], beginning(row["text"], characters)) for row in rows if row["id"] in in_corpus
        },
        queries={query: texts[query] for query in query_ids},
        judged={query: relevant[query] for query in query_ids},
    )


def wikiqa(data: Path, queries: int) -> Tables:
    """Read questions of the test split that have a right and a wrong candidate sentence, for reranking."""
    rows = [row for row in read_tsv(data / "wikiqa/all.tsv.gz") if row["split"] == "test"]
    mixed = {
        question: group
        for question, group in _grouped(rows, "question").items()
        if {row["label"] for row in group} == {"0", "1"}
    }
    questions = sample(list(mixed), queries, str)
    corpus: dict[str, tuple[str, str]] = {}
    judged: dict[str, dict[str, int]] = {}
    for question in questions:
        # A sentence may be a candidate of several questions, and right for one of them only.
        judged[_name(question)] = {_name(row["sentence"]): int(row["label"]) for row in mixed[question]}
        corpus.update({_name(row["sentence"]): ("", row["sentence"]) for row in mixed[question]})
    return _search(corpus, {_name(question): question for question in questions}, judged)


def beginning(text: str, characters: int) -> str:
    """Truncate a text to at most `characters`, at the end of a word.

    >>> beginning("one two three", 9)
    'one two'
    """
    if len(text) <= characters:
        return text
    return text[: characters + 1].rsplit(" ", 1)[0]


_SAMPLES_PER_LABEL = 8  # mteb's number of training examples per label in each experiment


def _search(
    corpus: Mapping[str, tuple[str, str]], queries: Mapping[str, str], judged: Mapping[str, Mapping[str, int]]
) -> Tables:
    triples = [(query, document, value) for query, documents in judged.items() for document, value in documents.items()]
    return {
        "corpus": {
            "id": list(corpus),
            "title": [title for title, _ in corpus.values()],
            "text": [text for _, text in corpus.values()],
        },
        "queries": {"id": list(queries), "text": list(queries.values())},
        "judged": dict(zip(("query", "document", "relevance"), map(list, zip(*triples, strict=True)), strict=True)),
    }


def _columns(rows: Iterable[TextRow], **columns: str) -> Table:
    rows = list(rows)
    return {name: [row[column] for row in rows] for name, column in columns.items()}


def _grouped(rows: Iterable[TextRow], column: str) -> dict[str, list[TextRow]]:
    groups: dict[str, list[TextRow]] = defaultdict(list)
    for row in rows:
        groups[row[column]].append(row)
    return groups


def _name(text: str) -> str:
    """Return an id for a text that has none."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _text(row: TextRow) -> str:
    return row["text"]
