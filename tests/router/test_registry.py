"""Several models in one process: loaded on first use, believed only while their canary is right."""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Event

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unmask.catalogue import Catalogue, record_for
from unmask.catalogue.canary import CANARY_TEXT, make_canary
from unmask.checkpoint import DEFAULT_MODEL, open_checkpoint
from unmask.encoder import Encoder
from unmask.encoder.runtime.int8 import Int8Linear
from unmask.errors import CheckpointError, ClusterLost, ModelLoading, UsageError
from unmask.router import ModelOptions, ModelRegistry
from unmask.router.route import find_route
from unmask.router.served_model import ServedModel, _LoadedModel
from unmask.server.process import reload_on_hangup


async def test_models_load_on_first_use_and_check_their_canary(golden_dir: Path) -> None:
    models = ModelRegistry([str(golden_dir / "tiny_llama"), str(golden_dir / "tiny_gemma")])
    await models.start_loading()
    llama = models.find("tiny_llama-embed")
    assert llama is not None and llama.state == "cold"
    with pytest.raises(ModelLoading) as loading:
        await llama.engine()
    assert loading.value.retry_after >= 1
    engine = await llama.engine(wait=60)
    assert llama.state == "ready" and llama.record.dimensions == engine.encoder.dim == 64
    assert await models.canaries() == {"tiny_llama": "ok"}
    await models.close()


async def test_a_changed_weight_is_caught_by_the_canary(golden_dir: Path) -> None:
    models = ModelRegistry([str(golden_dir / "tiny_llama")], warm=["tiny_llama"])
    model = models.list()[0]
    engine = await model.engine(wait=60)
    assert isinstance(engine.encoder, Encoder)
    engine.encoder.trainable_decoder().get_parameter("embedding.weight").data.mul_(-3).add_(0.1)
    verdict = (await models.canaries())["tiny_llama"]
    assert "cosine" in verdict
    await models.close()


@pytest.mark.parametrize(("knows_revision", "message"), [(True, "at fault"), (False, "not the published ones")])
async def test_other_vectors_than_the_records_are_refused(golden_dir: Path, knows_revision: bool, message: str) -> None:
    folder = golden_dir / "tiny_llama"
    encoder = Encoder.load(folder)
    revision = encoder.checkpoint.revision if knows_revision else None
    canary = make_canary(CANARY_TEXT, -encoder.encode(CANARY_TEXT)[0])
    record = msgspec.structs.replace(record_for(str(folder)), revision=revision, canary=canary)
    model = ServedModel(str(folder), record)
    with pytest.raises(CheckpointError, match=rf"{message}.*cosine -1\.0"):
        await model.engine(wait=60)


@pytest.mark.parametrize("sign", [1, -1], ids=["the same vector", "another vector"])
async def test_files_that_another_record_knows_are_checked_by_its_canary(golden_dir: Path, sign: int) -> None:
    """A local folder, served by its path, whose revision went live under another id."""
    folder = golden_dir / "tiny_llama"
    encoder = Encoder.load(folder)
    canary = make_canary("another text", sign * encoder.encode("another text")[0])
    catalogue = Catalogue()
    live = msgspec.structs.replace(record_for("org/live"), revision=encoder.checkpoint.revision, canary=canary)
    catalogue.put(live)
    models = ModelRegistry([str(folder)], catalogue=catalogue)
    served = models.list()[0]
    if sign > 0:
        await served.engine(wait=60)
    else:
        with pytest.raises(CheckpointError, match=r"tiny_llama loaded, but the files of revision .* cosine -1\.0"):
            await served.engine(wait=60)
    await models.close()


async def test_a_model_that_cannot_be_loaded_says_why(copied) -> None:
    folder = copied("tiny_llama")
    (folder / "tokenizer.json").unlink()
    models = ModelRegistry([str(folder)], warm=["tiny_llama"])
    await models.start_loading()
    model = models.list()[0]
    with pytest.raises(CheckpointError, match="no tokenizer"):
        await model.engine(wait=60)
    assert model.state == "failed" and "no tokenizer" in (await models.canaries())["tiny_llama"]
    await models.close()


def test_loading_may_begin_before_there_is_an_event_loop(copied, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = Encoder.load
    monkeypatch.setattr(Encoder, "load", lambda source, **options: (loads.append(source), load(source, **options))[1])
    good, bad = str(copied("tiny_llama")), copied("tiny_gemma")
    (bad / "tokenizer.json").unlink()
    models = ModelRegistry([good, str(bad)], warm=[good, str(bad)])
    models.preload()

    async def serve() -> None:
        await models.start_loading()
        assert (await models.list()[0].engine(wait=60)).encoder.dim == 64
        with pytest.raises(CheckpointError, match="no tokenizer"):
            await models.list()[1].engine(wait=60)
        await models.close()

    asyncio.run(serve())
    assert sorted(loads) == sorted([good, str(bad)])


def test_a_device_that_is_not_here_is_said_at_the_start(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device, why in (("cuda", "sees no GPU here"), ("nowhere", "name a device of torch")):
        with pytest.raises(UsageError, match=why):
            ModelRegistry([str(golden_dir / "tiny_llama")], options=ModelOptions(device=device))


def test_two_models_of_one_name(golden_dir: Path, copied) -> None:
    with pytest.raises(UsageError, match="both be called 'tiny_llama'"):
        ModelRegistry([str(golden_dir / "tiny_llama"), str(copied("tiny_llama"))])
    with pytest.raises(UsageError, match="not among the served"):
        ModelRegistry([str(golden_dir / "tiny_llama")], warm=["other"])


async def test_auto_says_what_it_became_and_why(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.encoder.precision_choices.home", lambda: tmp_path)
    models = ModelRegistry([str(golden_dir / "tiny_llama")], options=ModelOptions(dtype="auto"))
    served = models.list()[0]
    assert (served.dtype, served.dtype_reason) == ("auto", "")
    engine = await served.engine(wait=60)
    assert served.dtype == engine.encoder.dtype_choice.dtype != "auto"
    assert "192,960 weights" in served.dtype_reason
    assert set((await models.canaries()).values()) == {"ok"}
    await models.close()


@pytest.mark.slow
async def test_eight_bits_are_served_and_their_canary_holds() -> None:
    models = ModelRegistry([DEFAULT_MODEL], warm=[DEFAULT_MODEL], options=ModelOptions(dtype="int8"))
    engine = await models.list()[0].engine(wait=60)
    assert isinstance(engine.encoder, Encoder)
    assert any(isinstance(module, Int8Linear) for module in engine.encoder.trainable_decoder().modules())
    assert await models.canaries() == {DEFAULT_MODEL: "ok"}
    await models.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def revision_of(model: Path, folder: Path, amount: float) -> Path:
    """Write another revision of a model, whose weights differ by an amount."""
    shutil.copytree(model, folder)
    [weights] = folder.glob("*.safetensors")
    save_file({name: tensor + torch.full_like(tensor, amount) for name, tensor in load_file(weights).items()}, weights)
    return folder


async def test_a_hangup_replaces_a_revision_and_no_request_has_vectors_of_both(copied, tmp_path: Path) -> None:
    first = copied("tiny_llama")
    second = revision_of(first, tmp_path / "second", 0.01)
    old, new = (Encoder.load(folder, dtype="float32") for folder in (first, second))
    models = ModelRegistry([str(first)], options=ModelOptions(dtype="float32"))
    served = models.list()[0]
    engine = await served.engine(wait=60)
    reload_on_hangup(models)
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: served._renewal is not None and served._renewal.done())
    assert await served.engine() is engine  # the files are the same
    begun = await find_route(served, None, 0)
    with begun.lease():
        prompts = await begun.prepare(["a text"], instruction="", truncate=False)
        first.rename(tmp_path / "away")
        second.rename(first)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: served.record.revision == new.checkpoint.revision)
        later = await find_route(served, None, 0)
        assert begun.vector_space("exact") != later.vector_space("exact")
        assert begun.engine is not None and later.engine is not None
        np.testing.assert_array_equal(await begun.engine.run(prompts), old.encode(["a text"]))
        np.testing.assert_array_equal(await later.engine.run(prompts), new.encode(["a text"]))
        assert await models.canaries() == {"tiny_llama": "ok"}
    await until(lambda: served._renewal is not None and served._renewal.done())
    assert begun.engine._stopping
    (first / "tokenizer.json").unlink()
    models.renew()
    await until(lambda: served._renewal is not None and served._renewal.done())
    assert await served.engine() is later.engine  # files that cannot be loaded change nothing
    await models.close()
    renewal = served._renewal
    os.kill(os.getpid(), signal.SIGHUP)  # as systemd may send it after SIGTERM
    await asyncio.sleep(0.1)
    assert served._renewal is renewal
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


async def test_a_hangup_while_files_are_read_is_kept_for_later(
    copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are read for the first load, or after an earlier hangup, may be those before this hangup."""
    folder = copied("tiny_llama")
    others = [revision_of(folder, tmp_path / name, amount) for name, amount in (("second", 0.01), ("third", 0.02))]
    revisions = [open_checkpoint(other).revision for other in others]
    models = ModelRegistry([str(folder)], options=ModelOptions(dtype="float32"))
    served = models.list()[0]
    read_files, loaded, go_on = served._load_weights, Event(), Event()

    def load() -> _LoadedModel:
        model = read_files()
        loaded.set()
        go_on.wait()
        return model

    monkeypatch.setattr(served, "_load_weights", load)
    served.load_in_background()
    for number, (other, revision) in enumerate(zip(others, revisions, strict=True)):
        await asyncio.to_thread(loaded.wait)
        folder.rename(tmp_path / f"away-{number}")
        other.rename(folder)
        models.renew()
        loaded.clear()
        go_on.set()
        if number == 0:  # the renewal is held while it has read the second files
            await asyncio.to_thread(loaded.wait)
            go_on.clear()
        else:
            await until(lambda revision=revision: served.record.revision == revision)
    await models.close()


@pytest.mark.parametrize("grace", [0.0, 60.0])
async def test_a_load_does_not_answer_for_a_cluster_that_is_lost_meanwhile(golden_dir: Path, grace: float) -> None:
    served = ServedModel(str(golden_dir / "tiny_llama"))
    waiting = asyncio.create_task(served.engine(wait=60))
    await asyncio.sleep(0)
    await served.lose_replicas("its head does not answer", grace)
    with pytest.raises(ClusterLost, match="its head does not answer"):
        await waiting
    with pytest.raises(ClusterLost, match="its head does not answer"):
        await served.engine()
    served.find_replicas()
    assert (await served.engine(wait=60)).encoder.dim == 64
    await served.close(0.0)


async def test_a_renewal_and_the_last_requests_share_one_grace(
    copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is stopped while it reads new files ends in the time that it was given, not in twice that."""
    folder = copied("tiny_llama")
    other = revision_of(folder, tmp_path / "other", 0.01)
    served = ServedModel(str(folder), options=ModelOptions(dtype="float32"))
    engine = await served.engine(wait=60)
    folder.rename(tmp_path / "away")
    other.rename(folder)
    began, over, graces = Event(), Event(), list[float]()

    def load() -> None:
        began.set()
        over.wait()

    monkeypatch.setattr(served, "_load_weights", load)
    monkeypatch.setattr(engine, "close", graces.append)
    served.renew_in_background()
    await asyncio.to_thread(began.wait)
    await served.close(0.5)
    assert served._renewal is not None
    served._renewal.cancel()
    over.set()  # its thread ends, also if the test fails
    monkeypatch.undo()
    engine.close()
    [left] = graces
    assert left < 0.25
