"""Test the server's rule that callers who say nothing about precision get vectors of one space, whoever answers."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from tests.api.live import LocalService, running, until
from tests.router.fault_server import fault_server_thread
from tests.router.test_providers import MODEL, SLOW
from unmask.conformance import References
from unmask.conformance.references import vector_space
from unmask.encoder import Encoder
from unmask.encoder.precision_choices import PrecisionChoice
from unmask.router import ModelOptions, ModelRegistry, ServedModel
from unmask.router.route import space_of


@pytest.fixture
def bfloat16_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `dtype="auto"` become bfloat16, as on processors with AMX."""
    choice = PrecisionChoice("bfloat16", "faster on this machine")
    monkeypatch.setattr(
        "unmask.encoder.encoder.load_fastest", lambda name, identity, device, load: (load(choice.dtype), choice)
    )


@pytest.fixture
def exact_provider(encoder: Encoder, tmp_path: Path) -> Iterator[Path]:
    """File of providers with one, "a", whose vectors are exact."""
    with fault_server_thread(lambda texts, instruction: encoder.encode(list(texts), instruction=instruction)) as a:
        file = tmp_path / "providers.toml"
        file.write_text(
            f'[[provider]]\nname = "a"\nkind = "unmask"\nurl = "{a.url}"\nprivate = true\n'
            f'[[provider.model]]\nid = "{MODEL}"\n'
        )
        yield file


def until_admitted(service: LocalService) -> ServedModel:
    pool = service.models.providers
    assert pool is not None
    until(lambda: pool.models()[MODEL].any_admitted())
    return service.models.list()[0]


def test_providers_of_another_space_than_the_engines_answer_on_request_alone(
    exact_provider: Path, tiny_llama: Path
) -> None:
    with running(tiny_llama, providers_file=exact_provider, intervals=SLOW, warm=(), dtype="bfloat16") as service:
        served = until_admitted(service)
        cold = service.embed("a ferry leaves")
        assert (cold.status, cold.error["code"]) == (503, "model_loading")  # and not vectors of the other space
        until(lambda: served.state == "ready")
        replies = [service.embed("a ferry leaves") for _ in range(12)]
        assert {reply.headers["x-unmask-provider"] for reply in replies} == {"local"}
        other_reply = service.embed("a ferry leaves", provider={"precision": ["float32"], "only": ["a"]})
        assert (other_reply.status, other_reply.headers["x-unmask-provider"]) == (200, "a")
        refusal = service.embed("a ferry leaves", provider={"only": ["a"]})
        assert (refusal.status, refusal.error["code"]) == (503, "no_provider")
        own = replies[0].headers["x-unmask-vector-space"]
        other = other_reply.headers["x-unmask-vector-space"]
        assert own != other
        assert service.call("GET", f"/v1/models/{MODEL}").json["vector_space"] == own
        listed = service.call("GET", f"/v1/models/{MODEL}/endpoints").json
        assert listed["vector_space"] == own
        assert [(one["name"], one["precision"], one["vector_space"]) for one in listed["data"]] == [
            ("local", "bfloat16", own),
            ("a", "exact", other),
        ]


@pytest.mark.usefixtures("bfloat16_is_fastest")
def test_a_model_with_providers_has_one_space_before_and_after_it_is_loaded(
    exact_provider: Path, tiny_llama: Path
) -> None:
    with running(tiny_llama, providers_file=exact_provider, intervals=SLOW, warm=(), dtype="auto") as service:
        served = until_admitted(service)
        cold = service.embed("a ferry leaves")
        assert (cold.status, cold.headers["x-unmask-provider"]) == (200, "a")
        until(lambda: served.state == "ready")
        assert served.dtype == "float32" and "providers" in served.dtype_reason
        own = service.embed("a ferry leaves", provider={"only": ["local"]})
        assert own.headers["x-unmask-vector-space"] == cold.headers["x-unmask-vector-space"]
        np.testing.assert_allclose(cold.vectors, own.vectors, atol=1e-6)


@pytest.mark.usefixtures("bfloat16_is_fastest")
async def test_a_model_whose_precision_is_not_chosen_yet_has_no_space(tiny_llama: Path) -> None:
    models = ModelRegistry([str(tiny_llama)], options=ModelOptions(dtype="auto"))
    served = models.list()[0]
    served.update_record(msgspec.structs.replace(served.record, revision=None, pooling="mean"))
    assert served.precision_class is None and space_of(served) is None
    engine = await served.engine(wait=60)
    revision = engine.encoder.checkpoint.revision
    assert space_of(served) == vector_space(MODEL, revision, "mean", "default", "bfloat16")
    await models.close()
    again = ModelRegistry([str(tiny_llama)], options=ModelOptions(dtype="auto")).list()[0]
    again.record = served.record  # its revision is known, as after onboarding
    assert space_of(again) is None
    explicit = ModelRegistry([str(tiny_llama)], options=ModelOptions(dtype="bfloat16")).list()[0]
    explicit.record = served.record
    assert space_of(explicit) == space_of(served)


@pytest.mark.usefixtures("bfloat16_is_fastest")
async def test_providers_that_come_while_a_model_is_loaded_decide_its_precision(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter([False])
    served = ServedModel(
        str(tiny_llama), None, ModelOptions(dtype="auto"), None, has_providers=lambda id: next(answers, True)
    )
    engine = await served.engine(wait=60)
    assert (served.dtype, served.precision_class) == ("float32", "exact")
    await served.close(10)
    late = ServedModel(str(tiny_llama), None, ModelOptions(dtype="auto"))
    await late.engine(wait=60)
    references = SimpleNamespace(revision=engine.encoder.checkpoint.revision, dim=64, max_tokens=128, pooling="mean")
    with caplog.at_level(logging.WARNING, "unmask"):
        late.take_files({}, cast(References, cast(Any, references)))
    assert f"{MODEL} was loaded in bfloat16 before it had providers" in caplog.text
    assert late.precision_class == "bfloat16"  # its vectors stay of one space until the next start
    await late.close(10)
