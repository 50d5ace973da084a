"""Simulate how requests are spread over three providers, one of which becomes slow or fails fast, and plot it.

    python benchmarks/provider_choice.py [--output docs/performance]

The choice and the load are those of the server, with a clock of their own: there is no network and no waiting. 100
requests of 64 tokens arrive in each second.
"""

import argparse
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from unmask.router.choosing import Candidate, ProviderPreferences, choose
from unmask.router.load import MIN_TOKENS, EndpointLoad

# Seconds of one answer, for each second of the simulation. 20 times slower for 30 seconds, and then as before.
SLOW = {"a": [0.01] * 10 + [0.2] * 30 + [0.01] * 70, "b": [0.01] * 110, "c": [0.01] * 110}
FAILING = {"a": [0.002] * 60, "b": [0.02] * 60, "c": [0.02] * 60}

_COLOURS = {"a": "#c2410c", "b": "#0f766e", "c": "#4c78a8"}


def simulate(seconds_of: Mapping[str, Sequence[float]], *, failing: str = "", seed: int = 7) -> list[Counter[str]]:
    """Return the requests that each provider gets in each second.

    Args:
        seconds_of: name -> seconds of an answer, in each second.
        failing: name of the provider whose every answer is an error.
        seed: of the chance.
    """
    draw = random.Random(seed)
    loads = {name: EndpointLoad(64, 0.01 / MIN_TOKENS, 0.0) for name in seconds_of}
    running: list[tuple[float, str, float]] = []
    counts = []
    for second in range(len(next(iter(seconds_of.values())))):
        counted: Counter[str] = Counter()
        for tick in range(100):
            now = second + tick / 100
            for end, name, began in [entry for entry in running if entry[0] <= now]:
                running.remove((end, name, began))
                loads[name].finish(64)
                if name == failing:
                    loads[name].failed(64, end, busy=True)
                else:
                    loads[name].succeeded(64, end - began, end)
            group = [
                Candidate(name, 0, 1, 1.0, load.cost(64, now), load.expected_seconds(64))
                for name, load in loads.items()
                if load.requests < load.limit
            ]
            chosen = choose(group, ProviderPreferences(), draw)
            if chosen is None:
                continue
            loads[chosen.name].start(64)
            counted[chosen.name] += 1
            running.append((now + seconds_of[chosen.name][second], chosen.name, now))
        counts.append(counted)
    return counts


def draw_counts(axes: object, counts: Sequence[Mapping[str, int]], title: str) -> None:
    """Draw the requests per second of each provider."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    for name, colour in _COLOURS.items():
        axes.plot([count.get(name, 0) for count in counts], color=colour, linewidth=1.2, label=name)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("seconds")
    axes.set_ylabel("requests per second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.4, alpha=0.5)
    axes.legend(frameon=False)


def main() -> None:
    """Simulate both cases and draw them."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "performance")
    output: Path = parser.parse_args().output
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "svg.hashsalt": "unmask"})
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6), layout="constrained")
    slow = simulate(SLOW)
    draw_counts(upper, slow, "a is 20 times slower from 10 s to 40 s")
    upper.axvspan(10, 40, color="#9aa0a6", alpha=0.15)
    draw_counts(
        lower, simulate(FAILING, failing="a"), "a answers with an error after 2 ms, the others rightly after 20 ms"
    )
    figure.savefig(output / "provider-choice.svg", metadata={"Date": None})
    plt.close(figure)
    before = sum(count["a"] for count in slow[5:10]) / 5
    left = next(second for second in range(10, 40) if slow[second]["a"] <= 0.25 * before) - 9
    means = [sum(count["a"] for count in slow[second : second + 5]) / 5 for second in range(40, 106)]
    back = max(second for second, mean in enumerate(means) if mean <= 0.5 * before) + 1
    print(f"a had {before:.0f} requests/s; a quarter within {left} s of becoming slow; half {back} s after recovery")


if __name__ == "__main__":
    main()
