"""Figures of reports, as PNG files."""

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from scripts.comparison import Comparison

COLOURS = [c for c in matplotlib.colormaps["tab10"].colors if len(set(c)) > 1]  # without the grey
STYLES = (("-", "o"), ("-.", "s"), (":", "^"))  # line and marker: the next when colours repeat
GREY = "0.82"
PANELS = 4  # in a row


def draw_curve(lines: dict[str, dict[int, float]], path: Path, title: str) -> None:
    """Lines of one run, each step -> percent."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name, points in lines.items():
        if points:
            axes.plot(points.keys(), points.values(), marker="o", label=name)
    steps = sorted({step for points in lines.values() for step in points})
    axes.set(xlabel="step", ylabel="mean IoU, %", title=title, ylim=(0, 100), xticks=steps)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_comparison(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """The figures of a comparison that has incremental methods: title -> file."""
    task, files = comparison.task, {}
    for name, (title, make) in FIGURES.items():
        files[title] = folder / f"{name}_{task.name}_{task.setting}.png"
        figure = make(comparison)
        figure.suptitle(f"{task.name}, {task.setting}: {title}")
        _save(figure, files[title])
    return files


def _save(figure, path):
    figure.savefig(path, dpi=110, bbox_inches="tight")


def mean_iou(comparison: Comparison) -> Figure:
    """A line per method with a band of one standard deviation; dashed what was learned at once."""
    figure = Figure(figsize=(9.5, max(4.5, 0.27 * len(comparison.runs))), layout="constrained")
    axes = figure.subplots()
    for method in comparison.runs:
        values = comparison.values(method, "all")
        mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0
        low, high = mean - deviation, mean + deviation
        if method in comparison.incremental:
            repeat, colour = divmod(comparison.incremental.index(method), len(COLOURS))
            style, marker = STYLES[repeat % len(STYLES)]
            look = {"color": COLOURS[colour], "linestyle": style, "marker": marker, "markersize": 5}
            axes.plot(mean, label=method, **look)
            axes.fill_between(range(len(mean)), low, high, color=COLOURS[colour], alpha=0.15, lw=0)
        else:
            axes.axhline(mean[0], linestyle="--", color="black", label=method)
            axes.axhspan(low[0], high[0], color="black", alpha=0.1, lw=0)
    axes.set(xlabel="step", ylabel="mean IoU, %", xticks=range(comparison.last + 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, handlelength=3.5)
    return figure


def class_iou(comparison: Comparison) -> Figure:
    """A panel per method: classes in learning order x steps, means over seeds."""
    methods, steps = comparison.incremental, comparison.last + 1
    columns = min(PANELS, len(methods))
    rows = -(-len(methods) // columns)
    size = (2 + columns * max(1.9, 0.2 * steps), 0.4 + 3.7 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    names = comparison.task.class_names(comparison.last)
    for axes, method in zip(panels.flat, methods, strict=False):
        means = comparison.iou(method, comparison.last).mean(axis=0).T
        image = axes.imshow(means, aspect="auto", interpolation="none", vmin=0, vmax=100)
        axes.set_facecolor(GREY)
        axes.set_title(textwrap.fill(method, 24), fontsize=9)
        axes.set_xticks(range(steps), range(steps), fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    for axes in panels.flat[len(methods) :]:
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=9)
    figure.colorbar(image, ax=panels, label="IoU, %", aspect=20 * rows, pad=0.01)
    return figure


def forgetting(comparison: Comparison) -> Figure:
    """Methods x classes in learning order, means over seeds; grey: classes of the last step."""
    methods = comparison.incremental
    names = comparison.task.class_names(comparison.last)[1:]
    lost = np.full((len(methods), len(names)), np.nan)
    for row, method in zip(lost, methods, strict=True):
        means = comparison.forgetting(method).mean(axis=0)
        row[: len(means)] = means
    most = max(1, np.nanmax(lost))
    figure = Figure(figsize=(2 + 0.45 * len(names), 2 + 0.3 * len(methods)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(lost, aspect="auto", interpolation="none", cmap="OrRd", vmin=0, vmax=most)
    axes.set_facecolor(GREY)
    for (row, column), value in np.ndenumerate(lost):
        if not np.isnan(value):
            colour = "white" if value > 0.6 * most else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(methods)), methods)
    figure.colorbar(image, ax=axes, label="best minus last IoU", pad=0.01)
    return figure


FIGURES = {
    "miou": ("mean IoU of all classes over steps", mean_iou),
    "heat": ("IoU of each class over steps", class_iou),
    "forgetting": ("forgetting of each class", forgetting),
}
