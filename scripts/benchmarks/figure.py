"""The figure of cost against size."""

import argparse
from itertools import islice

from scripts.benchmarks.timing import Row


def draw_scaling(axes: dict[str, list], rows: list[Row], args: argparse.Namespace) -> None:
    """The rows against each size; area in place of the crop's side, channels in place of the task."""
    from matplotlib.figure import Figure  # slow to import, and seldom needed

    names = {"batch": "batch", "crop": "crop, pixels", "task": "channels", "mem_size": "stored entries"}
    figure = Figure(figsize=(13, 3.2))
    panels = figure.subplots(1, 4)
    remaining = iter(rows)
    for axes_, (axis, values) in zip(panels, axes.items(), strict=True):
        own = list(islice(remaining, len(values)))
        sizes = [float(row.name.split()[2 if "," in row.name else 1]) for row in own]
        sizes = [size**2 for size in sizes] if axis == "crop" else sizes
        errors = [[r.median - r.low for r in own], [r.high - r.median for r in own]]
        axes_.errorbar(sizes, [r.median for r in own], errors, marker="o", capsize=3)
        axes_.set(xlabel=names[axis], ylim=(0, None), xlim=(0, None))
        axes_.grid(alpha=0.3)
    panels[0].set_ylabel("one iteration, ms")
    figure.suptitle(f"Incremental step, {args.backbone}, batch {args.batch}, crop {args.crop}")
    figure.savefig(args.figure, dpi=100, bbox_inches="tight")
