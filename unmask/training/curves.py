"""Draw the curves of a run: losses and dev scores over the tokens that it has learnt from."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from unmask.training.mixture import SEVERAL
from unmask.training.run_folder import RunFolder


def draw_curves(folder: RunFolder) -> None:
    """Write `curves.svg` and `curves.png` beside the metrics. Does nothing without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return  # the metrics are all there; only the picture needs the [train] extra
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lines = folder.metrics()
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "scores" in line]
    if not steps:
        return
    tokens = list(accumulate(line["tokens"] for line in steps))
    unit, label = (1e6, "million tokens") if tokens[-1] >= 1e6 else (1e3, "thousand tokens")
    after = {line["step"]: total / unit for line, total in zip(steps, tokens, strict=True)}

    def place(line: Mapping[str, Any]) -> float:
        return after[line["step"]]

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none"})
    figure, panels = plt.subplots(
        1, 2 if evaluations else 1, figsize=(10 if evaluations else 6, 4), squeeze=False, layout="constrained"
    )
    left = panels[0][0]
    for number, (name, own) in enumerate(_series(steps).items()):
        dashes = ("-", "--", ":")[number // 10 % 3]  # matplotlib has ten colours
        values = _smooth([line["loss"] for line in own])
        left.plot([place(line) for line in own], values, dashes, linewidth=1.2, label=name)
    left.set_title("Loss by data set, running mean", loc="left", fontsize=10)
    left.set_xlabel(label)
    if evaluations:
        right = panels[0][1]
        for name in evaluations[0]["scores"]:
            points = [(place(line), line["scores"][name]) for line in evaluations if name in line["scores"]]
            (curve,) = right.plot(*zip(*points, strict=True), marker="o", markersize=2.5, linewidth=1.2, label=name)
            for layers in evaluations[0].get("exits", {}):
                points = [(place(line), line["exits"][layers][name]) for line in evaluations if "exits" in line]
                right.plot(*zip(*points, strict=True), ":", linewidth=1, color=curve.get_color())
        dotted = ", dotted: exits" if "exits" in evaluations[0] else ""
        right.set_title(f"Dev sets{dotted}", loc="left", fontsize=10)
        right.set_xlabel(label)
    for panel in panels[0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", linewidth=0.4, alpha=0.5)
        # Below the plot, where it cannot hide a curve.
        panel.legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(folder.path / "curves.svg")
    figure.savefig(folder.path / "curves.png", dpi=140)
    plt.close(figure)


def _series(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Steps by the data set of their batch. Batches of several sets are one series: they are all different mixtures."""
    series: dict[str, list[Mapping[str, Any]]] = {}
    for line in steps:
        name = "batches of several sets" if SEVERAL in line["data"] else line["data"]
        series.setdefault(name, []).append(line)
    return series


def _smooth(values: Sequence[float], window: int = 15) -> list[float]:
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]
