"""The figure of cost against size."""

from pathlib import Path

from scripts.benchmarks.timing import Row

LABELS = {"batch": "batch", "crop": "crop, pixels", "task": "channels", "mem_size": "stored entries"}


def draw_scaling(curves: dict[str, list[tuple[int, Row]]], path: str | Path, title: str) -> None:
    """A panel for each axis: the medians against the sizes, with least and most."""
    from matplotlib.figure import Figure  # slow to import, and seldom needed

    figure = Figure(figsize=(13, 3.2))
    panels = figure.subplots(1, len(curves))
    for panel, (axis, points) in zip(panels, curves.items(), strict=True):
        sizes, rows = zip(*points, strict=True)
        errors = [[r.median - r.low for r in rows], [r.high - r.median for r in rows]]
        panel.errorbar(sizes, [r.median for r in rows], errors, marker="o", capsize=3)
        panel.set(xlabel=LABELS[axis], ylim=(0, None), xlim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("one iteration, ms")
    figure.suptitle(title)
    figure.savefig(path, dpi=100, bbox_inches="tight")
