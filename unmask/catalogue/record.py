"""The record of a model: its specification for the engine, and its description for people."""

import re
from datetime import date
from typing import Literal

import msgspec

from unmask.catalogue.lifecycle import Event, Status, check_history


class Canary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text and its vector: normalised, in the record's own mode, little-endian float16, base64."""

    text: str
    vector: str


class Specification(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The facts about a model that callers and the engine need. None means not known; no field is a guess.

    Attributes:
        id, aliases: names a request may use. One of them contains "embed", which some clients filter by.
        parameters: of the decoder, embedding included.
        matryoshka: shorter lengths to which its vectors may be cut.
        max_tokens: longest sequence, everything counted.
        compat: mode of text handling: "reference" gives the published LLM2Vec vectors, quirks included.
        trained: False if the weights are a decoder's own, with no embedding training.
        created: Unix seconds.
        revision: content address of the weights, known once they are loaded.
    """

    id: str
    aliases: tuple[str, ...] = ()
    name: str = ""
    summary: str = ""
    task: str = "embeddings"
    architecture: str | None = None
    base: str | None = None
    parameters: int | None = None
    dimensions: int | None = None
    matryoshka: tuple[int, ...] = ()
    max_tokens: int | None = None
    pooling: str | None = None
    query_instruction: str = ""
    document_instruction: str = ""
    compat: Literal["default", "reference"] = "default"
    licence: str | None = None
    trained: bool | None = None
    notes: tuple[str, ...] = ()
    created: int = 0
    owned_by: str = ""
    revision: str | None = None
    canary: Canary | None = None


class About(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Plain texts about the model; a blank line begins a paragraph."""

    approach: str = ""
    performance: str = ""
    architecture: str = ""


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of a model's FAQ."""

    question: str
    answer: str


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A link to a page elsewhere."""

    title: str
    url: str

    def __post_init__(self) -> None:
        if not is_web_address(self.url):
            raise ValueError(f"the link {self.url!r} is no https address")


class Downloads(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Downloads of the last month, as somebody counted them on a day."""

    per_month: int
    on: date
    source: str


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Price of a million tokens, in nano-dollars.

    Attributes:
        tier: "standard", or a cheaper one that may wait.
        estimated: proposed from measurements, and not yet charged to anybody.
    """

    tier: str = "standard"
    nanodollars_per_million_tokens: int
    estimated: bool = False

    def __post_init__(self) -> None:
        if self.nanodollars_per_million_tokens < 0:
            raise ValueError(f"the price {self.nanodollars_per_million_tokens} is below zero")


class Provider(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A provider that serves the model under its id."""

    name: str
    since: date | None = None


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change of the record or the weights."""

    on: date
    note: str


class Record(Specification, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A catalogue entry. None and empty mean not known.

    Attributes:
        role: "reference" is a model that others are measured against and that this project does not serve.
        context: longest sequence that the architecture can attend to. `max_tokens` is the part that is used.
        base_licence: of the weights that the model was made from, where it is another one.
        published, updated: days on which the makers of the model did so.
        history: of its status, oldest first.
    """

    role: Literal["offered", "reference"] = "offered"
    about: About = About()
    best_for: tuple[str, ...] = ()
    faq: tuple[Question, ...] = ()
    languages: tuple[str, ...] = ()
    context: int | None = None
    base_licence: str | None = None
    published: date | None = None
    updated: date | None = None
    downloads: Downloads | None = None
    links: tuple[Link, ...] = ()
    providers: tuple[Provider, ...] = ()
    prices: tuple[Price, ...] = ()
    history: tuple[Event, ...] = ()
    changes: tuple[Change, ...] = ()

    def __post_init__(self) -> None:
        check_history(self.history)

    @property
    def status(self) -> Status | None:
        """The status after the last step of its history."""
        return self.history[-1].status if self.history else None


def is_web_address(text: str) -> bool:
    """True if a text may be the target of a link: an https URL without characters that a browser would reinterpret."""
    return re.fullmatch(r"https://[A-Za-z0-9.-]+(:\d+)?(/[^\s\"'<>\\^`{|}]*)?", text) is not None
