"""A folder of evaluation data of our own making, in the layout that `unmask evaluate --data` reads.

Rows are put together from word lists, so that they are the same on every machine, free of anybody's licence, and
similar where their gold labels say so.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

# topic -> (people, actions, things, places), the parts of a sentence
TOPICS = {
    "banking": ("customer cashier auditor", "cancels transfers receives", "card loan deposit", "bank branch counter"),
    "cooking": ("cook baker waiter", "fries peels tastes", "onion soup pancake", "kitchen pantry bakery"),
    "space": (
        "astronaut pilot engineer",
        "launches repairs observes",
        "rocket telescope satellite",
        "orbit crater base",
    ),
    "music": ("violinist singer drummer", "plays tunes records", "melody guitar sonata", "concert studio choir"),
    "sport": ("striker goalkeeper runner", "kicks catches wins", "ball trophy race", "stadium pitch gym"),
    "medicine": ("nurse surgeon patient", "examines treats measures", "wound fever pulse", "hospital ward clinic"),
    "farming": ("farmer shepherd gardener", "plants waters harvests", "wheat apple pumpkin", "field orchard barn"),
    "law": ("judge lawyer witness", "signs disputes reads", "contract verdict statute", "court prison office"),
    "weather": ("forecaster sailor hiker", "fears predicts notices", "storm rainbow frost", "coast valley summit"),
    "computing": ("programmer student tester", "compiles debugs deletes", "program database file", "server laptop lab"),
    "travel": ("tourist driver guide", "books misses photographs", "flight bus castle", "airport hotel station"),
    "schooling": (
        "teacher pupil principal",
        "explains copies grades",
        "essay equation lesson",
        "classroom library hall",
    ),
    "physics": ("physicist chemist technician", "heats weighs splits", "atom magnet crystal", "reactor vacuum tunnel"),
    "finance": ("broker investor banker", "sells values hedges", "bond share currency", "exchange market fund"),
    "animals": ("zookeeper vet rider", "feeds grooms chases", "horse parrot otter", "zoo stable river"),
    "building": ("mason carpenter architect", "paints drills measures", "wall roof staircase", "cellar attic site"),
    "cinema": ("actor director critic", "films cuts praises", "scene comedy trailer", "cinema set festival"),
    "politics": ("minister senator voter", "drafts opposes repeals", "law tax treaty", "parliament embassy capital"),
    "fashion": ("tailor model designer", "sews irons wears", "dress scarf jacket", "atelier boutique runway"),
    "gaming": ("player dealer champion", "shuffles moves loses", "pawn puzzle dice", "tournament casino arena"),
}
MANNERS = (
    "quickly",
    "slowly",
    "in secret",
    "at night",
    "again",
    "with care",
    "for free",
    "alone",
    "on Monday",
    "twice",
)
PARTS = 5  # person, action, thing, place, manner


def pick(choices: Sequence[str], number: int) -> str:
    return choices[number % len(choices)]


def parts_of(topic: str, number: int) -> list[str]:
    """The parts of the sentence of that number; neighbours in number differ in the manner first."""
    person, action, thing, place = (text.split() for text in TOPICS[topic])
    number, manner = divmod(number, len(MANNERS))
    return [
        pick(person, number),
        pick(action, number // 3),
        pick(thing, number // 9),
        pick(place, number // 27),
        MANNERS[manner],
    ]


def sentence_of(parts: Sequence[str]) -> str:
    person, action, thing, place, manner = parts
    return f"The {person} {action} the {thing} at the {place} {manner}."


def text_of(topic: str, number: int) -> str:
    return sentence_of(parts_of(topic, number))


def topic_of(number: int) -> str:
    return pick(tuple(TOPICS), number)


def write_tsv(file: Path, header: str, rows: Iterable[Sequence[object]]) -> None:
    """Write rows under a header of names between blanks, gzipped if the name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(header.split()), *("\t".join(map(str, row)) for row in rows)]
    content = ("\n".join(lines) + "\n").encode()
    file.write_bytes(gzip.compress(content, mtime=0) if file.suffix == ".gz" else content)


def graded_pairs(count: int, start: int) -> list[tuple[str, str, float]]:
    """Pairs of sentences that share between no and all parts; the score is the number of them."""
    rows = []
    for number in range(start, start + count):
        shared = number % (PARTS + 1)
        one = parts_of(topic_of(number), number)
        other = parts_of(topic_of(number + 7), number + 13)
        rows.append((sentence_of(one), sentence_of([*one[:shared], *other[shared:]]), float(shared)))
    return rows


def write_pairs(data: Path) -> None:
    for at, year in enumerate((2012, 2013, 2016)):
        rows = graded_pairs(240, 300 * at)
        write_tsv(
            data / f"sts12_16/sts{year}.tsv",
            "source sentence1 sentence2 score",
            [("topics.test" if place % 6 else "topics.train", *row) for place, row in enumerate(rows)],
        )
    for at, (split, count) in enumerate((("train", 60), ("dev", 60), ("test", 200))):
        write_tsv(data / f"stsb/{split}.tsv", "sentence1 sentence2 score", graded_pairs(count, 1000 + 300 * at))


def write_intents(data: Path) -> None:
    for split, count in (("train", 10), ("test", 3)):
        rows = [
            (text_of(topic_of(label), 100 * label + at + (50 if split == "test" else 0)), f"intent_{label}")
            for label in range(77)
            for at in range(count)
        ]
        write_tsv(data / f"banking77/{split}.tsv", "text label", rows)
    rows = []
    for intent in range(54):
        scenario = topic_of(intent % 18)
        for split, count in (("devel", 6 if intent == 53 else 12), ("test", 14)):
            for at in range(count):
                number = 400 * (intent // 18) + at + (30 if split == "test" else 0)
                rows.append((split, scenario, f"{scenario}_{intent}", text_of(scenario, number).lower().rstrip(".")))
    write_tsv(data / "slurp/devtest.tsv", "split scenario intent text", rows)


def write_titles(data: Path) -> None:
    titles = [(topic, text_of(topic, 7 * number)[:-1]) for topic in TOPICS for number in range(30)]
    write_tsv(data / "20newsgroups/titles.tsv", "label subject", [*titles, titles[0], ("music", " ")])
    labels = list(TOPICS)
    write_tsv(
        data / "stackoverflow/stackoverflow.tsv.gz",
        "label text",
        [(labels.index(topic), f"How come {title[0].lower()}{title[1:]} ?") for topic, title in titles],
    )
    rows = []
    for archive, topic, count in (("cs", "computing", 110), ("physics", "physics", 110), ("q-fin", "finance", 20)):
        for number in range(count):
            abstract = " ".join(text_of(topic, 7 * number + at) for at in range(12))
            rows.append((f"{archive}-{number}", f"{archive}.A{number % 3}", archive, "2026-01-01",
                         text_of(topic, 7 * number)[:-1], abstract))  # fmt: skip
    write_tsv(data / "arxiv/titles_abstracts.tsv.gz", "arxiv_id primary_cat categories created title abstract", rows)


def write_searches(data: Path) -> None:
    questions = []
    for number in range(120):
        topic = topic_of(number)
        passage = " ".join(text_of(topic, 31 * number + at) for at in (0, 1, 2))
        questions.append(("own", topic, f"Who {text_of(topic, 31 * number)[4:-1]}?", passage, "somebody"))
    questions.append((*questions[0][:3], "Another passage answers it as well.", "somebody"))
    write_tsv(data / "qa_passages/pairs.tsv.gz", "origin title question passage answer", questions)

    documents = [
        (number, f"{topic_of(number)} {number}", " ".join(text_of(topic_of(number), number + at) for at in range(8)))
        for number in range(1, 281)
    ]
    write_tsv(data / "ir_cisi/corpus.tsv.gz", "id title text", documents)
    queries = range(1, 31)
    write_tsv(data / "ir_cisi/queries.tsv", "id query", [(query, f"Which {topic_of(query)}?") for query in queries])
    judged = [(query, query + 20 * at, 1) for query in queries for at in range(1, 2 + query % 5)]
    write_tsv(data / "ir_cisi/qrels.tsv", "qid docid rel", judged)

    candidates = []
    for number in range(70):
        topic = topic_of(number)
        for at in range(3):
            right = at == number % 3 and number % 10 != 9  # some questions have no right answer
            text = text_of(topic, 17 * number) if right else text_of(topic_of(number + at + 1), 17 * number)
            split = "test" if number < 60 else "train"
            candidates.append((split, f"who {text_of(topic, 17 * number)[4:-1]} ?", text, int(right)))
    write_tsv(data / "wikiqa/all.tsv.gz", "split question sentence label", candidates)


# One sentence as (word, Penn tag, chunk, entity, universal tag), with `{}` for what changes from row to row.
WORDS = (
    ("{name}", "NNP", "I-NP", "I-PER", "PROPN"),
    ("{action}", "VBZ", "I-VP", "O", "VERB"),
    ("the", "DT", "I-NP", "O", "DET"),
    ("{thing}", "NN", "I-NP", "O", "NOUN"),
    ("in", "IN", "I-PP", "O", "ADP"),
    ("{city}", "NNP", "I-NP", "I-LOC", "PROPN"),
    ("and", "CC", "O", "O", "CCONJ"),
    ("{name}", "NNP", "I-NP", "I-PER", "PROPN"),
    ("quickly", "RB", "I-ADVP", "O", "ADV"),
    ("{action}", "VBZ", "I-VP", "O", "VERB"),
    ("{number}", "CD", "I-NP", "O", "NUM"),
    ("old", "JJ", "I-NP", "O", "ADJ"),
    ("friends", "NNS", "I-NP", "O", "NOUN"),
    (".", ".", "O", "O", "PUNCT"),
)
NAMES = ("Anna", "Peter", "Maria", "Ivan", "Laura", "Omar", "Yuki")
CITIES = ("Paris", "Berlin", "Lagos", "Lima", "Oslo")
NUMBERS = ("two", "three", "seven", "90")


def write_corpora(data: Path) -> None:
    """Sentences for the word-level tasks; every fifth one is three times as long."""
    for split, count, start in (("train", 80, 0), ("dev", 15, 500), ("test", 30, 900)):
        penn, universal = [], []
        for number in range(start, start + count):
            topic = topic_of(number)
            rows = []
            for at, (word, *labels) in enumerate(WORDS * (3 if number % 5 == 0 else 1)):
                person, action, thing, _, _ = parts_of(topic, 10 * number + 90 * at)
                filled = word.format(
                    name=pick(NAMES, number + at),
                    action=action,
                    thing=thing if at % 2 else person,
                    city=pick(CITIES, number + at),
                    number=pick(NUMBERS, number),
                )
                rows.append((filled, *labels))
            tokens, pos, chunk, ner, upos = (list(column) for column in zip(*rows, strict=True))
            penn.append({"tokens": tokens, "pos": pos, "chunk": chunk, "ner": ner})
            universal.append({"id": str(number), "text": " ".join(tokens), "tokens": tokens, "upos": upos})
        for folder, sentences in (("conll2003", penn), ("ud_ewt", universal)):
            (data / folder).mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(sentence) + "\n" for sentence in sentences)
            (data / folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def write_example_data(data: Path) -> Path:
    """Write all corpora of the offline suite and of the word-level tasks below `data`."""
    for write in (write_pairs, write_intents, write_titles, write_searches, write_corpora):
        write(data)
    return data
