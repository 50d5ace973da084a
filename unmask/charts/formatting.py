"""Numbers and names as people read them, the same in every format."""

import re
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
NO_FIGURE = "\N{EN DASH}"

# What mteb calls its main scores, in words.
_METRICS = {
    "cosine_spearman": "Spearman, cosine",
    "accuracy": "accuracy",
    "v_measure": "V-measure",
    "ndcg_at_10": "nDCG@10",
    "map_at_1000": "MAP",
    "map": "MAP",
    "max_ap": "average precision",
    "cosine_ap": "average precision",
}


def score(value: float | None, digits: int = 2) -> str:
    """72.41"""
    if value is None or value != value:
        return NO_FIGURE
    return f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 2) -> str:
    """+1.20, with a true minus sign below zero; a difference that rounds to nothing has no sign"""
    if value is None or value != value:
        return NO_FIGURE
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def interval(bounds: tuple[float, float] | None, digits: int = 1) -> str:
    """71.0 to 73.8"""
    return NO_FIGURE if bounds is None else f"{score(bounds[0], digits)} to {score(bounds[1], digits)}"


def metric(name: str) -> str:
    """nDCG@10"""
    return _METRICS.get(name, name)


def count(value: float | None) -> str:
    """3,912; below ten one decimal is kept"""
    if value is None:
        return NO_FIGURE
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def magnitude(value: float | None, unit: str = "") -> str:
    """135 M, 1.2 GB: three leading digits at most, powers of a thousand"""
    if value is None:
        return NO_FIGURE
    for limit, prefix in ((1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.{1 if scaled < 9.95 else 0}f} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip()


def duration(seconds: float) -> str:
    """17 min 24 s"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def probability(value: float) -> str:
    """0.03; the smallest that resampling can tell apart from zero is a bound"""
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each name without its owner or folder, where that still tells the models apart."""
    last = {name: name.rstrip("/").rpartition("/")[2] or name for name in names}
    taken = list(last.values())
    return {name: short if taken.count(short) == 1 else name for name, short in last.items()}


def shortened(name: str, characters: int = 34) -> str:
    """The name with its middle left out, so that the ends, which tell models apart, remain."""
    if len(name) <= characters:
        return name
    tail = (characters - 1) // 2
    return f"{name[: characters - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{name[-tail:]}"


def breakable(name: str) -> list[str]:
    """The pieces of a long name between which a line may end."""
    return [piece for piece in re.split(r"(?<=[/_])", name) if piece]


def listed(parts: Sequence[str], word: str = "and") -> str:
    """a, b and c"""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}" if parts else ""


def plural(number: int, noun: str) -> str:
    """3 tasks"""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def markdown(text: object) -> str:
    """Text that is not ours, so that it reads the same in Markdown and cannot break a table or become HTML."""
    return markdown_inline(" ".join(str(text).split()))


def markdown_inline(text: str) -> str:
    """As `markdown`, for a piece of a sentence: the spaces at its ends stay."""
    for mark in "\\`*_[]|":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
