"""Formatting of numbers and names for people, the same in charts, tables, pages and Markdown."""

import re
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
NO_FIGURE = "\N{EN DASH}"

# mteb's names of main scores -> words.
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
    """Format a score: 72.41"""
    if value is None or value != value:
        return NO_FIGURE
    return f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 2) -> str:
    """Format a difference: +1.20. Minus is a true minus sign; a difference that rounds to zero has no sign."""
    if value is None or value != value:
        return NO_FIGURE
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def interval(bounds: tuple[float, float] | None, digits: int = 1) -> str:
    """Format an interval: 71.0 to 73.8"""
    return NO_FIGURE if bounds is None else f"{score(bounds[0], digits)} to {score(bounds[1], digits)}"


def metric(name: str) -> str:
    """Translate mteb's name of a metric to words: nDCG@10"""
    return _METRICS.get(name, name)


def count(value: float | None) -> str:
    """Format a count: 3,912. Below ten one decimal is kept."""
    if value is None:
        return NO_FIGURE
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def magnitude(value: float | None, unit: str = "") -> str:
    """Format a large number with a prefix: 135 M, 1.2 GB. Prefixes are powers of 1,000."""
    if value is None:
        return NO_FIGURE
    for limit, prefix in ((1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.{1 if scaled < 9.95 else 0}f} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip()


def duration(seconds: float) -> str:
    """Format a duration: 17 min 24 s"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def probability(value: float) -> str:
    """Format a p value: 0.03. Below the smallest value that resampling resolves, write a bound."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Map each name to itself without owner or folder, where the short names stay different."""
    last = {name: name.rstrip("/").rpartition("/")[2] or name for name in names}
    taken = list(last.values())
    return {name: short if taken.count(short) == 1 else name for name, short in last.items()}


def shortened(name: str, characters: int = 34) -> str:
    """Shorten a name in its middle, because models usually differ at the ends."""
    if len(name) <= characters:
        return name
    tail = (characters - 1) // 2
    return f"{name[: characters - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{name[-tail:]}"


def breakable(name: str) -> list[str]:
    """Split a long name into the pieces between which a line may break."""
    return [piece for piece in re.split(r"(?<=[/_])", name) if piece]


def listed(parts: Sequence[str], word: str = "and") -> str:
    """Join words to a list: a, b and c"""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}" if parts else ""


def plural(number: int, noun: str) -> str:
    """Write a number with its noun: 3 tasks"""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def markdown(text: object) -> str:
    """Escape foreign text for Markdown, so that it stays as it is and cannot break a table or become HTML."""
    return markdown_inline(" ".join(str(text).split()))


def markdown_inline(text: str) -> str:
    """Escape a piece of a sentence as `markdown` does, and keep the spaces at its ends."""
    for mark in "\\`*_[]|":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
