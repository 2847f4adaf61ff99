"""The picture of planner.py: mlc's time-memory curve and every competitor as a point."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib import ticker

MARKERS = "osD^vP*X"


def picture(file: Path, title: str, points: list[dict[str, Any]]) -> None:
    """Draw peak bytes (logarithmic) against seconds to ``file`` (its suffix says how)."""
    measured = [p for p in points if "seconds" in p and "peak_bytes" in p]
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    ours = sorted((p for p in measured if p["variant"].startswith("mlc:")), key=lambda p: p["peak_bytes"])
    if ours:
        axes.plot([p["peak_bytes"] / 1e6 for p in ours], [p["seconds"] for p in ours], "k.-", label="mlc")
        for p in (ours[0], ours[-1]):
            text = p["variant"].removeprefix("mlc:")
            axes.annotate(text, (p["peak_bytes"] / 1e6, p["seconds"]), xytext=(4, 6), textcoords="offset points")
    others = [p for p in measured if not p["variant"].startswith("mlc:")]
    for marker, p in zip(MARKERS, others, strict=False):
        axes.plot(p["peak_bytes"] / 1e6, p["seconds"], marker, markersize=8, label=p["variant"])
    axes.set(xscale="log", title=title, xlabel="peak memory beyond inputs, MB", ylabel="seconds")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)
    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which(ticker.LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.6)))
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize="small")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
