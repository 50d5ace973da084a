"""Cross-checks: a provider that has learned all canaries is given away by a text that nobody has seen."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tests.api.live import running, until
from tests.router.fault_server import fault_server_thread
from tests.router.test_providers import MODEL, SLOW, providers_file
from unmask.encoder import Encoder
from unmask.router.cross_check import Opinion, compare_opinions
from unmask.router.endpoint import ProviderEndpoint

A, B, C = (cast(ProviderEndpoint, name) for name in "abc")
RIGHT, WRONG = np.eye(8, dtype=np.float32)[:2]


def near(off: float) -> np.ndarray:
    """A vector whose 1 - cosine to the right one is `off`."""
    return np.array([1 - off, (1 - (1 - off) ** 2) ** 0.5, *[0] * 6], dtype=np.float32)


@pytest.mark.parametrize(
    ("vectors", "wrong_endpoints", "suspects"),
    [
        ({None: RIGHT, A: RIGHT}, [], []),
        ({None: RIGHT, A: WRONG}, [A], []),
        ({A: RIGHT, B: near(1e-4)}, [], []),
        ({A: RIGHT, B: WRONG}, [], [A, B]),
        ({A: RIGHT, B: RIGHT, C: WRONG}, [C], []),
        ({A: WRONG, B: RIGHT, C: near(3e-4)}, [A], []),
        ({A: RIGHT, B: WRONG, C: -RIGHT}, [], [A, B, C]),
        ({A: WRONG}, [], []),
        ({None: RIGHT}, [], []),
        ({}, [], []),
    ],
)
def test_who_is_wrong(vectors: dict[Any, np.ndarray], wrong_endpoints: list[Any], suspects: list[Any]) -> None:
    opinions = [Opinion(party, vector, 1e-4) for party, vector in vectors.items()]
    assert compare_opinions(opinions) == (wrong_endpoints, suspects)


def test_a_provider_that_has_learned_all_canaries_is_out_after_one_cross_check(
    encoder: Encoder, tiny_llama: Path, tmp_path: Path
) -> None:
    """Two honest ones are against it: the third of three is quarantined, though every canary is right."""
    lock, memory, lies = threading.Lock(), set[str](), threading.Event()

    def honest(texts: Sequence[str], instruction: str) -> np.ndarray:
        with lock:
            return encoder.encode(list(texts), instruction=instruction, normalize=True)

    def learned(texts: Sequence[str], instruction: str) -> np.ndarray:
        rows = honest(texts, instruction)
        return np.stack(
            [v if text in memory or not lies.is_set() else np.roll(v, 1) for v, text in zip(rows, texts, strict=True)]
        )

    with (
        fault_server_thread(honest) as a,
        fault_server_thread(honest) as b,
        fault_server_thread(learned) as c,
    ):
        file = providers_file(tmp_path, a.url, b.url)
        entry = f'[[provider]]\nname = "c"\nkind = "openai"\nurl = "{c.url}"\nprivate = true\n'
        file.write_text(f'cross_check = 1.0\n{file.read_text()}{entry}[[provider.model]]\nid = "{MODEL}"\n')
        with running(tiny_llama, providers_file=file, intervals=SLOW, warm=()) as service:
            assert service.models.providers is not None
            group = service.models.providers.models()[MODEL]
            until(lambda: all(endpoint.admission == "admitted" for endpoint in group.endpoints), 60)

            def embed(text: str) -> None:
                body = {"model": MODEL, "input": text, "provider": {"only": ["c"]}}
                assert service.call("POST", "/v1/embeddings", body).status == 200
                until(lambda: group.cross_check is None)

            embed("a ferry leaves")
            assert all(endpoint.admission == "admitted" for endpoint in group.endpoints)
            assert group.references is not None
            memory |= {canary.text for canary in group.references.canaries} | {*group.references.unpublished.texts}
            lies.set()
            embed("bread rises")
            admissions = {endpoint.provider.name: endpoint.admission for endpoint in group.endpoints}
            assert admissions == {"a": "admitted", "b": "admitted", "c": "quarantined"}
            finding = group.endpoint("c").finding
            verdict = service.models.providers._verdicts["c", MODEL]
            assert verdict.is_quarantine and verdict.actor == "cross-check"  # which `readmit = "auto"` does not end
            assert finding == "c gives a new text another vector than all others do"
