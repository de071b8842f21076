"""Draw the figure of the README from rows: what one image costs as it grows, for VMamba-B and ViT-B/16.

python docs/figure.py results/efficiency.jsonl docs/cost.svg
"""

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ssmclip import read_rows

LINES = {
    "VMamba-B": ("CLIP-VMamba-B", None, "#0072b2", "o", "-"),
    "ViT-B/16, fused attention": ("CLIP-ViT-B-16", None, "#d55e00", "s", "-"),
    "ViT-B/16, plain attention": ("CLIP-ViT-B-16", "plain", "#d55e00", "s", ":"),
}
PANELS = {"latency_ms": ("seconds per image", 1e-3), "inference_memory_mb": ("memory in GB", 1e-3)}


def curves(rows, metric):
    """Return label -> [(pixels, value)], by the pixels of an image's side."""
    found = defaultdict(list)
    for label, (model, attention, *_) in LINES.items():
        for row in rows:
            if (row.model, row.metric, row.where.get("attention")) == (model, metric, attention):
                if "image" in row.where:
                    found[label].append((row.where["image"], row.value * PANELS[metric][1]))
        found[label].sort()
    return found


def draw(rows):
    """Return a figure with one panel per metric of PANELS."""
    picture = Figure(figsize=(8, 3), layout="constrained", facecolor="white")
    for axes, (metric, (title, _)) in zip(picture.subplots(1, 2), PANELS.items(), strict=True):
        for label, points in curves(rows, metric).items():
            *_, colour, marker, dash = LINES[label]
            axes.plot(*zip(*points, strict=True), dash, marker=marker, markersize=4, color=colour, label=label)
            axes.annotate(
                f"{points[-1][1]:#.3g}", points[-1], (5, -3), textcoords="offset points", size=8, color=colour
            )
        axes.set_title(title, size=10, loc="left")
        axes.set_xticks([x for x, _ in points], [f"{x:,}" for x, _ in points], size=8)
        axes.set_xlabel("pixels per side", size=9)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.1)
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return picture


if __name__ == "__main__":
    source, target = sys.argv[1:]
    _, rows = read_rows(source)
    # Text stays text, and the same rows give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ssmclip"}):
        draw(rows).savefig(Path(target), metadata={"Date": None})
