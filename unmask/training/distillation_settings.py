"""The part of a recipe on distillation: teachers, their vectors as targets, and the weights of the losses."""

from typing import Annotated

from msgspec import Meta, Struct

from unmask.training.number_types import Positive, Rate


class Teacher(Struct, forbid_unknown_fields=True, kw_only=True):
    """One of several teachers, whose concatenated vectors are the target.

    Attributes:
        model: a model that `unmask evaluate` can measure: a folder, an endpoint, one of ours.
        name: for overrides, as in --set distillation.teachers.NAME.model=FOLDER.
        prompt: put before every text; left out: the model's own default.
        weight: of its cosines in those of the target.
        centre: subtract the mean vector of a sample. Without it a teacher whose vectors all point into one half of
            the space drowns the others.
    """

    model: str
    name: str = ""
    prompt: str | None = None
    weight: Rate = 1.0
    centre: bool = True


class Ranking(Struct, forbid_unknown_fields=True, kw_only=True):
    """Distillation of a teacher's ranking of the batch's passages for each query, for data with queries and positives.

    Attributes:
        model: the teacher; its query and document prompts are `query_prompt` and `document_prompt`.
        weight: weight of the Kullback-Leibler divergence between the two rankings.
        temperature: temperature of both.
    """

    model: str
    query_prompt: str = ""
    document_prompt: str = ""
    weight: Rate = 1.0
    temperature: Rate = 0.05


class Distillation(Struct, forbid_unknown_fields=True, kw_only=True):
    """Distillation of the vectors of one teacher, or of several concatenated.

    The target of a text is the concatenation of the teachers' unit vectors, each centred and scaled, rotated by PCA so
    that its first numbers carry most of the variance. The rotation is fitted once and stored with the run.

    Attributes:
        teacher: a single teacher, not centred.
        teachers: several teachers, or one with options.
        dimensions: length of the target; default: that of all teachers' vectors together.
        sample: number of texts that centring and PCA are fitted on.
        targets: `targets.npz` of an earlier run with the same teachers. Its means and rotation are used and nothing is
            fitted, so that models of both runs share a space, and a model of the first keeps its head in the second.
        vector_weight: weight of 1 - cosine between vector and target (LEAF, arXiv 2509.12539; Jasper, arXiv
            2412.19048). It needs vectors of the target's length: see `head`.
        weight: weight of the Kullback-Leibler divergence between the similarities within a batch.
        temperature: temperature of both similarity distributions.
        similarity_weight: weight of the squared error of the cosines.
        ranking: a further teacher for data with queries and positives.
    """

    teacher: str | None = None
    teachers: list[Teacher] = []
    dimensions: Positive | None = None
    sample: Positive = 20_000
    targets: str | None = None
    vector_weight: Annotated[float, Meta(ge=0.0)] = 0.0
    weight: Annotated[float, Meta(ge=0.0)] = 1.0
    temperature: Rate = 0.05
    similarity_weight: Annotated[float, Meta(ge=0.0)] = 0.0
    ranking: Ranking | None = None

    def __post_init__(self) -> None:
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("distillation: name either teacher or teachers")

    def ensemble(self) -> list[Teacher]:
        """Return the teachers as a list, whichever of the two fields names them."""
        return self.teachers or [Teacher(model=self.teacher or "", centre=False)]
