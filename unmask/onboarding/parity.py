"""Parity: comparison of our vectors with reference vectors from a file, or with those of `transformers`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unmask.catalogue.canary import CANARY_COSINE
from unmask.encoder import Encoder
from unmask.encoder.model.architectures import shape_of
from unmask.encoder.model.transformers_decoder import TransformersDecoder
from unmask.errors import GateFailed, UsageError
from unmask.evaluate.cost import sample_texts

_SAMPLE = 24


@dataclass(frozen=True)
class Parity:
    """The distance of two sets of vectors.

    Attributes:
        against: the reference, in words.
        cosine: lowest cosine of a pair.
        difference: largest absolute difference of two elements, divided by the root mean square of the reference.
        count: number of pairs.
    """

    against: str
    cosine: float
    difference: float
    count: int


def against_file(encoder: Encoder, file: Path) -> Parity:
    """Compare with an .npz of `texts` [n], `vectors` [n, dim] and, if there are any, `instructions` [n].

    Raises:
        UsageError: the file has other arrays, or its vectors another length.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            texts, vectors = [str(text) for text in stored["texts"]], np.asarray(stored["vectors"], dtype=np.float32)
            stored_instructions = stored["instructions"] if "instructions" in stored.files else [""] * len(texts)
            instructions = [str(text) for text in stored_instructions]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{file} holds no reference vectors (arrays texts and vectors in an .npz): {error}") from error
    if vectors.shape != (len(texts), encoder.dim) or len(instructions) != len(texts) or not texts:
        raise UsageError(
            f"{file} has {len(texts)} texts, {len(instructions)} instructions and vectors of shape "
            f"{list(vectors.shape)}; the model's vectors have {encoder.dim} numbers"
        )
    ours = np.concatenate(
        [encoder.encode(text, instruction=instruction) for text, instruction in zip(texts, instructions, strict=True)]
    )
    return _compare(ours, vectors, f"{len(texts)} given vectors")


def against_transformers(encoder: Encoder) -> Parity:
    """Compare with the same weights, run by `transformers` without its causal mask on the same tokens.

    Raises:
        UnsupportedArchitecture: transformers does not know the architecture, or keeps it causal.
    """
    checkpoint = encoder.checkpoint
    config = dict(checkpoint.config)
    if encoder.compat == "reference":
        config["sliding_window"] = None
    peer = Encoder(
        checkpoint,
        TransformersDecoder.load(config, checkpoint.tensors, torch.float32, "cpu"),
        encoder.prompts,
        pooling=encoder.pooling,
        max_length=encoder.max_length,
        compat=encoder.compat,  # pyright: ignore[reportArgumentType] - it came from there
        dim=encoder.dim,
    )
    texts = sample_texts()[:_SAMPLE]
    prompts = [*encoder.prompts.build(texts), *encoder.prompts.build(texts[:4], "Find passages that answer this:")]
    ours, theirs = encoder.encode_prompts(prompts), peer.encode_prompts(prompts)
    # Without a row in our table the model runs through transformers anyway, and this says only that it runs.
    own = "" if shape_of(config) is not None else ", which also runs it here"
    return _compare(ours, theirs, f"transformers{own}")


def require(parity: Parity) -> None:
    """Check that every pair of vectors is close enough.

    Raises:
        GateFailed: a pair is not.
    """
    least = CANARY_COSINE["float32"]
    if not parity.cosine >= least:
        raise GateFailed(
            f"of {parity.count} vectors one has cosine {parity.cosine:.6f} to {parity.against}, "
            f"and {least} is the least: look at pooling, compat and the order of adapters"
        )


def _compare(ours: np.ndarray, theirs: np.ndarray, against: str) -> Parity:
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosines: Sequence[float] = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    difference = float(np.abs(a - b).max() / np.sqrt((b**2).mean()))
    return Parity(against, float(np.min(cosines)), difference, len(a))
