"""Draw the curves of a run: losses and dev scores over steps."""

from collections.abc import Sequence

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
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none"})
    figure, panels = plt.subplots(1, 2 if evaluations else 1, figsize=(10 if evaluations else 6, 3.6), squeeze=False)
    left = panels[0][0]
    for number, name in enumerate(dict.fromkeys(line["data"] for line in steps)):
        own = [line for line in steps if line["data"] == name]
        dashes = ("-", "--", ":")[number // 10 % 3]  # matplotlib has ten colours
        values = _smooth([line["loss"] for line in own])
        left.plot([line["step"] for line in own], values, dashes, linewidth=1.2, label=name)
    left.set_title("Loss by data set, running mean", loc="left", fontsize=10)
    left.set_xlabel("step")
    if evaluations:
        right = panels[0][1]
        for name in evaluations[0]["scores"]:
            points = [(line["step"], line["scores"][name]) for line in evaluations if name in line["scores"]]
            (curve,) = right.plot(*zip(*points, strict=True), marker="o", markersize=2.5, linewidth=1.2, label=name)
            for layers in evaluations[0].get("exits", {}):
                points = [(line["step"], line["exits"][layers][name]) for line in evaluations if "exits" in line]
                right.plot(*zip(*points, strict=True), ":", linewidth=1, color=curve.get_color())
        dotted = ", dotted: exits" if "exits" in evaluations[0] else ""
        right.set_title(f"Dev sets{dotted}", loc="left", fontsize=10)
        right.set_xlabel("step")
    for panel in panels[0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", linewidth=0.4, alpha=0.5)
        # Below the plot, where it cannot hide a curve.
        panel.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.tight_layout()
    figure.savefig(folder.path / "curves.svg", bbox_inches="tight")
    figure.savefig(folder.path / "curves.png", dpi=140, bbox_inches="tight")
    plt.close(figure)


def _smooth(values: Sequence[float], window: int = 7) -> list[float]:
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]
