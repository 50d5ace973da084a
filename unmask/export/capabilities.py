"""Capabilities of export formats: for each format and trait of a model, exact, inexact or impossible, and why.

The table is data. `traits_of` finds the traits of a model, `judge` the verdict of a format on it. An export prints the
verdict before it writes anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from unmask.checkpoint import Checkpoint
from unmask.checkpoint.modules import SENTENCE_TRANSFORMERS
from unmask.encoder.head import head_steps, is_linear
from unmask.encoder.loading import LoadOptions, prompts_for
from unmask.encoder.model.architectures import Shape, shape_of
from unmask.encoder.prompts import DefaultPrompts, PromptParts
from unmask.errors import UsageError

Target = Literal["hub", "onnx", "gguf"]
Level = Literal["exact", "inexact", "impossible"]
# Kinds of texts that a runtime reads otherwise although the rest is exact.
TextException = Literal["control tokens", "joining space", "outer blanks", "decomposed letters"]
Trait = Literal[
    "BOS is not pooled",
    "BOS also ends a text",
    "the instruction is not pooled",
    "a template",
    "a template that ends in plain text",
    "a template that begins with control tokens alone",
    "several tokens behind a text",
    "a head with a bias behind skipped tokens",
    "layers behind the pooling",
    "a head that is cut before its end",
    "a weighted mean",
    "a weighted mean behind skipped tokens",
    "a space behind the instruction",
    "a first token behind skipped ones",
    "no row in the table of architectures",
    "RoPE by stored factors",
    "RoPE of a kind without a field",
    "a window shorter than a text",
    "an attention scale of its own",
    "a text handling of the reference",
    "a tokenizer that composes letters",
    "any model",
]

# Decoders that add the output of attention to the residual stream without a norm.
_WITHOUT_NORMS_BEHIND_ATTENTION = ("llama", "mistral", "qwen2")

# Families whose window llama.cpp applies. Those of Mistral and Qwen it does not read. Gemma 3 is written as
# gemma-embedding where it has no causal mask.
_WITH_WINDOW_BACK = ("gemma2", "gemma3_text", "gemma3")
_WITH_WINDOW_ON_BOTH_SIDES = ("gemma3_text", "gemma3")

TARGETS: tuple[Target, ...] = ("hub", "onnx", "gguf")
DTYPES: Mapping[Target, tuple[str, ...]] = {
    "hub": ("float32", "float16", "bfloat16"),
    "onnx": ("float32", "float16", "q8"),
    "gguf": ("float32", "float16", "q8"),
}


@dataclass(frozen=True)
class Rule:
    """The effect of one trait on one format.

    Attributes:
        level: of the vectors of the whole model. "exact" with an exception: exact but for some texts.
        reason: a clause about the runtime, without a full stop.
        exception: kind of the texts whose vectors differ.
    """

    target: Target
    trait: Trait
    level: Level
    reason: str
    exception: TextException | None = None


RULES: tuple[Rule, ...] = (
    Rule("hub", "a space behind the instruction", "exact", "sentence-transformers leaves one token fewer out of a "
         "text behind an instruction if its first token does not take the space before it up: a digit, a tab, a letter "
         "that the vocabulary does not hold with a space", "joining space"),
    Rule("hub", "a template", "exact", "sentence-transformers 6 keeps the blanks around a text", "outer blanks"),
    Rule("hub", "a template that ends in plain text", "impossible", "sentence-transformers counts the end of the "
         "template as prompt; ONNX does not: --to onnx"),
    Rule("hub", "a template that begins with control tokens alone", "impossible", "sentence-transformers leaves out "
         "the tokens of a prompt, and this model's texts have none; use --to onnx"),
    Rule("hub", "several tokens behind a text", "impossible", "sentence-transformers counts all but the last of them "
         "as prompt; ONNX does not: --to onnx"),
    Rule("hub", "BOS also ends a text", "impossible", "sentence-transformers weights a token by its id, and would "
         "leave out both; ONNX does not: --to onnx"),
    Rule("hub", "a head with a bias behind skipped tokens", "inexact", "sentence-transformers divides the mean of a "
         "query by the tokens of the instruction too, and a bias does not scale with it"),
    Rule("hub", "a head that is cut before its end", "impossible", "sentence-transformers cuts vectors last"),
    Rule("hub", "a weighted mean behind skipped tokens", "impossible", "sentence-transformers weights a token by its "
         "place in the whole sequence; ONNX does not: --to onnx"),
    Rule("hub", "a first token behind skipped ones", "impossible", "sentence-transformers takes the very first; "
         "--to onnx takes the right one"),
    Rule("hub", "RoPE by stored factors", "impossible", "config.json has no rule that gives these factors; keep the "
         "GGUF file"),
    Rule("hub", "a text handling of the reference", "impossible", "no runtime reproduces the reference's quirks"),
    Rule("onnx", "a template", "exact", "the caller's program must remove the blanks around a text", "outer blanks"),
    Rule("onnx", "no row in the table of architectures", "impossible", "the graph is written from that row; "
         "--to hub copies the weights as they are"),
    Rule("onnx", "a text handling of the reference", "impossible", "no runtime reproduces the reference's quirks"),
    Rule("gguf", "any model", "exact", "llama.cpp reads control tokens that a user types", "control tokens"),
    Rule("gguf", "a tokenizer that composes letters", "exact", "llama.cpp does not compose letters and accents "
         "(Unicode NFC)", "decomposed letters"),
    Rule("gguf", "BOS is not pooled", "inexact", "llama.cpp pools every token, BOS too; ONNX does not: --to onnx"),
    Rule("gguf", "the instruction is not pooled", "inexact", "llama.cpp pools the instruction of a query; ONNX does "
         "not: --to onnx"),
    Rule("gguf", "a first token behind skipped ones", "impossible", "llama.cpp takes the very first; --to onnx takes "
         "the right one"),
    Rule("gguf", "a template", "impossible", "llama.cpp adds no template to texts that are embedded; ONNX does: "
         "--to onnx"),
    Rule("gguf", "layers behind the pooling", "impossible", "a GGUF file has a place for one linear layer behind a "
         "mean, with as many outputs as inputs, in a Llama, Mistral or Qwen2 decoder without causal mask; use --to hub "
         "or --to onnx"),
    Rule("gguf", "a weighted mean", "impossible", "llama.cpp has no weighted mean; use --to onnx"),
    Rule("gguf", "several tokens behind a text", "impossible", "llama.cpp adds EOS alone; use --to onnx"),
    Rule("gguf", "no row in the table of architectures", "impossible", "names and layout of its tensors are not "
         "known here; use llama.cpp's own converter"),
    Rule("gguf", "RoPE of a kind without a field", "impossible", "llama.cpp stretches positions otherwise; use "
         "--to onnx"),
    Rule("gguf", "a window shorter than a text", "impossible", "llama.cpp has no window for this family, or one that "
         "looks back only; --to onnx, or a max_length within the window"),
    Rule("gguf", "an attention scale of its own", "impossible", "llama.cpp scales attention by the size of a head; "
         "--to onnx"),
    Rule("gguf", "a text handling of the reference", "impossible", "no runtime reproduces the reference's quirks"),
)  # fmt: skip


@dataclass(frozen=True)
class ExportVerdict:
    """The verdict of a format on a model.

    Attributes:
        level: the worst of its rules.
        reasons: of the rules of that level; empty for "exact".
        exceptions: kinds of texts whose vectors differ although the model is exact, with the reason.
    """

    target: Target
    level: Level
    reasons: tuple[str, ...]
    exceptions: Mapping[TextException, str]

    def sentences(self) -> list[str]:
        """Say the verdict, for people: one line, and one per exception."""
        head = f"{self.target}: {self.level}" + (f": {'; '.join(self.reasons)}" if self.reasons else "")
        return [head, *(f"  except {kind}: {reason}" for kind, reason in self.exceptions.items())]


@dataclass(frozen=True)
class ExportedModel:
    """A model as an export sees it, without weights in memory.

    Attributes:
        checkpoint: its files, with the instructions of the export in its settings.
        pooling, max_length: of the model.
        causal: it keeps its causal mask.
        prompts: its text handling.
        instructions: "query", "document" and others -> text; "" for none. Always holds these two.
        dimensions: length to which vectors are cut; None for all.
        shape: of its decoder; None without a row in the table.
    """

    checkpoint: Checkpoint
    pooling: str
    max_length: int
    causal: bool
    prompts: DefaultPrompts
    instructions: Mapping[str, str]
    dimensions: int | None
    shape: Shape | None

    @property
    def parts(self) -> PromptParts:
        """Fixed parts of its prompts."""
        return self.prompts.parts

    @property
    def is_plain(self) -> bool:
        """True for a model of sentence-transformers' kind, which pools BOS and joins a prompt as it is."""
        return self.checkpoint.encoder_config.get("prompt_style") == SENTENCE_TRANSFORMERS

    @property
    def is_mean(self) -> bool:
        """True if more than one token makes a vector."""
        return self.pooling in ("mean", "weighted_mean")


def describe_model(
    checkpoint: Checkpoint, instructions: Mapping[str, str] | None = None, dimensions: int | None = None
) -> ExportedModel:
    """Read how a model makes vectors, without its weights.

    Args:
        instructions: by name; they replace the model's own of that name.
        dimensions: length to cut vectors to.

    Raises:
        UsageError: an instruction is not one for this model.
    """
    settings = checkpoint.encoder_config
    own = {str(name): str(text) for name, text in (settings.get("instructions") or {}).items()}
    for name in ("query", "document"):
        own[name] = str(settings.get(f"{name}_instruction") or own.get(name) or "")
    pooling, max_length, prompts = prompts_for(checkpoint, LoadOptions(dtype="float32"))
    if not isinstance(prompts, DefaultPrompts):
        raise UsageError(f"{checkpoint.name} has a text handling that no export knows")
    return ExportedModel(
        checkpoint=checkpoint,
        pooling=pooling,
        max_length=max_length,
        causal=bool(settings.get("causal", False)),
        prompts=prompts,
        instructions=own | dict(instructions or {}),
        dimensions=dimensions,
        shape=shape_of(checkpoint.config),
    )


def traits_of(model: ExportedModel) -> frozenset[Trait]:
    """Find the traits of a model that some format may not express."""
    parts, is_plain = model.parts, model.is_plain
    skips = model.prompts.skip_instruction and any(model.instructions.values())
    skips_bos = bool(parts.bos) and not is_plain
    steps = [str(step.get("kind")) for step in head_steps(model.checkpoint.tensors, model.checkpoint.encoder_config)]
    is_templated = bool(parts.plain_head or parts.plain_tail or len(parts.head) > len(parts.bos))
    conditions: dict[Trait, bool] = {
        "any model": True,
        "a tokenizer that composes letters": _composes(model.checkpoint.tokenizer.text),
        "BOS is not pooled": skips_bos and model.is_mean,
        "BOS also ends a text": skips_bos and model.is_mean and not set(parts.bos).isdisjoint(parts.tail),
        "the instruction is not pooled": skips and model.is_mean,
        "a template": is_templated,
        "a template that ends in plain text": bool(parts.plain_tail),
        "a template that begins with control tokens alone": (
            model.is_mean
            and model.prompts.skip_instruction
            and len(parts.head) > len(parts.bos)
            and not parts.plain_head
        ),
        "several tokens behind a text": len(parts.tail) > 1,
        "layers behind the pooling": "dense" in steps and not head_fits_a_layer(model),
        "a head with a bias behind skipped tokens": (
            "dense" in steps and skips and skips_bos and model.is_mean and not parts.plain_head
        ),
        "a head that is cut before its end": "truncate" in steps[:-1],
        "a weighted mean": model.pooling == "weighted_mean",
        "a weighted mean behind skipped tokens": model.pooling == "weighted_mean" and (skips_bos or skips),
        "a space behind the instruction": skips and model.is_mean and not is_plain,
        "a first token behind skipped ones": model.pooling == "first_token" and (skips_bos or skips),
    }
    return frozenset(name for name, holds in (conditions | _traits_of_decoder(model)).items() if holds)


def head_fits_a_layer(model: ExportedModel) -> bool:
    """True if the layer behind the pooling can be written as one more layer of the decoder, see `gguf_head`."""
    checkpoint, shape = model.checkpoint, model.shape
    if shape is None or model.causal or model.pooling != "mean":
        return False
    if checkpoint.config["model_type"] not in _WITHOUT_NORMS_BEHIND_ATTENTION:
        return False
    if not is_linear(head_steps(checkpoint.tensors, checkpoint.encoder_config)):
        return False
    # llama.cpp gives vectors as long as its states.
    square = (shape.hidden_size, shape.hidden_size)
    return checkpoint.tensors.shape("head.0.weight") == square and shape.heads * shape.head_dim >= shape.hidden_size


def _composes(tokenizer: Tokenizer) -> bool:
    """True if a tokenizer composes letters and accents before it reads them (Unicode NFC)."""
    normalizer = tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("e\u0301") == "\u00e9"


def _traits_of_decoder(model: ExportedModel) -> dict[Trait, bool]:
    shape = model.shape
    if shape is None:
        return {"no row in the table of architectures": True}
    kinds = {rope.kind for rope in shape.ropes}
    families = _WITH_WINDOW_BACK if model.causal else _WITH_WINDOW_ON_BOTH_SIDES
    has_window = model.checkpoint.config.get("model_type") in families
    windows = [window for window in shape.windows if window is not None]
    return {
        "RoPE by stored factors": any(rope.factors for rope in shape.ropes) and not _has_llama3_rule(shape),
        "RoPE of a kind without a field": not kinds <= {"default", "linear", "llama3"},
        "a window shorter than a text": not has_window and any(window < model.max_length for window in windows),
        "an attention scale of its own": abs(shape.attention_scale * shape.head_dim**0.5 - 1) > 1e-6,
    }


def _has_llama3_rule(shape: Shape) -> bool:
    from unmask.training.model_folder import llama3_rule

    rope = shape.ropes[0]
    return llama3_rule(rope.theta, rope.factors) is not None


def judge(target: Target, traits: frozenset[Trait]) -> ExportVerdict:
    """Give the verdict of a format on a model with these traits."""
    levels: tuple[Level, ...] = ("exact", "inexact", "impossible")
    rules = [rule for rule in RULES if rule.target == target and rule.trait in traits]
    whole = [rule for rule in rules if rule.exception is None]
    level: Level = levels[max((levels.index(rule.level) for rule in whole), default=0)]
    reasons = tuple(f"{rule.trait}: {rule.reason}" for rule in whole if rule.level == level)
    return ExportVerdict(target, level, reasons, {rule.exception: rule.reason for rule in rules if rule.exception})
