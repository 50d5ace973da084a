"""Files whose vectors a record knows by its canary: other vectors mean that software, precision or files are wrong."""

from typing import TYPE_CHECKING

from unmask.catalogue.canary import check_vector, expected_vector
from unmask.catalogue.catalogue import Catalogue
from unmask.catalogue.record import Record
from unmask.errors import CheckpointError

if TYPE_CHECKING:
    from unmask.encoder import Encoder


def check_known_vectors(encoder: "Encoder", catalogue: Catalogue) -> None:
    """Compare an encoder's vector with the canary of the record that knows its files, if there is one.

    An encoder whose pooling, mask or length was replaced by an option has vectors of its own, and is not compared.

    Raises:
        CheckpointError: the vector is another one.
    """
    record = catalogue.with_revision(encoder.checkpoint.revision, encoder.compat) or _named_record(encoder, catalogue)
    if record is None or record.canary is None or not _is_as_published(encoder, record.canary.text):
        return
    vector = encoder.encode([record.canary.text])[0]
    verdict = check_vector(vector, expected_vector(record.canary), encoder.dtype_choice.dtype)
    if verdict != "ok":
        raise CheckpointError(f"{encoder.name} loaded, but {canary_problem(record)}: {verdict}")


def canary_problem(record: Record) -> str:
    """Say what a wrong canary vector means. The revision, where the record has one, has been compared before."""
    if record.revision is None:
        return "its weights are not the published ones"
    return (
        f"the files of revision {record.revision} give other vectors here than when the model went live, so the "
        f"software, precision or processor is at fault; run 'unmask onboard {record.id}' to measure it again"
    )


def _named_record(encoder: "Encoder", catalogue: Catalogue) -> Record | None:
    """Return the record of an encoder that was loaded by a model's id, from the model's files alone.

    A shipped record names no revision: its files are found by the id.
    """
    from unmask.checkpoint import open_checkpoint

    entry = catalogue.get(encoder.name)
    if entry is None or entry.record.canary is None or entry.record.compat != encoder.compat:
        return None
    is_whole = encoder.checkpoint.layers is None and entry.record.revision is None
    return entry.record if is_whole and open_checkpoint(encoder.name).files == encoder.checkpoint.files else None


def _is_as_published(encoder: "Encoder", text: str) -> bool:
    """True if no option of the load changed the vector of `text`. Left-out layers make another revision."""
    settings = encoder.checkpoint.encoder_config
    pooling, causal = str(settings.get("pooling_mode") or "mean"), bool(settings.get("causal", False))
    is_cut = encoder.prompts.build([text])[0].truncated
    return (encoder.pooling, encoder.causal) == (pooling, causal) and not is_cut
