"""Results of a run as a table, a plot, and a section of the project's pages.

    python benchmarks/encode.py --publish README.md docs/performance.md

puts the table and plot of `--output` where a page has these two lines, and replaces what is between them:

    <!-- encode-135m -->
    <!-- /encode-135m -->
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

# Vectors that are further from float32 than this are marked: another model answers there.
SAME_MEAN, SAME_WORST = 0.999, 0.995
OURS, PEER, WRONG, ABSENT = "#4c78a8", "#9aa0a6", "#d9a5a3", "#5f6368"

Report = dict[str, Any]
Row = dict[str, Any]


def is_wrong(row: Row) -> bool:
    """The row's vectors are not those of the float32 model."""
    return row["cosine_mean"] < SAME_MEAN or row["cosine_worst"] < SAME_WORST


def markdown(report: Report) -> str:
    """Write the table, and under it the conditions of the measurement."""
    lines = [
        f"| | tokens/s, median (spread) | unmask {report['dtype']} is faster by, median (rounds) | share of peak "
        "| cosine to float32, mean / worst | precision, batches |",
        "|---|---:|---|---:|---|---|",
    ]
    for row in report["rows"]:
        if row["absent"]:
            lines.append(f"| {row['name']} | {row['absent']} | | | | |")
            continue
        speed = f"{row['tokens_per_second']:.0f} ({row['slowest']:.0f}-{row['quickest']:.0f})"
        if row["name"] == "unmask":
            speed, faster = f"**{speed}**", ""
        else:
            faster = f"{row['ratio']:.2f} ({', '.join(f'{ratio:.2f}' for ratio in row['ratio_per_round'])})"
        cosine = f"{row['cosine_mean']:.6f} / {row['cosine_worst']:.6f}"
        if is_wrong(row):
            cosine = f"**wrong:** {cosine}"
        setting = f"{row['precision']}, {row['setting']}"
        lines.append(f"| {row['name']} | {speed} | {faster} | {row['share_of_peak']:.0%} | {cosine} | {setting} |")
    return "\n".join([*lines, "", conditions(report), "", f"`{report['command']}`"]) + "\n"


def conditions(report: Report) -> str:
    """Describe texts, machine, peak speed and versions in one paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"{report['model']}, {report['gflop_per_token']:.3f} GFLOP per token; {report['mix']}; {report['rounds']} "
        f"rounds, interleaved, a process for each; {computed_on(report)}; "
        f"load before the run {report['machine']['load_before']:.1f}. Best matrix product of {report['dtype']} "
        f"{report['peak_gflops']:.0f} GFLOP/s, which 8-bit products may pass. *wrong*: mean cosine below {SAME_MEAN} "
        f"or worst below {SAME_WORST}. {versions}."
    )


def computed_on(report: Report) -> str:
    """The device in words."""
    machine = report["machine"]
    return machine.get("gpu") or f"{report['threads']} threads of {machine['processor']}"


def draw(report: Report, target: Path) -> None:
    """`target`.svg and .png: a bar for each row, quickest first."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "unmask"}
    )
    measured = sorted((row for row in report["rows"] if not row["absent"]), key=lambda row: row["tokens_per_second"])
    rows = [row for row in report["rows"] if row["absent"]][::-1] + measured
    figure, axes = plt.subplots(figsize=(8.6, 1.3 + 0.42 * len(rows)))
    widest = max((row["quickest"] for row in measured), default=1.0)
    for place, row in enumerate(rows):
        if row["absent"]:
            axes.text(widest * 0.01, place, row["absent"][:80], va="center", fontsize=8, color=ABSENT, style="italic")
            continue
        speed = row["tokens_per_second"]
        colour = WRONG if is_wrong(row) else OURS if row["name"].startswith("unmask") else PEER
        axes.barh(place, speed, height=0.62, color=colour, hatch="///" if is_wrong(row) else None, edgecolor="white")
        spread = [[speed - row["slowest"]], [row["quickest"] - speed]]
        axes.errorbar(speed, place, xerr=spread, color="#202124", linewidth=1, capsize=2.5)
        said = f"{speed:.0f}  {row['share_of_peak']:.0%} of peak"
        if is_wrong(row):
            said += f"  ✗ wrong vectors, cosine {row['cosine_mean']:.3f}, worst {row['cosine_worst']:.3f}"
        axes.text(row["quickest"] + widest * 0.012, place, said, va="center", fontsize=8)
    peak = report["peak_gflops"] / report["gflop_per_token"]
    axes.axvline(peak, color="#b4322f", linewidth=0.9, linestyle="--")
    above = axes.get_xaxis_transform()
    said = f"best {report['dtype']} product"
    axes.text(peak, 1.01, said, color="#b4322f", fontsize=7.5, ha="center", va="bottom", transform=above)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.2)
    axes.set_xlim(0, max(widest, peak) * 1.32)
    axes.set_xlabel("useful tokens per second (padding does not count), median and spread of the rounds")
    axes.set_title(f"{report['model']}: texts to vectors on {computed_on(report)}", loc="left", fontsize=10, pad=18)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    figure.savefig(target.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    figure.savefig(target.with_suffix(".png"), dpi=140, bbox_inches="tight")
    plt.close(figure)


def write(report: Report, folder: Path) -> Path:
    """`NAME.json`, `.md`, `.svg` and `.png` in `folder`; the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{report['name']}.json"
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    draw(report, target)
    return target


def publish(source: Path, keep: Path, pages: list[Path]) -> list[str]:
    """Copy every run in `source` to `keep` and put its table and plot into the pages that have its marks.

    Returns:
        A line for each thing done.

    Raises:
        ValueError: nothing was measured, or a page has no marks of any run.
    """
    runs = sorted(source.glob("encode-*.json"))
    if not runs:
        raise ValueError(f"no encode-*.json in {source}: run `make bench` first, or name its --output")
    keep.mkdir(parents=True, exist_ok=True)
    done = []
    for run in runs:
        for suffix in (".json", ".md", ".svg", ".png"):
            shutil.copyfile(run.with_suffix(suffix), keep / f"{run.stem}{suffix}")
        done.append(f"{run.stem}: copied to {keep}")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        runs_of_page = [run for run in runs if f"<!-- {run.stem} -->" in text]
        if not runs_of_page:
            marks = " and ".join(f"<!-- {run.stem} --> ... <!-- /{run.stem} -->" for run in runs)
            raise ValueError(f"{page} has no place for a table: write {marks} where it belongs")
        for run in runs_of_page:
            report = json.loads(run.read_text(encoding="utf-8"))
            picture = os.path.relpath(keep / f"{run.stem}.svg", page.parent)
            text = between(text, run.stem, f"{markdown(report)}\n![Tokens per second of each]({picture})\n")
            done.append(f"{run.stem}: in {page}")
        page.write_text(text, encoding="utf-8")
    return done


def between(text: str, mark: str, content: str) -> str:
    """`text` with `content` between the two marks.

    Raises:
        ValueError: the second mark is missing.
    """
    opening, closing = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = text.partition(opening)
    old, end_mark, after = rest.partition(closing)
    if not end_mark:
        raise ValueError(f"{opening} is not closed: write {closing} after it")
    del old
    return f"{before}{opening}\n{content}{closing}{after}"
