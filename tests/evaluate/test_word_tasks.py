"""Word-level data: IOB labels, label inventories, selection, and bad files."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.errors import UsageError
from unmask.evaluate.word_tasks import WORD_TASKS, find_word_task, iob2, read_word_data, select

# Entities per split as published with the shared task (W03-0419, table 2).
ENTITIES = {
    "train": {"LOC": 7140, "MISC": 3438, "ORG": 6321, "PER": 6600},
    "dev": {"LOC": 1837, "MISC": 922, "ORG": 1341, "PER": 1842},
    "test": {"LOC": 1668, "MISC": 702, "ORG": 1661, "PER": 1617},
}


def spans(labels: list[str] | tuple[str, ...]) -> list[tuple[int, int, str]]:
    """Return spans as (first, one past last, kind) from IOB1 or IOB2 labels."""
    result: list[tuple[int, int, str]] = []
    for place, label in enumerate(labels):
        mark, _, kind = label.partition("-")
        if mark == "I" and result and result[-1][1:] == (place, kind):
            result[-1] = (result[-1][0], place + 1, kind)
        elif mark != "O":
            result.append((place, place + 1, kind))
    return result


@given(st.lists(st.sampled_from(["O", "I-A", "B-A", "I-B", "B-B"]), max_size=12))
def test_iob2_keeps_the_spans_and_opens_each_with_b(labels: list[str]) -> None:
    converted = iob2(labels)
    assert spans(converted) == spans(labels)
    assert Counter(label[0] for label in converted)["B"] == len(spans(labels))
    assert iob2(converted) == converted


def test_inventories_are_the_papers() -> None:
    assert {name: len(task.labels) for name, task in WORD_TASKS.items()} == {
        "CoNLL2003Chunking": 23,
        "CoNLL2003NER": 9,
        "CoNLL2003POS": 47,
        "UDEWTUniversalPOS": 17,
    }
    assert all(len(set(task.labels)) == len(task.labels) for task in WORD_TASKS.values())


@pytest.mark.parametrize("name", WORD_TASKS)
def test_every_label_of_the_data_is_known(eval_data: Path, name: str) -> None:
    data = read_word_data(find_word_task(name), eval_data)  # an unknown label would be an error
    assert [len(data.splits[split]) for split in ("train", "dev", "test")] == [80, 15, 30]


@pytest.mark.public_data
@pytest.mark.parametrize("name", WORD_TASKS)
def test_every_label_of_the_public_data_is_known(public_data: Path, name: str) -> None:
    data = read_word_data(find_word_task(name), public_data)  # an unknown label would be an error
    if name == "CoNLL2003NER":
        for split, sentences in data.splits.items():
            begun = Counter(label[2:] for s in sentences for label in s.labels if label.startswith("B-"))
            assert begun == ENTITIES[split]


def write_corpus(folder: Path, rows: list[dict], packed: bool = True) -> Path:
    """Write the same rows as train, dev and test of CoNLL-2003."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "conll2003").mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        name = f"{split}.jsonl.gz" if packed else f"{split}.jsonl"
        (folder / "conll2003" / name).write_bytes(gzip.compress(text) if packed else text)
    return folder


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    rows = [{"tokens": ["Ab", "c"], "ner": ["I-PER", "O"]}, {"tokens": [], "ner": []}]
    packed = read_word_data(find_word_task("CoNLL2003NER"), write_corpus(tmp_path / "a", rows))
    plain = read_word_data(find_word_task("CoNLL2003NER"), write_corpus(tmp_path / "b", rows, packed=False))
    assert packed == plain
    assert packed.splits["dev"] == [(("Ab", "c"), ("B-PER", "O"))]  # a sentence without words is none
    other = read_word_data(find_word_task("CoNLL2003NER"), write_corpus(tmp_path / "c", rows[:1]))
    assert other.digest != packed.digest


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "ner": ["I-XYZ"]}, "line 1: 'B-XYZ' is not a label of CoNLL2003NER"),
        ({"tokens": ["a"], "ner": []}, "line 1: 1 tokens, but 0 of ner"),
        ({"tokens": ["a"]}, "line 1: no tokens and ner"),
        ({"tokens": "a", "ner": ["O"]}, "line 1: no tokens and ner"),
        ({"tokens": [], "ner": []}, "holds no sentence"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_word_data(find_word_task("CoNLL2003NER"), write_corpus(tmp_path, [row]))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lacks train\.jsonl\.gz"):
        read_word_data(find_word_task("CoNLL2003NER"), tmp_path)
    write_corpus(tmp_path, [{"tokens": ["a"], "ner": ["O"]}])
    file = tmp_path / "conll2003" / "dev.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"dev\.jsonl\.gz cannot be read"):
        read_word_data(find_word_task("CoNLL2003NER"), tmp_path)
    with pytest.raises(UsageError, match="no word-level task 'NER'"):
        find_word_task("NER")


def test_selection_is_stable_spread_and_nested(tmp_path: Path) -> None:
    rows = [{"tokens": [str(i)], "ner": ["O"]} for i in range(100)]
    sentences = read_word_data(find_word_task("CoNLL2003NER"), write_corpus(tmp_path, rows)).splits["train"]
    places = [int(s.words[0]) for s in select(sentences, 8)]
    assert places == [9, 39, 49, 50, 51, 55, 65, 91]  # on every machine
    assert set(places) < {int(s.words[0]) for s in select(sentences, 30)}
    assert select(sentences, None) == select(sentences, 1000) == sentences
