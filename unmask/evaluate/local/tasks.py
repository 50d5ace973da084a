"""The table of offline tasks, and their conversion to tasks of mteb's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.evaluate.local import examples as layouts
from unmask.evaluate.results import Category

if TYPE_CHECKING:
    from mteb import AbsTask


@dataclass(frozen=True)
class LocalTask:
    """One offline task.

    Attributes:
        name: mteb's own name if the examples are mteb's own, to the last row.
        category: mteb's protocol for the task.
        read: folder of data -> the examples.
        description: source and selection of the examples.
        metric: mteb's name of the main score.
        mteb_own: True if the examples are mteb's own; then its class and its published scores apply.
    """

    name: str
    category: Category
    read: Callable[[Path], layouts.Tables] = field(repr=False)
    description: str
    metric: str
    mteb_own: bool = False

    def digest(self, tables: layouts.Tables) -> str:
        """Return 16 hex digits over the examples."""
        return layouts.digest(tables)

    def build(self, tables: layouts.Tables) -> "AbsTask":
        """Return a new task of mteb's over examples that were read before.

        A task holds random generators that are seeded when it is made, so every model needs a new task.
        """
        import mteb

        task = mteb.get_task(self.name) if self.mteb_own else _task_class(self, layouts.digest(tables))()
        task.dataset = _DATASETS[self.category](tables)
        task.data_loaded = True
        return task


_STS = "sentence pairs, gold similarity 0 to 5; mteb's own test set, whole"
_GROUPED = "mteb's fast clustering, 10 experiments"

LOCAL_TASKS: Mapping[str, LocalTask] = {
    task.name: task
    for task in (
        LocalTask(
            "STS12",
            "STS",
            partial(layouts.pairs, file="sts12_16/sts2012.tsv", source=".test"),
            f"SemEval 2012: {_STS}",
            "cosine_spearman",
            mteb_own=True,
        ),
        LocalTask(
            "STS13",
            "STS",
            partial(layouts.pairs, file="sts12_16/sts2013.tsv", source=".test"),
            f"SemEval 2013: {_STS}",
            "cosine_spearman",
            mteb_own=True,
        ),
        LocalTask(
            "STS16",
            "STS",
            partial(layouts.pairs, file="sts12_16/sts2016.tsv", source=".test"),
            f"SemEval 2016: {_STS}",
            "cosine_spearman",
            mteb_own=True,
        ),
        LocalTask(
            "STSBenchmark",
            "STS",
            partial(layouts.pairs, file="stsb/test.tsv"),
            f"STS Benchmark: {_STS}",
            "cosine_spearman",
            mteb_own=True,
        ),
        LocalTask(
            "Banking77Classification",
            "Classification",
            layouts.banking,
            "77 intents of bank customers; mteb's own data and protocol, whole",
            "accuracy",
            mteb_own=True,
        ),
        LocalTask(
            "SlurpScenarioClassification",
            "Classification",
            partial(layouts.slurp, label="scenario", per_intent=16, tested=600),
            "SLURP utterances, 18 scenarios: 600 of test, learnt from at most 16 of devel per intent; intents with "
            "fewer than 8 in devel left out",
            "accuracy",
        ),
        LocalTask(
            "SlurpIntentClassification",
            "Classification",
            partial(layouts.slurp, label="intent", per_intent=16, tested=600),
            "the same utterances, by intent",
            "accuracy",
        ),
        LocalTask(
            "NewsgroupsSubjectClustering",
            "Clustering",
            partial(layouts.clusters, file="20newsgroups/titles.tsv", text="subject", label="label", per_label=26),
            f"subjects of 20 newsgroups, 26 different ones of each; {_GROUPED}",
            "v_measure",
        ),
        LocalTask(
            "StackOverflowTitleClustering",
            "Clustering",
            partial(
                layouts.clusters, file="stackoverflow/stackoverflow.tsv.gz", text="text", label="label", per_label=26
            ),
            f"titles of Stack Overflow questions, 26 of each of 20 tags; {_GROUPED}",
            "v_measure",
        ),
        LocalTask(
            "ArxivTitleClustering",
            "Clustering",
            partial(
                layouts.clusters,
                file="arxiv/titles_abstracts.tsv.gz",
                text="title",
                label="primary_cat",
                per_label=58,
                group=lambda category: category.split(".")[0],
                at_least=100,
            ),
            f"titles of arXiv papers, 58 of each archive with at least 100; {_GROUPED}",
            "v_measure",
        ),
        LocalTask(
            "ArxivTitleRetrieval",
            "Retrieval",
            partial(layouts.arxiv_abstracts, queries=150, documents=200, characters=400),
            "150 titles of arXiv papers ask for their abstracts among 200, of which the first 400 characters are kept",
            "ndcg_at_10",
        ),
        LocalTask(
            "PassageRetrieval",
            "Retrieval",
            partial(layouts.qa_passages, queries=100, documents=110),
            "100 questions (XQuAD, Natural Questions) ask for the Wikipedia passage that answers them, among 110",
            "ndcg_at_10",
        ),
        LocalTask(
            "CisiRetrieval",
            "Retrieval",
            partial(layouts.cisi, queries=24, documents=250, characters=300),
            "the 24 queries of CISI with the fewest relevant documents, over 250 documents cut to their title and the "
            "first 300 characters",
            "ndcg_at_10",
        ),
        LocalTask(
            "WikiQAReranking",
            "Reranking",
            partial(layouts.wikiqa, queries=50),
            "50 questions of the WikiQA test split with right and wrong candidate sentences, to be ranked",
            "map_at_1000",
        ),
    )
}


def _task_class(task: LocalTask, revision: str) -> type["AbsTask"]:
    from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    protocols: dict[str, Any] = {
        "STS": AbsTaskSTS,
        "Classification": AbsTaskClassification,
        "Clustering": AbsTaskClustering,
        "Retrieval": AbsTaskRetrieval,
        "Reranking": AbsTaskRetrieval,
    }
    metadata = TaskMetadata(
        name=task.name,
        description=task.description,
        reference=None,
        dataset={"path": f"unmask/{task.name}", "revision": revision},
        type=task.category,  # type: ignore[arg-type]
        category="t2t" if task.category in ("STS", "Retrieval", "Reranking") else "t2c",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=task.metric,
    )
    # mteb clusters a sample of large data sets by default; ours are small and used in full.
    attributes: dict[str, Any] = {"max_fraction_of_documents_to_embed": None} if task.category == "Clustering" else {}
    return type(task.name, (protocols[task.category],), {"metadata": metadata, **attributes})


def _splits(tables: layouts.Tables) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset.from_dict(table) for split, table in tables.items()})


def _search_data(tables: layouts.Tables, candidates: bool) -> Any:
    from datasets import Dataset

    relevant: dict[str, dict[str, int]] = {}
    for query, document, relevance in zip(*tables["judged"].values(), strict=True):
        relevant.setdefault(query, {})[document] = relevance
    split = {
        "corpus": Dataset.from_dict(tables["corpus"]),
        "queries": Dataset.from_dict(tables["queries"]),
        "relevant_docs": relevant,
        "top_ranked": {query: list(documents) for query, documents in relevant.items()} if candidates else None,
    }
    return {"default": {"test": split}}


_DATASETS: Mapping[str, Callable[[layouts.Tables], Any]] = {
    "STS": _splits,
    "Classification": _splits,
    "Clustering": _splits,
    "Retrieval": partial(_search_data, candidates=False),
    "Reranking": partial(_search_data, candidates=True),
}
