"""The models under test behind one protocol.

They are decoders, sentence-transformers folders, ONNX files, endpoints and static models.

`specification.py` says how a user names one.
"""

from collections.abc import Mapping

from unmask.evaluate.models.embedding_model import EmbeddingModel, TruncatedModel
from unmask.evaluate.models.specification import ModelSpecification, parse_specification

__all__ = ["EmbeddingModel", "TruncatedModel", "open_model"]


def open_model(specification: str, defaults: Mapping[str, str] | None = None) -> EmbeddingModel:
    """Load the model that a specification names.

    Args:
        specification: for example `unmask/smollm2-embed-6l?causal&name=uni`; see `specification.py`.
        defaults: option -> value for every model whose kind has the option, such as dtype and device.

    Raises:
        UsageError: the specification is wrong, or a package is missing.
        CheckpointError: the model's files cannot be used.
        EngineError: an endpoint does not answer.
    """
    parsed = parse_specification(specification, defaults)
    model, dimensions = _open(parsed), parsed.number("dimensions", 0)  # the model says how many it has
    return model if dimensions is None else TruncatedModel(model, dimensions)


def _open(specification: ModelSpecification) -> EmbeddingModel:
    # Each kind imports its own packages: a run over one kind needs none of the others'.
    match specification.kind:
        case "unmask":
            from unmask.evaluate.models.decoder import open_decoder

            return open_decoder(specification)
        case "sentence-transformers":
            from unmask.evaluate.models.sentence_transformers import open_folder

            return open_folder(specification)
        case "onnxruntime":
            from unmask.evaluate.models.onnx_file import open_onnx

            return open_onnx(specification)
        case "endpoint":
            from unmask.evaluate.models.endpoint import open_endpoint

            return open_endpoint(specification)
        case "static":
            from unmask.evaluate.models.static import open_static

            return open_static(specification)
