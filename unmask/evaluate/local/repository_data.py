"""Corpora of the offline suite whose files lie in public repositories, and their conversion to our tables.

Files are read at a pinned commit and checked by digest. The tables that come of them have the rows with which our
published figures were measured.
"""

import hashlib
import json
import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unmask.errors import UsageError

_RAW_FILES = "https://raw.githubusercontent.com"
_REQUEST_TIMEOUT_S = 60

# File below the folder of data -> its rows, the header first.
TextTables = dict[str, list[Sequence[str]]]


@dataclass(frozen=True)
class RepositoryCorpus:
    """A corpus in a repository and its place in the folder.

    Attributes:
        tasks: offline tasks that read it.
        repository: owner/name.
        commit: at which its files are read.
        licence: as its authors state it.
        kilobytes: approximate size of the files that are written.
        digests: file of the repository -> its SHA-256.
        files: files below the folder.
        convert: contents of the repository's files, in the order of `digests` -> the tables of `files`.
    """

    tasks: tuple[str, ...]
    repository: str
    commit: str
    licence: str
    kilobytes: int
    digests: Mapping[str, str]
    files: tuple[str, ...]
    convert: Callable[[Sequence[bytes]], TextTables]

    @property
    def origin(self) -> str:
        """The repository and the beginning of its commit."""
        return f"{self.repository}@{self.commit[:8]}"

    def tables(self, source: Path | None) -> TextTables:
        """Read and convert the corpus, from a folder of repositories (`owner/name/...`) or from the network.

        Raises:
            UsageError: a file cannot be read, or is not the one that is expected.
        """
        return self.convert([self._read(file, digest, source) for file, digest in self.digests.items()])

    def _read(self, file: str, digest: str, source: Path | None) -> bytes:
        path = f"{self.repository}/{self.commit}/{file}"
        place = f"{_RAW_FILES}/{path}" if source is None else str(source / self.repository / file)
        try:
            if source is not None:
                return Path(place).read_bytes()
            with urllib.request.urlopen(place, timeout=_REQUEST_TIMEOUT_S) as answer:
                content: bytes = answer.read()
        except OSError as error:
            raise UsageError(
                f"{place} cannot be read ({error}); connect to the network once, or name a folder with copies of the "
                "repositories: --source FOLDER"
            ) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise UsageError(f"{place} has another digest than {digest[:12]}...: it was changed on its way; try again")
        return content


def slurp_tables(contents: Sequence[bytes]) -> TextTables:
    """Convert SLURP's JSON lines of devel and test."""
    rows: list[Sequence[str]] = [("split", "scenario", "intent", "text")]
    for split, content in zip(("devel", "test"), contents, strict=True):
        lines = (json.loads(line) for line in content.decode("utf-8").splitlines())
        rows += [(split, line["scenario"], line["intent"], line["sentence"]) for line in lines]
    return {"slurp/devtest.tsv": rows}


def cisi_tables(contents: Sequence[bytes]) -> TextTables:
    """Convert CISI's documents, queries and relevance judgements from SMART's format of 1983."""
    documents, queries, judged = (content.decode("latin-1") for content in contents)
    pairs = [line.split()[:2] for line in judged.splitlines() if line.strip()]
    texts = [(id, f"{fields.get('T', '')} {fields.get('W', '')}".strip()) for id, fields in _smart_records(queries)]
    return {
        "ir_cisi/corpus.tsv.gz": [
            ("id", "title", "text"),
            *((id, fields.get("T", ""), fields.get("W", "")) for id, fields in _smart_records(documents)),
        ],
        "ir_cisi/queries.tsv": [("id", "query"), *texts],
        "ir_cisi/qrels.tsv": [("qid", "docid", "rel"), *((query, document, "1") for query, document in pairs)],
    }


def _smart_records(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (id, field -> text) of a file in which `.I 1` begins a record and a line `.T` a field."""
    for record in re.split(r"^\.I +", text, flags=re.MULTILINE)[1:]:
        id, _, rest = record.partition("\n")
        _, *parts = re.split(r"^\.([A-Z])[ \t\r]*\n", rest, flags=re.MULTILINE)
        yield id.strip(), {name: " ".join(part.split()) for name, part in zip(parts[::2], parts[1::2], strict=True)}


def wikiqa_tables(contents: Sequence[bytes]) -> TextTables:
    """Convert the test split of WikiQA: question, candidate sentence and label in a line."""
    (test,) = contents
    rows = [("test", *line.split("\t")) for line in test.decode("utf-8").splitlines() if line.strip()]
    return {"wikiqa/all.tsv.gz": [("split", "question", "sentence", "label"), *rows]}


REPOSITORY_CORPORA = (
    RepositoryCorpus(
        ("SlurpScenarioClassification", "SlurpIntentClassification"),
        "pswietojanski/slurp",
        "f0bd062402ba205e87533d3c19b456ee4d806d66",
        "CC BY 4.0",
        310,
        {
            "dataset/slurp/devel.jsonl": "00d346b183ecc2d160853cd3dc20e8ccd207d9e1809cf6e2c05182076bd0ecc9",
            "dataset/slurp/test.jsonl": "fe3449af69b42fda7163345482556066c35a80f7e552a6d67e212a0e2f0783cc",
        },
        ("slurp/devtest.tsv",),
        slurp_tables,
    ),
    RepositoryCorpus(
        ("CisiRetrieval",),
        "Shakiba-Alipour/Information-Retrieval-on-CISI",
        "13e80360b2c0ca10d3fbf537d3cb2a213c664c40",
        "none stated; the University of Glasgow gives the collection to anybody",
        500,
        {
            "CISI.ALL": "c13934ad921234b571e7b424af3461fe39dccb16757cb21954b3aea5250d072e",
            "CISI.QRY": "b72de0e0cb8aa5c93ac988e5be0400cc18949d0a94913a248783a37dd97d5470",
            "CISI.REL": "f7396c92586c61953ccb7ae99ad8d3ac749ac3b989041fc93a9e311568f58997",
        },
        ("ir_cisi/corpus.tsv.gz", "ir_cisi/queries.tsv", "ir_cisi/qrels.tsv"),
        cisi_tables,
    ),
    RepositoryCorpus(
        ("WikiQAReranking",),
        "tjurczyk/WikiQA",
        "b1d1f91ab745f579767a7e128503f7bfb7ef5b55",
        "Microsoft Research Data License, for research",
        360,
        {"WikiQA_data/WikiQASent-test.txt": "957a23816df4c13056e0069fc30afbc6b56f676ba025b6c9c027fb71379e84e8"},
        ("wikiqa/all.tsv.gz",),
        wikiqa_tables,
    ),
)
