"""Report on the folder of a run, or on one of experiments (with results.csv): tables and figures.

python scripts/report.py _saved_voc/models/overlap_5-3_EIR
python scripts/report.py _saved_experiments/methods
"""

import itertools
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.program

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs.options import load_config
from data_loader.tasks import task_of
from scripts.results import (
    GROUPS,
    SOURCE,
    Comparison,
    how_tested,
    published,
    read_comparisons,
    val_images,
)
from trainer.output import is_stale, model_before, read_results
from utils.config import Parser
from utils.errors import UserError
from utils.metrics import FOOTNOTE

INTRODUCTION = """# Results

IoU in percent at the last step: mean ± standard deviation over seeds. *old* is the mean over
background and the classes of step 0, *new* over the classes of all later steps, *all* over both,
*hIoU* the harmonic mean of old and new. *mean of steps* is the mean of *all* over the steps, from step
0 to the last. *forgetting* is the best IoU over the steps minus that of the last, mean over the classes
learned before the last step, without the background. *minutes* of training are summed over all steps;
*memory* is the size of what is stored at the last step.
"""

# The columns of the table of a comparison.
HEADER = (
    "method", *GROUPS.values(), "mean of steps", "forgetting", "minutes", "memory KiB", "seeds",
)  # fmt: skip

# Methods differ in colour (the palette without its grey), and where colours repeat, in line and marker.
COLOURS = [colour for colour in matplotlib.colormaps["tab10"].colors if len(set(colour)) > 1]
LINES = matplotlib.cycler(linestyle=["-", "-.", ":"], marker=["o", "s", "^"])
STYLES = LINES * matplotlib.cycler(color=COLOURS)
GREY = "0.82"
PANELS_IN_A_ROW = 4


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file."""
    figure.savefig(path, dpi=110, bbox_inches="tight")


def read_steps(folder: Path) -> dict[int, dict]:
    """The IoU in metrics.json of the finished steps of a run, in their order.

    Each step has the keys of GROUPS, in percent or None, by_class, and the names without_images, whose
    0 is no error of the model. UserError if there is no finished step, or if its metrics are damaged.
    """
    found = {path.parent.name[5:]: path for path in folder.glob("step_*/metrics.json")}
    found = {int(step): path for step, path in found.items() if step.isdecimal()}
    if not found:
        raise UserError(
            f"no step_*/metrics.json and no results.csv in {folder}: give the folder of a run or of "
            "experiments that has one"
        )
    steps = {}
    for step, path in sorted(found.items()):
        metrics = read_results(path.parent)
        if metrics is None:
            raise UserError(
                f"cannot read the metrics {path}: damaged, or changed since they were written"
            )
        iou = metrics["Mean_Intersection_over_Union"]
        try:
            steps[step] = {key: _number(iou[key]) for key in GROUPS}
            steps[step]["by_class"] = {name: _number(v) for name, v in iou["by_class"].items()}
            steps[step]["without_images"] = [*iou.get("without_images", [])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read the metrics {path}: {error!r}") from None
    return steps


def _number(value):
    return None if value is None else float(value)


def run_table(steps: dict[int, dict]) -> str:
    """Means and IoU by class over the steps, as read_steps gives them, in percent.

    Below the means stands the mean of `all` over the steps, once there are several, none missing.
    """

    def line(title, values):
        cells = ("-" if value is None else f"{value:.2f}" for value in values)
        marks = ("*" if title in iou["without_images"] else " " for iou in steps.values())
        cells = (f"{cell:>8}{mark}" for cell, mark in zip(cells, marks, strict=False))
        return f"{title:<16}{''.join(cells)}".rstrip()

    header = f"{'step':<16}" + "".join(f"{step:>8} " for step in steps)
    lines = [header, "-" * len(header)]
    lines += [line(title, [iou[group] for iou in steps.values()]) for group, title in GROUPS.items()]
    last = max(steps)
    if last > 0 and list(steps) == list(range(last + 1)):
        mean = np.array([iou["overall"] for iou in steps.values()], dtype=float).mean()
        lines += ["", f"{line('mean of steps', [mean])}  (all, steps 0 to {last})"]
    lines.append("")
    for name in steps[last]["by_class"]:
        lines.append(line(name, [iou["by_class"].get(name) for iou in steps.values()]))
    if any(iou["without_images"] for iou in steps.values()):
        lines += ["", FOOTNOTE]
    return "\n".join(lines)


def published_lines(folder: Path, last: int) -> list[str]:
    """Lines of published results to compare a run with.

    last: the latest finished step. There are none before the last step of the task, none if the
    run's configuration, which tells what to compare it with, is no longer there, and none where it was
    tested otherwise.
    """
    try:
        config = load_config(folder / f"step_{last}" / "config.json")[0]
        task = task_of(config.data)
        if last != len(task.steps) - 1:
            return []
        found = published(task, val_images(folder / f"step_{last}"), how_tested(config.data))
    except (UserError, OSError):
        return []
    lines = [f"{method:<16}{hiou:>8.2f}{miou:>8.2f}" for method, (hiou, miou) in found.items()]
    return [f"{'published':<16}{'hIoU':>8}{'all':>8}", *lines, SOURCE] if lines else []


def tests_of_steps(folder: Path, steps: Sequence[int]) -> dict[str, list[int]]:
    """How the steps of a run were tested, in words, and which of them so; those that do not say are
    left out."""
    tests = {}
    for step in steps:
        place = folder / f"step_{step}"
        try:
            words = how_tested(load_config(place / "config.json")[0].data)
        except (UserError, OSError):
            continue
        tests.setdefault(f"{words}, {val_images(place) or '?'} images", []).append(step)
    return tests


def run_figure(steps: dict[int, dict], title: str) -> Figure:
    """The means of a run over the steps, as read_steps gives them: a line for each that exists."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for group, name in GROUPS.items():
        values = np.array([iou[group] for iou in steps.values()], dtype=float)  # NaN for None
        if not np.isnan(values).all():
            axes.plot(list(steps), values, marker="o", label=name)
    axes.set(xlabel="step", ylabel="mean IoU, %", title=title, ylim=(0, 100), xticks=list(steps))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def report_run(folder: Path) -> None:
    """Show a run: the IoU by step, published results beside it, and curve.png."""
    steps = read_steps(folder)
    print(f"\n{folder.name}: IoU in percent on the test images of each step\n\n{run_table(steps)}")
    for step in steps:
        if is_stale(place := folder / f"step_{step}", model_before(place)):
            print(f"\nstep {step} was trained from another model of step {step - 1} than is there now")
    tests = tests_of_steps(folder, list(steps))
    if len(tests) > 1:
        found = (f"{', '.join(map(str, of))}: {words}" for words, of in tests.items())
        print(f"\nthe steps were tested in different ways, not to be compared: {'; '.join(found)}")
    lines = published_lines(folder, max(steps))
    if lines:
        print("", *lines, sep="\n")
    save(run_figure(steps, folder.name), folder / "curve.png")
    print(f"\ncurve       {folder / 'curve.png'}")


def mean_and_deviation(values: np.ndarray) -> str:
    """Mean ± sample standard deviation of the values that are not NaN, as far as there are any."""
    values = values[~np.isnan(values)]
    if not values.size:
        return "-"
    deviation = f" ± {values.std(ddof=1):.1f}" if values.size > 1 else ""
    return f"{values.mean():.1f}{deviation}"


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table with padded columns, the first on the left. The header is the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    text = ""
    for first, *others in [rows[0], rule, *rows[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text += f"| {' | '.join([first.ljust(widths[0]), *cells])} |\n"
    return text


def method_cells(comparison: Comparison, method: str) -> dict[str, str]:
    """The row of a method in the table of a comparison: the cells of HEADER."""
    numbers = {group: comparison.values(method, group)[:, -1] for group in GROUPS.values()}
    if method in comparison.incremental:
        numbers["mean of steps"] = comparison.values(method, "all").mean(axis=1)
        numbers["forgetting"] = comparison.forgetting(method).mean(axis=1)
    numbers["minutes"] = comparison.values(method, "seconds").sum(axis=1) / 60
    numbers["memory KiB"] = comparison.values(method, "memory_bytes")[:, -1] / 1024
    cells = {column: mean_and_deviation(values) for column, values in numbers.items()}
    seeds = str(len(comparison.runs[method]))
    return {**dict.fromkeys(HEADER, "-"), **cells, "method": method, "seeds": seeds}


def comparison_table(comparison: Comparison) -> str:
    """A Markdown table, a row per method; below it what it leaves out and takes from elsewhere."""
    rows = [method_cells(comparison, method) for method in comparison.runs]
    others = published(comparison.task, comparison.val_images, comparison.test)
    for method, (hiou, miou) in others.items():
        rows.append({"method": f"{method} (published)", "all": f"{miou:.2f}", "hIoU": f"{hiou:.2f}"})
    text = f"## {comparison.task.name}, {comparison.task.setting}\n"
    if rows:
        cells = [[row.get(column, "") for column in HEADER] for row in rows]
        text += f"\n{markdown([HEADER, *cells])}"
    if comparison.without_images:
        names = ", ".join(comparison.without_images)
        text += f"\n{names}: no image to learn from, or none to test on, so that an IoU of 0 is no "
        text += "error of the models; the means count it\n"
    if comparison.unfinished:
        text += f"\nunfinished: {'; '.join(comparison.unfinished)}\n"
    if others:
        text += f"\n{SOURCE}\n"
    return text


def steps_table(comparison: Comparison) -> str:
    """A Markdown table of the mean IoU of all classes learned so far: a row per method, by step."""
    rows = [["all, after step", *map(str, range(comparison.last + 1))]]
    for method in comparison.incremental:
        rows.append([method, *map(mean_and_deviation, comparison.values(method, "all").T)])
    return markdown(rows)


def draw_mean_iou(axes: Axes, comparison: Comparison, methods: Sequence[str] = ()) -> None:
    """A line per method with a band of one standard deviation; dashed what was learned at once.

    methods: whose places decide the lines' styles; by default those of the comparison.
    """
    styles = dict(zip(methods or comparison.incremental, itertools.cycle(STYLES), strict=False))
    for method in comparison.runs:
        values = comparison.values(method, "all")
        mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0
        low, high = mean - deviation, mean + deviation
        if method in comparison.incremental:
            (line,) = axes.plot(mean, label=method, markersize=5, **styles[method])
            axes.fill_between(range(len(mean)), low, high, color=line.get_color(), alpha=0.15, lw=0)
        else:
            axes.axhline(mean[0], linestyle="--", color="black", label=method)
            axes.axhspan(low[0], high[0], color="black", alpha=0.1, lw=0)
    axes.set(xlabel="step", ylabel="mean IoU, %", xticks=range(comparison.last + 1))
    axes.grid(alpha=0.3)


def mean_iou_figure(comparison: Comparison) -> Figure:
    """The mean IoU of all methods over the steps, with a legend."""
    figure = Figure(figsize=(9.5, max(4.5, 0.27 * len(comparison.runs))), layout="constrained")
    axes = figure.subplots()
    draw_mean_iou(axes, comparison)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, handlelength=3.5)
    return figure


def class_iou_figure(comparison: Comparison) -> Figure:
    """A panel per method: classes in learning order x steps, means over seeds."""
    methods, steps = comparison.incremental, comparison.last + 1
    columns = min(PANELS_IN_A_ROW, len(methods))
    rows = -(-len(methods) // columns)
    size = (2 + columns * max(1.9, 0.2 * steps), 0.4 + 3.7 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    names = comparison.task.class_names(comparison.last)
    for axes, method in zip(panels.flat, methods, strict=False):
        means = comparison.class_iou(method, comparison.last).mean(axis=0).T
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


def forgetting_figure(comparison: Comparison) -> Figure:
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


# The figures of a comparison: the first part of the file's name -> title and function.
FIGURES = {
    "miou": ("mean IoU of all classes over steps", mean_iou_figure),
    "heat": ("IoU of each class over steps", class_iou_figure),
    "forgetting": ("forgetting of each class", forgetting_figure),
}


def report_experiments(folder: Path) -> None:
    """Show the results.csv of a folder: tables on standard output; report.md, which has figures too."""
    text, shown = INTRODUCTION, ""
    for comparison in read_comparisons(folder / "results.csv"):
        task, links = comparison.task, ""
        tables = f"\n{comparison_table(comparison)}"
        if comparison.incremental:
            tables += f"\n{steps_table(comparison)}"
            for name, (title, draw) in FIGURES.items():
                figure = draw(comparison)
                figure.suptitle(f"{task.name}, {task.setting}: {title}")
                file = f"{name}_{task.name}_{task.setting}.png"
                save(figure, folder / file)
                links += f"\n![{title}]({file})\n"
        shown += tables
        text += tables + links
    (folder / "report.md").write_text(text, encoding="utf-8")
    print(f"{shown}\nreport      {folder / 'report.md'}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(None, __doc__)
    parser.add_argument(
        "folder",
        type=utils.program.a_path,
        help="of a run (step_0, ...) or of experiments (results.csv)",
    )
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if (folder / "results.csv").exists():
        report_experiments(folder)
    else:
        report_run(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
