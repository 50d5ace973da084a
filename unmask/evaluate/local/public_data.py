"""Build the folder of evaluation data from public sources, at pinned revisions.

Data sets of the Hugging Face hub are at the revisions that mteb evaluates, so that scores compare with published ones.
Others come from repositories, see `repository_data`. `TASKS_NOT_FETCHED` says why some tasks stay without data.
"""

import gzip
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.disk import storage_errors
from unmask.errors import UsageError
from unmask.evaluate.local.repository_data import REPOSITORY_CORPORA, RepositoryCorpus, TextTables
from unmask.evaluate.local.tasks import LOCAL_TASKS

# Digests of the examples with which all published figures of ours were measured.
MEASURED_DIGESTS = {
    "STS12": "db883da7f9d2e74b",
    "STS13": "322d038fcac2858f",
    "STS16": "4c48ca4c6dfadb9b",
    "STSBenchmark": "626222cc76264157",
    "Banking77Classification": "dcc6f564fc71b24e",
    "SlurpScenarioClassification": "1970364a82de0750",
    "SlurpIntentClassification": "21bdd3e3d7e1bc73",
    "NewsgroupsSubjectClustering": "fbda83c84703afec",
    "StackOverflowTitleClustering": "1adc1f61b2f74e95",
    "ArxivTitleClustering": "a490bc33d333aee3",
    "ArxivTitleRetrieval": "e6fa12a47c9dbef9",
    "PassageRetrieval": "ac26ddc051b7a6d2",
    "CisiRetrieval": "ea1afdbc9b5c0e8d",
    "WikiQAReranking": "9268f3e2af5ed719",
}


@dataclass(frozen=True)
class HubCorpus:
    """One data set of the hub and its place in the folder.

    Attributes:
        task: offline task that reads it.
        dataset: id on the hub.
        revision: commit of the data set.
        licence: as its authors state it.
        kilobytes: approximate size of the files that are written.
        files: file below the folder -> split of the data set.
        columns: column of the file -> column of the data set.
        constants: column of the file -> value of every row.
    """

    task: str
    dataset: str
    revision: str
    licence: str
    kilobytes: int
    files: Mapping[str, str]
    columns: Mapping[str, str]
    constants: Mapping[str, str]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task, as `RepositoryCorpus` has several."""
        return (self.task,)

    @property
    def origin(self) -> str:
        """The data set and the beginning of its revision."""
        return f"{self.dataset}@{self.revision[:8]}"

    def tables(self, source: Path | None) -> TextTables:
        """Read the corpus from the hub, or from a folder in the hub's layout (`mteb/sts12-sts/...`).

        Raises:
            UsageError: it cannot be read or lacks a column.
        """
        header = [*self.constants, *self.columns]
        return {file: [header, *_rows(self, split, source)] for file, split in self.files.items()}


PublicCorpus = HubCorpus | RepositoryCorpus

_PAIR = {"sentence1": "sentence1", "sentence2": "sentence2", "score": "score"}
_SEMEVAL = "as distributed by the organisers of SemEval, for research"

HUB_CORPORA = (
    HubCorpus(
        "STSBenchmark",
        "mteb/stsbenchmark-sts",
        "b0fddb56ed78048fa8b90373c8a3cfc37b684831",
        "CC BY-SA 4.0; terms of the original sources",
        1100,
        {"stsb/train.tsv": "train", "stsb/dev.tsv": "validation", "stsb/test.tsv": "test"},
        _PAIR,
        {},
    ),
    *(
        HubCorpus(
            f"STS{year}",
            f"mteb/sts{year}-sts",
            revision,
            _SEMEVAL,
            kilobytes,
            {f"sts12_16/sts20{year}.tsv": "test"},
            _PAIR,
            {"source": f"sts{year}.test"},
        )
        for year, revision, kilobytes in (
            (12, "a0d554a64d88156834ff5ae9920b964011b16384", 600),
            (13, "7e90230a92c190f1bf69ae9002b8cea547a64cca", 190),
            (16, "4d8694f8f0e0100860b497b999b3dbed754a0513", 180),
        )
    ),
    HubCorpus(
        "Banking77Classification",
        "mteb/banking77",
        "0fd18e25b25c072e09e0d92ab615fda904d66300",
        "CC BY 4.0",
        1100,
        {"banking77/train.tsv": "train", "banking77/test.tsv": "test"},
        {"text": "text", "label": "label_text"},
        {},
    ),
)

PUBLIC_CORPORA: tuple[PublicCorpus, ...] = (*HUB_CORPORA, *REPOSITORY_CORPORA)

# Reason for each task of the suite that no public source at a pinned revision gives, row by row.
TASKS_NOT_FETCHED = {
    "NewsgroupsSubjectClustering": "one file per post of the 20 Newsgroups, and no licence",
    "StackOverflowTitleClustering": "no licence is stated for the 20,000 titles",
    "ArxivTitleClustering": "our own selection of arXiv's metadata (CC0)",
    "ArxivTitleRetrieval": "our own selection of arXiv's metadata (CC0)",
    "PassageRetrieval": "our own mix of XQuAD and Natural Questions (CC BY-SA)",
}


def fetch_public_data(
    output: Path, *, source: Path | None = None, progress: Callable[[PublicCorpus], None] = lambda corpus: None
) -> list[str]:
    """Write the corpora into a folder for `unmask evaluate --data`. Files that are there already are kept.

    Args:
        output: the folder.
        source: a folder to read instead of the network, with data sets and repositories by name (`mteb/sts12-sts/...`,
            `pswietojanski/slurp/...`).
        progress: called before each corpus that is downloaded.

    Returns:
        Tasks whose examples are the ones that our published figures were measured with. Others differ in the order
        of their rows or in a row; their scores may then differ in the last digits.

    Raises:
        UsageError: a corpus cannot be read, or is not the one that is expected.
        StorageError: the folder cannot be written.
    """
    measured = []
    for corpus in PUBLIC_CORPORA:
        if not all((output / file).is_file() for file in corpus.files):
            progress(corpus)
            with storage_errors(str(output), "free some space or name another folder"):
                _write_corpus(corpus, output, source)
        tasks = map(LOCAL_TASKS.__getitem__, corpus.tasks)
        measured += [task.name for task in tasks if task.digest(task.read(output)) == MEASURED_DIGESTS[task.name]]
    return measured


def _write_corpus(corpus: PublicCorpus, output: Path, source: Path | None) -> None:
    """Write all files of a corpus; each appears only when it is complete."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".fetch-") as scratch:
        for file, rows in corpus.tables(source).items():
            written = Path(scratch) / Path(file).name
            text = "".join("\t".join(row) + "\n" for row in rows).encode()
            written.write_bytes(gzip.compress(text, mtime=0) if file.endswith(".gz") else text)
            target = output / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(written, target)


def _rows(corpus: HubCorpus, split: str, source: Path | None) -> Iterator[list[str]]:
    """Yield the rows of one split as text. A tab or line end inside a value becomes a blank."""
    import datasets

    place = str(source / corpus.dataset) if source else corpus.dataset
    try:
        table: Any = datasets.load_dataset(place, split=split, revision=None if source else corpus.revision)
    except Exception as error:
        raise UsageError(
            f"{place} cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            "connect to the Hugging Face hub once, or name a folder with the data sets: --source FOLDER"
        ) from error
    absent = [column for column in corpus.columns.values() if column not in table.column_names]
    if absent:
        raise UsageError(f"{place} has no column {absent[0]!r}; it has {', '.join(table.column_names)}")
    for row in table:
        values = [*corpus.constants.values(), *(str(row[column]) for column in corpus.columns.values())]
        yield [" ".join(value.split("\t")).replace("\r", " ").replace("\n", " ") for value in values]
