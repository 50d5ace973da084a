"""The recipe of a training run: its fields, their defaults and their checks.

Every field has a type and a unit. An unknown or ill-typed field is an error that names it. `recipe_file` reads a recipe
from TOML. The resolved recipe is stored with the result.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from unmask.training.distillation_settings import Distillation
from unmask.training.number_types import DropoutRate, Positive, Rate, Share

# Modules with an adapter, by their names on the hub. LLM2Vec adapts every linear layer of a block.
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class DataSource(Struct, forbid_unknown_fields=True, kw_only=True):
    """One data set of the mixture.

    The named columns decide the kind of example:
        `text` alone            a text (MNTP, SimCSE, distillation)
        `text` and `label`      a text whose positive is another text of the same label
        `query` and `positive`  a pair, with any number of hard negatives

    Attributes:
        name: name in logs and metrics.
        path: a file in the data folder, or `hf:owner/name:config:split`.
        query, positive, negatives, text, label: column names. A negatives column may hold a list.
        instruction: added to queries; to both sides if `symmetric`.
        symmetric: query and positive are the same kind of text, so both get the instruction.
        weight: relative number of batches from this set; default: its number of rows.
        batch: examples per step from this set; default: the run's.
        limit: use this many rows, chosen by the seed.
        rows: even or odd: use every other row, counted from 0, so that one file can give two sets with an instruction
            each.
        share: use this share of the rows, chosen by the seed; a limit is applied after it.
        stream: read row by row through the run's shuffle buffer, not into memory; needs a weight.
        held_out: number of further rows that are not trained on but evaluated.
        only, without: keep, or drop, the rows whose column has one of these values.
        max_length: tokens per sequence in this set; default: the run's.
        max_characters: cut each text at the last space within this many characters, for the teacher too.
        piece_characters: split a long text into texts of whole sentences, with at most this number of characters
            each (a longer sentence is cut there). Pieces of fewer than three words are left out. Only with `text`,
            without a label.
        use_teacher: learn from the teacher's vectors of these texts, if there is a teacher.
        use_labels: learn from positives or labels. False leaves only distillation.
    """

    name: str
    path: str
    query: str | None = None
    positive: str | None = None
    negatives: list[str] = []
    text: str | None = None
    label: str | None = None
    instruction: str = ""
    symmetric: bool = False
    weight: Rate | None = None
    batch: Positive | None = None
    limit: Positive | None = None
    rows: Literal["all", "even", "odd"] = "all"
    share: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    stream: bool = False
    held_out: Annotated[int, Meta(ge=0)] = 0
    only: dict[str, list[str]] = {}
    without: dict[str, list[str]] = {}
    max_length: Positive | None = None
    max_characters: Positive | None = None
    piece_characters: Positive | None = None
    use_teacher: bool = True
    use_labels: bool = True

    def __post_init__(self) -> None:
        pair = self.query is not None and self.positive is not None
        if pair == (self.text is not None):
            raise ValueError(f"data {self.name!r}: name either query and positive, or text")
        if self.label is not None and self.text is None:
            raise ValueError(f"data {self.name!r}: label goes with text")
        if self.negatives and not pair:
            raise ValueError(f"data {self.name!r}: negatives go with query and positive")
        if self.piece_characters is not None and (self.text is None or self.label is not None):
            raise ValueError(f"data {self.name!r}: piece_characters goes with text, and excludes label")
        if self.stream and (self.weight is None or self.label or self.limit or self.share or self.held_out):
            raise ValueError(f"data {self.name!r}: stream needs a weight, and excludes label, limit, share, held_out")

    def columns(self) -> list[str]:
        """Return the names of all columns that this set is read from."""
        names = (self.query, self.positive, self.text, self.label, *self.negatives, *self.only, *self.without)
        return list(dict.fromkeys(filter(None, names)))


class Lora(Struct, forbid_unknown_fields=True, kw_only=True):
    """Low-rank adapters (arXiv 2106.09685). The update is alpha / rank * B @ A.

    Attributes:
        init_from: folder or name of an adapter to train further, of the same rank and targets; default: a new adapter.
    """

    init_from: str | None = None
    rank: Positive = 16
    alpha: Rate = 32.0
    dropout: DropoutRate = 0.05
    targets: list[str] = msgspec.field(default_factory=lambda: list(ALL_LINEAR))

    def __post_init__(self) -> None:
        unknown = [target for target in self.targets if target not in ALL_LINEAR]
        if unknown or not self.targets:
            raise ValueError(f"lora.targets: {unknown or self.targets}; choose from {', '.join(ALL_LINEAR)}")


class Optimiser(Struct, forbid_unknown_fields=True, kw_only=True):
    """AdamW (arXiv 1711.05101) or Muon, and its learning rate over the run.

    Attributes:
        method: "muon" updates the matrices of the decoder's layers by Muon (`optimiser.Muon`) and the rest by AdamW.
        lr: the highest learning rate.
        schedule: after the warm-up: linear or cosine to `final_share` of lr, constant, or wsd (constant, then linear
            over the last `decay_share` of the steps after the warm-up; arXiv 2404.06395).
        warmup: steps in which the rate rises from zero to lr.
        total_steps: steps that the schedule is computed over; default: the run's.
        clip: largest gradient norm; 0 for no limit.
        momentum: share of the earlier gradients in a matrix's momentum, for Muon.
        iterations: of Newton-Schulz, by which Muon makes a momentum orthogonal.
    """

    method: Literal["adamw", "muon"] = "adamw"
    lr: Rate = 5e-5
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    warmup: Annotated[int, Meta(ge=0)] = 0
    total_steps: Positive | None = None
    final_share: Share = 0.0
    decay_share: Share = 0.2
    weight_decay: Annotated[float, Meta(ge=0.0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: Rate = 1e-8
    clip: Annotated[float, Meta(ge=0.0)] = 1.0
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.95
    iterations: Positive = 5

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimiser.betas = {list(self.betas)}: both are 0 or more and below 1")


class Mntp(Struct, forbid_unknown_fields=True, kw_only=True):
    """Masked next-token prediction (arXiv 2404.05961, section 2.2).

    Attributes:
        probability: share of the tokens that are masked.
        masking: "bert" replaces 80 % of them by the mask token and 10 % by a random one; "all" replaces all.
        mask_token: the mask token; LLM2Vec used "_" for every base.
        block: tokens per sequence. Documents are cut to this length and never attend to each other.
    """

    probability: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.2
    masking: Literal["bert", "all"] = "bert"
    mask_token: str = "_"
    block: Positive = 512


class SimCse(Struct, forbid_unknown_fields=True, kw_only=True):
    """Two dropout views of each text (arXiv 2104.08821).

    Attributes:
        attention_dropout: dropout on attention weights, the noise between the views besides the adapter's own.
        temperature: temperature of the cosines.
    """

    attention_dropout: DropoutRate = 0.3
    temperature: Rate = 0.05


class Contrastive(Struct, forbid_unknown_fields=True, kw_only=True):
    """InfoNCE over in-batch and hard negatives, alone or beside distillation.

    Attributes:
        temperature: temperature of the cosines.
        hard_negatives: maximum number per query.
        false_negative_margin: an in-batch negative counts only if it is less similar to the query than the positive
            is by this margin (positive-aware; arXiv 2407.15831). The teacher's vectors decide if there is one, else
            the model's own. A query's own hard negatives always count: the data says that they are none of its
            positives. None: every other text is a negative.
        both_ways: for symmetric sets, positives also find their queries.
        weight: weight of this loss; 0 trains by distillation alone.
    """

    temperature: Rate = 0.02
    hard_negatives: Annotated[int, Meta(ge=0)] = 1
    # At 2, every candidate of whatever cosine would count as a false negative.
    false_negative_margin: Annotated[float, Meta(gt=-2.0, lt=2.0)] | None = None
    both_ways: bool = True
    weight: Annotated[float, Meta(ge=0.0)] = 1.0


class HeadSettings(Struct, forbid_unknown_fields=True, kw_only=True):
    """A linear layer after the pooling, trained and saved with the model.

    Attributes:
        dimensions: length of the vectors.
        ridge: number of texts for the ridge regression to the target that initialises the head. 0: the head starts as
            the first `dimensions` numbers of the pooled state. A base that has a head of this size keeps it.
        penalty: penalty of the regression, on standardised inputs.
        lr: highest learning rate of the head; default: the optimiser's.
        trained: update the head in training.
        refit: fit the head again even if the base has one.
        normalize: the model's vectors have length 1. The losses compare directions alone, so that lengths mean nothing;
            what measures distances, such as k-means, is better without them.
    """

    dimensions: Positive
    ridge: Annotated[int, Meta(ge=0)] = 4000
    penalty: Rate = 400.0
    lr: Rate | None = None
    trained: bool = True
    refit: bool = False
    normalize: bool = True


class Exit(Struct, forbid_unknown_fields=True, kw_only=True):
    """An early exit: a shallower model out of the same run, trained by the same losses on an inner layer's states.

    One run then gives models of several depths (Matryoshka in depth: 2DMSE, arXiv 2402.14776). Each exit has a head of
    its own, initialised like the main one, and shares the final norm.

    Attributes:
        layers: number of first layers of the shallower model.
        weight: weight of its loss; that of the full depth has weight 1.
    """

    layers: Positive
    weight: Rate = 0.5


class Save(Struct, forbid_unknown_fields=True, kw_only=True):
    """Options of writing a model, if all weights are trained.

    Attributes:
        precision: precision of the matrices. int8 stores a step size per row: a quarter of the bytes. The dequantised
            weights are the model from then on, on every device.
        embedding: write the token embedding too. Without it the folder is smaller and names the base for it.
        max_length: tokens per text that the model states; default: those it is trained with. A model may be trained
            on short texts, which is cheap, and read longer ones.
        takes_instructions: false states that the model was trained without instructions: evaluation gives none then.
        matryoshka: lengths to which users may cut its vectors, stated with the model. The components of a teacher's
            PCA are in order of variance, so that a model that learns them needs no loss of its own for each length.
    """

    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    embedding: bool = True
    max_length: Positive | None = None
    takes_instructions: bool | None = None
    matryoshka: list[Positive] = []


class Batch(Struct, forbid_unknown_fields=True, kw_only=True):
    """Batch size and memory limits.

    Attributes:
        size: examples per step, over all processes and accumulation rounds.
        forward_tokens: tokens of one forward (a micro-batch). Larger MNTP steps accumulate gradients.
        graph_tokens: tokens whose activations fit in memory together. A larger step uses GradCache (arXiv 2101.06983),
            which computes each forward twice, so that the batch does not depend on memory. Default: forward_tokens.
        sets: number of data sets that one batch is drawn from. 1: all in-batch negatives are of one kind. More: a
            teacher's similarities are learnt across sets, labels still within each set.
    """

    size: Positive = 64
    forward_tokens: Positive = 8192
    graph_tokens: Positive | None = None
    sets: Positive = 1

    def __post_init__(self) -> None:
        if self.sets > self.size:
            raise ValueError(f"batch.sets = {self.sets} is more than batch.size = {self.size}")


class Dev(Struct, forbid_unknown_fields=True, kw_only=True):
    """Text pairs with gold similarities. Their Spearman correlation is evaluated during the run.

    Attributes:
        path: a file with two text columns and a score.
        first, second, score: names of the columns.
        limit: use this many rows, chosen by the seed.
    """

    name: str
    path: str
    first: str
    second: str
    score: str
    limit: Positive | None = None


class Recipe(Struct, forbid_unknown_fields=True, kw_only=True):
    """One training run.

    Attributes:
        base: the decoder to start from: any name that `Encoder.load` takes.
        layers: keep only these of its layers: a number of first layers, or a list of layer numbers from 0.
        adapters: adapters merged into the base first, in this order.
        objective: mntp, simcse or supervised.
        data: the data sets. Each batch comes from one of them, or from `batch.sets`.
        steps: optimiser steps.
        max_epochs: stop early once every data set has been seen this many times.
        max_length: tokens per sequence, everything counted.
        pooling: as in `Encoder.load`; default: the base's own, else mean.
        causal: leave the causal mask on (true) or remove it (false). Default: as the base was made; a decoder's is
            removed.
        matryoshka: also train vectors truncated to these lengths (arXiv 2205.13147).
        head: a linear layer after the pooling; default: the base's own, which is not trained.
        exits: shallower models that the run trains along and writes beside the full one.
        lora: adapter to train; `lora = false` trains all weights.
        freeze_embedding: do not train the token embedding when all weights are trained.
        ema: decay of an exponential moving average of the trained parameters. The average is evaluated and written.
        save: options of writing a model, if all weights are trained.
        precision: precision of the forward. auto is bfloat16 where the processor computes in it, else float32. Trained
            parameters and the optimiser are float32 in any case.
        gradient_checkpointing: recompute activations in the backward, for less memory.
        shard: shard weights, gradients and optimiser state over the processes (FSDP), for models too large for one.
            "machine" shards over the processes of each machine alone, so that layers are not gathered over the network.
        decontaminate_against: folder of evaluation data, relative to the data folder. Training rows that overlap with
            it are dropped.
        max_bad_rows: share of unreadable rows above which the run stops.
        checkpoint_every, evaluate_every: steps.
        keep: number of resumable checkpoints on disk.
    """

    base: str
    objective: Literal["mntp", "simcse", "supervised"]
    data: Annotated[list[DataSource], Meta(min_length=1)]
    steps: Positive
    name: str = "run"
    layers: Positive | list[Annotated[int, Meta(ge=0)]] | None = None
    adapters: list[str] = []
    max_epochs: Rate | None = None
    max_length: Positive = 512
    pooling: Literal["mean", "weighted_mean", "eos_token", "last_token", "first_token", "bos_token"] | None = None
    causal: bool | None = None
    matryoshka: list[Positive] = []
    head: HeadSettings | None = None
    exits: list[Exit] = []
    lora: Lora | None = msgspec.field(default_factory=Lora)
    freeze_embedding: bool = False
    ema: Annotated[float, Meta(gt=0.0, lt=1.0)] | None = None
    save: Save = msgspec.field(default_factory=Save)
    optimiser: Optimiser = msgspec.field(default_factory=Optimiser)
    batch: Batch = msgspec.field(default_factory=Batch)
    mntp: Mntp = msgspec.field(default_factory=Mntp)
    simcse: SimCse = msgspec.field(default_factory=SimCse)
    contrastive: Contrastive = msgspec.field(default_factory=Contrastive)
    distillation: Distillation | None = None
    dev: list[Dev] = []
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    gradient_checkpointing: bool = False
    shard: bool | Literal["machine"] = False
    decontaminate_against: str | None = None
    max_bad_rows: Share = 0.01
    shuffle_buffer: Positive = 100_000
    checkpoint_every: Positive = 100
    evaluate_every: Positive = 100
    keep: Positive = 2
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 42

    def __post_init__(self) -> None:
        names = [source.name for source in self.data]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data: the name {twice[0]!r} is given twice")
        if self.max_epochs is not None:
            streamed = next((source.name for source in self.data if source.stream), None)
            if streamed is not None:
                raise ValueError(f"max_epochs: data {streamed!r} is streamed, so its length is not known")
        if len(set(self.matryoshka)) < len(self.matryoshka):
            raise ValueError(f"matryoshka = {self.matryoshka}: each length once")
        dev_names = [dev.name for dev in self.dev] + [source.name for source in self.data if source.held_out]
        shared = next((name for name in dev_names if dev_names.count(name) > 1), None)
        if shared is not None:
            raise ValueError(f"dev: the name {shared!r} is given twice; scores are told apart by it")
        self._check_distillation()
        self._check_schedule()
        self._check_objective()
        if self.layers is not None and self.lora is not None:
            raise ValueError(
                "layers goes with lora = false: an adapter does not say which layers its base has left. "
                "Write the shallower decoder with `unmask shear` and make it the base"
            )
        if self.lora is not None and self.save != Save():
            raise ValueError(
                "[save] goes with lora = false: an adapter is written in float32 and its base states the rest"
            )
        if self.optimiser.method == "muon" and (self.lora is not None or self.shard):
            raise ValueError(
                'optimiser.method = "muon" goes with lora = false and without shard: it needs whole matrices of the '
                'decoder; choose "adamw"'
            )
        if self.exits:
            self._check_exits()
        if self.objective == "supervised":
            for source in self.data:
                self._check_teaches(source)
        if self.distillation is not None and self.distillation.vector_weight and self.head is not None:
            target = self.distillation.dimensions
            if target is not None and target != self.head.dimensions:
                raise ValueError(
                    f"head.dimensions = {self.head.dimensions} and distillation.dimensions = {target}: the vector loss "
                    "needs vectors of the target's length"
                )
        if self.objective in ("mntp", "simcse"):
            pairs = next((source.name for source in self.data if source.text is None), None)
            if pairs is not None:
                raise ValueError(f"data {pairs!r}: {self.objective} learns from texts; name a text column")

    def _check_distillation(self) -> None:
        settings = self.distillation
        if settings is None or settings.ranking is not None or self.contrastive.false_negative_margin is not None:
            return  # a teacher may also only judge which negatives are false
        if not (settings.weight or settings.vector_weight or settings.similarity_weight):
            raise ValueError("distillation: weight, vector_weight and similarity_weight are all 0, and no ranking")

    def _check_schedule(self) -> None:
        total, decays = self.optimiser.total_steps, self.optimiser.schedule != "constant"
        if total is not None and total < self.steps and decays and not self.optimiser.final_share:
            raise ValueError(
                f"optimiser.total_steps = {total} is below steps = {self.steps}: the learning rate would be 0 after "
                "it; raise it, lower steps, or set optimiser.final_share"
            )

    def _check_objective(self) -> None:
        """Refuse parts of a recipe that its objective never reads."""
        unread: dict[str, object] = {}
        if self.objective == "mntp":
            unread |= {"matryoshka": self.matryoshka, "head": self.head}
        if self.objective != "supervised":
            unread |= {"distillation": self.distillation}
        for name, value in unread.items():
            if value:
                advice = f"{name} = {'[]' if isinstance(value, list) else 'false'}"
                raise ValueError(f"{name}: {self.objective} does not train it; leave it out, in a stage by {advice}")

    def _check_exits(self) -> None:
        counts = [each.layers for each in self.exits]
        if sorted(set(counts)) != counts:
            raise ValueError(f"exits: layers {counts} must rise, each number once")
        if self.head is None:
            raise ValueError("exits need a [head]: an inner layer's states have no common directions with the last's")
        if self.objective != "supervised":
            raise ValueError(f"exits go with the supervised objective, not with {self.objective}")
        if self.lora is not None or self.shard:
            field = "lora = false" if self.lora is not None else "shard = false"
            raise ValueError(f"exits go with {field}: they are written as models of their own")

    def _check_teaches(self, source: DataSource) -> None:
        distils = self.distillation is not None and source.use_teacher
        if distils:
            return
        if source.query is None and source.label is None:
            raise ValueError(f"data {source.name!r} has no positives, and there is no distillation to learn from it by")
        if not source.use_labels or not self.contrastive.weight:
            raise ValueError(f"data {source.name!r} teaches nothing: neither its labels nor a teacher count")
