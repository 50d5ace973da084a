"""Target vectors of a distillation: several teachers' unit vectors side by side, centred and rotated.

Cosines between targets are the weighted mean of the teachers' own (ensemble distillation, arXiv 2104.06719; vectors
side by side as in Jasper, arXiv 2412.19048). PCA shortens them to the student's length and orders them, so that the
first numbers of a student that learns them are a Matryoshka prefix.

Letters in shape comments:
    N  texts     A  numbers of all teachers together     W  length of a target
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from unmask.disk import atomic_write
from unmask.encoder.unit_length import unit_length
from unmask.errors import StorageError, UsageError
from unmask.evaluate.cache import VectorCache
from unmask.evaluate.models import open_model
from unmask.evaluate.models.embedding_model import EmbeddingModel
from unmask.home import home
from unmask.training.distillation_settings import Distillation, Ranking, Teacher

FILE = "targets.npz"
# Texts whose vectors are in memory at a time, while the rotation is fitted and while targets are computed.
_BLOCK = 16_384

Count = Callable[[int], None]  # texts done just now


class Prompted(Protocol):
    """A teacher that takes its prompt beside the texts."""

    def encode_with_prompt(self, texts: Sequence[str], prompt: str | None) -> np.ndarray: ...


class TeacherVectors:
    """One teacher's unit vectors, each computed once per prompt and kept on disk with those of `unmask evaluate`."""

    def __init__(self, model: str) -> None:
        self.model: EmbeddingModel = open_model(model, {"dtype": "float32"})
        self.cache = VectorCache(home() / "vectors", self.model.revision, self.model.dimensions)

    def encode(self, texts: Sequence[str], prompt: str | None, progress: Count | None = None) -> np.ndarray:
        """float32 [N, dimensions], each of length 1.

        Args:
            prompt: put before each text; None for the model's own default.
            progress: called with the number of texts done just now.
        """

        def compute(missing: list[str]) -> np.ndarray:
            if prompt is None:
                return self.model.encode(missing)
            if hasattr(self.model, "encode_with_prompt"):
                prompted: Prompted = self.model  # pyright: ignore[reportAssignmentType]
                return prompted.encode_with_prompt(missing, prompt)
            return self.model.encode([prompt + text for text in missing])

        key = "" if prompt is None else f"prompt: {prompt}"
        return unit_length(self.cache.encode(texts, key, compute, progress=progress))


def targets_file(settings: Distillation, data: Path) -> Path | None:
    """Return the file of the earlier run whose rotation the recipe uses, or None. Paths are relative to the data.

    Raises:
        UsageError: there is no such file.
    """
    if settings.targets is None:
        return None
    file = data / settings.targets
    if not file.is_file():
        raise UsageError(f"distillation.targets: no file at {file}; name the {FILE} in the folder of an earlier run")
    return file


def compute_vectors(
    settings: Distillation, texts: Sequence[str], progress: Callable[[str, int, int], None] = lambda *_: None
) -> None:
    """Compute every teacher's vectors of texts and keep them on disk. Those that are there are not computed again.

    Args:
        progress: called with a description, the texts done just now, and the number of all texts.

    Raises:
        UsageError: a teacher cannot be opened.
        StorageError: vectors cannot be kept.
    """
    for teacher in settings.ensemble():
        vectors = TeacherVectors(teacher.model)
        report = partial(_report, progress, f"vectors of {vectors.model.name}", len(texts))
        for start in range(0, len(texts), _BLOCK):
            vectors.encode(texts[start : start + _BLOCK], teacher.prompt, report)


@dataclass(frozen=True)
class Rotation:
    """Map from the teachers' unit vectors to targets.

    Attributes:
        means: of each teacher's unit vectors, to be subtracted; zeros where a teacher is not centred.
        components: [A, W], orthonormal columns in order of the variance they carry; None: targets are not rotated.
        explained: share of the sample's squared length that the components carry.
    """

    means: tuple[np.ndarray, ...]
    components: np.ndarray | None
    explained: float

    def save(self, file: Path) -> None:
        """Write the rotation atomically."""
        arrays = {f"mean{i}": mean for i, mean in enumerate(self.means)} | {"kept": np.array(self.explained)}
        if self.components is not None:
            arrays["components"] = self.components
        with atomic_write(file) as partial_file, partial_file.open("wb") as opened:
            np.savez(opened, **arrays)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load(cls, file: Path) -> "Rotation":
        """Read a rotation that `save` wrote.

        Raises:
            StorageError: the file is damaged.
        """
        try:
            with np.load(file) as arrays:
                count = sum(name.startswith("mean") for name in arrays.files)
                means = tuple(arrays[f"mean{i}"] for i in range(count))
                components = arrays["components"] if "components" in arrays.files else None
                return cls(means, components, float(arrays["kept"]))
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(f"{file} is damaged ({error}); remove the run's folder to begin anew") from error


class Targets:
    """Computes the target vectors of texts.

    Args:
        settings: the teachers and the length.
        sample: texts of the data that means and components are fitted on.
        file: where the rotation is stored. If it exists, it is read and not fitted again.
        earlier: rotation of an earlier run, to be used instead of a fitted one.

    Raises:
        UsageError: a teacher cannot be opened, the target is longer than its vectors together, or the earlier rotation
            is of other teachers or of another length.
        StorageError: vectors or fit cannot be kept.
    """

    def __init__(self, settings: Distillation, sample: Sequence[str], file: Path, earlier: Path | None = None) -> None:
        self._teachers: list[tuple[Teacher, TeacherVectors]] = [
            (teacher, TeacherVectors(teacher.model)) for teacher in settings.ensemble()
        ]
        if file.is_file():
            self.rotation = Rotation.load(file)
        else:
            self.rotation = self._fit(settings, sample) if earlier is None else self._adopt(settings, earlier)
            self.rotation.save(file)
        components = self.rotation.components
        self.dimensions = sum(mean.size for mean in self.rotation.means) if components is None else components.shape[1]

    @property
    def revisions(self) -> dict[str, str]:
        """Content address of each teacher, by its name in the recipe."""
        return {teacher.model: vectors.model.revision for teacher, vectors in self._teachers}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, W], each of length 1."""
        joined = self._joined(texts, self.rotation.means)
        components = self.rotation.components
        return unit_length(joined if components is None else joined @ components)

    def _joined(self, texts: Sequence[str], means: Sequence[np.ndarray]) -> np.ndarray:
        """[N, A]: centred unit vectors side by side, each scaled by the root of its weight."""
        parts = [
            unit_length(vectors.encode(texts, teacher.prompt) - mean) * np.float32(teacher.weight**0.5)
            for (teacher, vectors), mean in zip(self._teachers, means, strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _adopt(self, settings: Distillation, earlier: Path) -> Rotation:
        """Read the rotation of an earlier run, and refuse one that does not belong to these teachers."""
        rotation = Rotation.load(earlier)
        theirs = [mean.size for mean in rotation.means]
        ours = [vectors.model.dimensions for _, vectors in self._teachers]
        if theirs != ours:
            raise UsageError(
                f"distillation.targets: {earlier} was fitted to teachers with {theirs} numbers, and the recipe's have "
                f"{ours}; name the same teachers in the same order"
            )
        length = sum(theirs) if rotation.components is None else rotation.components.shape[1]
        if length != (settings.dimensions or sum(ours)):
            raise UsageError(
                f"distillation.targets: {earlier} has targets of {length} numbers, and distillation.dimensions asks "
                f"for {settings.dimensions or sum(ours)}; set it to {length}"
            )
        return rotation

    def _fit(self, settings: Distillation, sample: Sequence[str]) -> Rotation:
        means = tuple(self._mean(teacher, vectors, sample) for teacher, vectors in self._teachers)
        total = sum(mean.size for mean in means)
        length = settings.dimensions
        if length is None:
            return Rotation(means, None, 1.0)
        if length > min(total, len(sample)):
            raise UsageError(
                f"distillation.dimensions = {length}: the teachers have {total} numbers together and the sample has "
                f"{len(sample)} texts; choose at most the smaller of the two"
            )
        moment = np.zeros((total, total))
        for start in range(0, len(sample), _BLOCK):
            block = self._joined(sample[start : start + _BLOCK], means).astype(np.float64)
            moment += block.T @ block
        values, vectors = np.linalg.eigh(moment)
        order = np.argsort(-values)[:length]
        components = vectors[:, order]
        # The sign of an eigenvector is arbitrary. Its largest number is made positive, so that all machines agree.
        components = components * np.sign(components[np.abs(components).argmax(axis=0), np.arange(length)])
        return Rotation(means, components.astype(np.float32), float(values[order].sum() / values.sum()))

    def _mean(self, teacher: Teacher, vectors: TeacherVectors, sample: Sequence[str]) -> np.ndarray:
        if not teacher.centre:
            return np.zeros(vectors.model.dimensions, dtype=np.float32)
        total = np.zeros(vectors.model.dimensions)
        for start in range(0, len(sample), _BLOCK):
            total += vectors.encode(sample[start : start + _BLOCK], teacher.prompt).sum(axis=0, dtype=np.float64)
        return (total / len(sample)).astype(np.float32)


class RankingTeacher:
    """Scores passages for queries: cosines of a teacher's vectors, made with its query and document prompts."""

    def __init__(self, settings: Ranking) -> None:
        self._settings, self._vectors = settings, TeacherVectors(settings.model)

    def queries(self, texts: Sequence[str], progress: Count | None = None) -> np.ndarray:
        """Unit vectors of queries, float32 [N, dimensions]."""
        return self._vectors.encode(texts, self._settings.query_prompt or None, progress)

    def documents(self, texts: Sequence[str], progress: Count | None = None) -> np.ndarray:
        """Unit vectors of documents, float32 [N, dimensions]."""
        return self._vectors.encode(texts, self._settings.document_prompt or None, progress)


def _report(progress: Callable[[str, int, int], None], name: str, total: int, done: int) -> None:
    progress(name, done, total)
