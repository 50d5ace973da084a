"""Encoders whose files a record knows: compared with its canary, unless an option changed their vectors."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from unmask.catalogue import Catalogue, Record, record_for
from unmask.catalogue.canary import make_canary
from unmask.catalogue.known_vectors import check_known_vectors
from unmask.encoder import Encoder
from unmask.encoder.load_check import checking_loads
from unmask.errors import CheckpointError

TEXT = "a canary of a few words"


def knowing(folder: Path, **fields: Any) -> Catalogue:
    """A catalogue with a record of `folder` whose canary is a wrong vector."""
    encoder = Encoder.load(folder)
    canary = make_canary(TEXT, -encoder.encode(TEXT)[0])
    catalogue = Catalogue()
    record: Record = msgspec.structs.replace(record_for("org/live"), revision=encoder.checkpoint.revision)
    catalogue.put(msgspec.structs.replace(record, canary=canary, **fields))
    return catalogue


@pytest.fixture
def folder(golden_dir: Path) -> Path:
    return golden_dir / "tiny_llama"


def test_another_vector_than_the_canary_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny_llama loaded, but the files of revision .* cosine -1\.0"):
        check_known_vectors(Encoder.load(folder), knowing(folder))


def test_the_right_vector_and_files_that_nobody_knows_pass(folder: Path, golden_dir: Path) -> None:
    encoder = Encoder.load(folder)
    right = Catalogue()
    canary = make_canary(TEXT, encoder.encode(TEXT)[0])
    right.put(msgspec.structs.replace(record_for("org/live"), revision=encoder.checkpoint.revision, canary=canary))
    check_known_vectors(encoder, right)
    check_known_vectors(Encoder.load(folder, dtype="int8"), right)
    check_known_vectors(Encoder.load(golden_dir / "tiny_gemma"), knowing(folder))


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "last_token"},
        {"causal": True},
        {"max_length": 4},
        {"compat": "reference"},
        {"layers": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_vectors_that_an_option_changes_are_not_compared(folder: Path, options: dict[str, Any]) -> None:
    check_known_vectors(Encoder.load(folder, **options), knowing(folder))


@pytest.mark.parametrize("options", [{"pooling": "mean"}, {"causal": False}, {"max_length": 300}])
def test_options_that_change_nothing_are_compared(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        check_known_vectors(Encoder.load(folder, **options), knowing(folder))


def test_a_record_without_a_revision_is_found_by_its_id(folder: Path) -> None:
    """As the shipped ones. Fewer layers of the same model are other files' vectors."""
    catalogue = knowing(folder, id=str(folder), revision=None)
    with pytest.raises(CheckpointError, match="its weights are not the published ones"):
        check_known_vectors(Encoder.load(folder), catalogue)
    check_known_vectors(Encoder.load(folder, layers=2), catalogue)


def test_a_check_that_is_handed_in_runs_at_every_load_of_its_block(folder: Path) -> None:
    seen: list[str] = []
    with checking_loads(lambda encoder: seen.append(encoder.name)):
        Encoder.load(folder)
        Encoder.load(folder, dtype="float32")
    Encoder.load(folder)
    assert seen == [str(folder)] * 2
