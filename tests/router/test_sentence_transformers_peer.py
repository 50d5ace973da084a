"""A peer of another maker: a server of 30 lines over sentence-transformers, right once and with each common mistake."""

import asyncio
import json
import random
import shutil
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from tests.checkpoint.layouts import LAYOUTS, write_layout
from unmask.conformance import Finding, References, build_references
from unmask.router.checks import full_check
from unmask.router.outbound import ProviderClient
from unmask.router.providers import ProviderModel, RemoteProvider

pytest.importorskip("sentence_transformers")

Model = Any  # SentenceTransformer, imported where it is used: that takes seconds
NAME = "google/embeddinggemma-300m"
LONGEST = 300


@contextmanager
def peer(model: Model, edit: Callable[[str], str] = str) -> Iterator[str]:
    """Serve a model behind OpenAI's API, as a short script of many people does. Yields the URL.

    `edit` changes texts before they are encoded. The field `instruction` is not known.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            vectors = model.encode([edit(text) for text in body["input"]], batch_size=8, convert_to_tensor=True)
            data = [{"index": i, "embedding": row} for i, row in enumerate(vectors.float().tolist())]
            content = json.dumps({"object": "list", "data": data, "model": body["model"]}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in EmbeddingGemma's layout: both directions, the mean of all tokens, BOS and EOS, two Dense."""
    layout = LAYOUTS[NAME]
    longer = replace(
        layout, lengths={"max_seq_length": LONGEST}, config={**layout.config, "max_position_embeddings": 1024}
    )
    place = tmp_path_factory.mktemp("peer") / "model"
    return write_layout(place, longer, **{"tokenizer_config.json": {"model_max_length": 1024}})


@pytest.fixture(scope="module")
def references(folder: Path) -> References:
    return build_references(str(folder), model="m", draw=random.Random(5))


@dataclass(frozen=True)
class Mistake:
    """A mistake of whoever set the peer up.

    Attributes:
        file, entries: of the folder, changed before it is loaded.
        change: of the loaded model.
        edit: of each text.
    """

    file: str = ""
    entries: dict[str, Any] | None = None
    change: Callable[[Model], object] = lambda model: None
    edit: Callable[[str], str] = str


def pooling(name: str) -> Mistake:
    return Mistake("1_Pooling/config.json", {"pooling_mode_mean_tokens": False, f"pooling_mode_{name}": True})


def around(template: str) -> Mistake:
    """Set the special tokens around a text."""

    def change(model: Model) -> None:
        tokenizer = model.tokenizer.backend_tokenizer
        names = [(name, tokenizer.token_to_id(name)) for name in ("<bos>", "<eos>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=None, special_tokens=names)

    return Mistake(change=change)


def at_most(tokens: int) -> Mistake:
    return Mistake(change=lambda model: setattr(model, "max_seq_length", tokens))


def without_last(model: Model) -> None:
    """Let the pooling, and nothing before it, forget each text's last token."""

    def shorten(module: object, arguments: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        (features,) = arguments
        mask = features["attention_mask"].clone()
        last = mask.cumsum(1).argmax(1)
        mask[range(len(mask)), last] = 0
        return ({**features, "attention_mask": mask},)

    model[1].register_forward_pre_hook(shorten)


def without_accents(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(character for character in decomposed if not unicodedata.combining(character))


MISTAKES: dict[str, Mistake] = {
    "pools the weighted mean; the model pools the mean": pooling("weightedmean_tokens"),
    "pools the last token; the model pools the mean": pooling("lasttoken"),
    "pools the first token; the model pools the mean": pooling("cls_token"),
    "leaves the last token out of the mean": Mistake(change=without_last),
    "leaves out the BOS token": around("$A <eos>"),
    "begins with two BOS tokens": around("<bos> <bos> $A <eos>"),
    "leaves out the EOS token": around("<bos> $A"),
    "lower-cases texts": Mistake(edit=str.lower),
    "strips accents": Mistake(edit=without_accents),
    "changes texts to NFC": Mistake(edit=lambda text: unicodedata.normalize("NFC", text)),
    "joins lines and blanks": Mistake(edit=lambda text: " ".join(text.split())),
    "replaces line breaks by blanks": Mistake(edit=lambda text: text.replace("\n", " ")),
    "cuts texts at 128 tokens": at_most(128),
    "cuts texts at 256 tokens": at_most(256),
    f"cuts texts at {LONGEST - 2} tokens": at_most(LONGEST - 2),
    f"cuts texts at {LONGEST - 1} tokens": at_most(LONGEST - 1),
    # The bank keeps the half of the window that the bidirectional model has on the left.
    "keeps the causal mask": Mistake("config.json", {"use_bidirectional_attention": False, "sliding_window": 8}),
    "has a lower precision than declared (exact): like bfloat16": Mistake(change=lambda model: model.bfloat16()),
}


def load(folder: Path, mistake: Mistake, copy: Path) -> Model:
    from sentence_transformers import SentenceTransformer

    shutil.copytree(folder, copy)
    if mistake.entries is not None:
        file = copy / mistake.file
        file.write_text(json.dumps(json.loads(file.read_text()) | mistake.entries))
    model = SentenceTransformer(str(copy), device="cpu")
    mistake.change(model)
    return model


def finding_of(url: str, references: References, kind: Any = "openai", **fields: Any) -> Finding:
    settings: dict[str, Any] = {"precision": "float32"}  # 299 of 300 tokens would pass as float16
    model = ProviderModel(id="m", **settings | fields)
    provider = RemoteProvider(name="peer", kind=kind, url=url, private=True, models=(model,))

    async def check() -> Finding:
        client = ProviderClient(provider)
        try:
            return await full_check(client, model, references, draw=random.Random(2))
        finally:
            await client.close()

    return asyncio.run(check())


def test_a_right_peer_is_admitted_and_one_that_ignores_instructions_is_named(
    folder: Path, references: References, tmp_path: Path
) -> None:
    with peer(load(folder, Mistake(), tmp_path / "copy")) as url:
        finding = finding_of(url, references)
        assert finding.passed and finding.precision == "exact" and finding.worst < 1e-9, finding
        assert finding_of(url, references, "unmask").fault == "leaves out the instruction"


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_gets_its_sentence(folder: Path, references: References, tmp_path: Path, sentence: str) -> None:
    mistake = MISTAKES[sentence]
    with peer(load(folder, mistake, tmp_path / "copy"), mistake.edit) as url:
        finding = finding_of(url, references)
    assert not finding.passed and finding.fault == sentence


def test_every_mistake_of_the_bank_is_made(references: References) -> None:
    faults: Sequence[str] = [mistake.fault for mistake in references.bank]
    assert set(faults) - set(MISTAKES) == {"leaves out the instruction"}
