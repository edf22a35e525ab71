"""Report on the folder of a run, or on one of experiments (with results.csv): tables and figures.

python scripts/report.py _saved_voc/models/overlap_5-3_EIR
python scripts/report.py _saved_experiments/methods
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_loader.tasks import get_task
from scripts.comparison import Comparison, read_comparisons
from scripts.published import SOURCE, VAL_IMAGES, published
from utils.config_file import load_config
from utils.errors import UserError, exit_with

GROUPS = {"old": "old", "new": "new", "overall": "all", "harmonic": "hIoU"}
HEADER = ("method", "old", "new", "all", "hIoU", "forgetting", "minutes", "memory KiB", "seeds")
INTRODUCTION = """# Results

IoU in percent at the last step: mean ± standard deviation over seeds. *old* is the mean over
background and the classes of step 0, *new* over the classes of all later steps, *all* over both,
*hIoU* the harmonic mean of old and new. *forgetting* is the best IoU over the steps minus that of the
last, mean over the classes learned before the last step, without the background. *minutes* of
training are summed over all steps; *memory* is the size of what is stored at the last step.
"""


def read_steps(folder: Path) -> dict[int, dict]:
    """IoU by group, and `by_class`, of the finished steps of a run."""
    found = {p.parent.name[5:]: p for p in folder.glob("step_*/metrics.json")}
    found = {int(step): path for step, path in found.items() if step.isdecimal()}
    if not found:
        raise UserError(
            f"no step_*/metrics.json and no results.csv in {folder}: give the folder of a run or of "
            "experiments that has one"
        )
    return {step: _read_iou(found[step]) for step in sorted(found)}


def _read_iou(path):
    try:
        iou = json.loads(path.read_text(encoding="utf-8"))["Mean_Intersection_over_Union"]
        return {key: iou[key] for key in (*GROUPS, "by_class")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the metrics {path}: {error!r}") from None


def run_table(steps: dict[int, dict]) -> str:
    """Means and class IoUs over steps, in percent."""
    header = f"{'step':<16}" + "".join(f"{step:>8}" for step in steps)
    lines = [header, "-" * len(header)]
    for group, title in GROUPS.items():
        lines.append(_line(title, [iou[group] for iou in steps.values()]))
    lines.append("")
    for name in steps[max(steps)]["by_class"]:
        lines.append(_line(name, [iou["by_class"].get(name) for iou in steps.values()]))
    return "\n".join(lines)


def _line(title, values):
    cells = (f"{value:>8.2f}" if value is not None else f"{'-':>8}" for value in values)
    return f"{title:<16}" + "".join(cells)


def published_lines(folder: Path, last: int) -> list[str]:
    """Published results to compare a run with; none before its last step, or without its data."""
    try:
        config = load_config(folder / f"step_{last}" / "config.json")[0]
        task = get_task(config.task.name, config.task.setting)
        if last != len(task.steps) - 1 or not published(task, VAL_IMAGES):
            return []
        from data_loader.voc import VOC2012  # imports torch, which takes seconds

        results = published(task, len(VOC2012(config.data.data_root).read_list("val").ids))
    except (UserError, OSError):
        return []
    lines = [f"{method:<16}{hiou:>8.2f}{miou:>8.2f}" for method, (hiou, miou) in results.items()]
    return [f"{'published':<16}{'hIoU':>8}{'all':>8}", *lines, SOURCE] if lines else []


def report_run(folder: Path) -> None:
    """The table over steps, and its curve as a PNG."""
    steps = read_steps(folder)
    print(f"\n{folder.name}: IoU in percent on the test images of each step\n\n{run_table(steps)}")
    if lines := published_lines(folder, max(steps)):
        print("", *lines, sep="\n")
    from scripts.figures import draw_curve

    curves = {
        title: {step: iou[group] for step, iou in steps.items() if iou[group] is not None}
        for group, title in GROUPS.items()
    }
    draw_curve(curves, folder / "curve.png", folder.name)
    print(f"\ncurve       {folder / 'curve.png'}")


def comparison_table(comparison: Comparison) -> str:
    """A Markdown table, a row per method; below it what it leaves out and takes from elsewhere."""
    rows = [[method, *_cells(comparison, method)] for method in comparison.runs]
    results = published(comparison.task, comparison.val_images)
    for method, (hiou, miou) in results.items():
        cells = [f"{method} (published)", "", "", f"{miou:.2f}", f"{hiou:.2f}"]
        rows.append(cells + [""] * (len(HEADER) - len(cells)))
    text = [f"## {comparison.task.name}, {comparison.task.setting}", ""]
    if rows:
        text += [*_markdown([HEADER, *rows]), ""]
    if comparison.unfinished:
        text += [f"unfinished: {'; '.join(comparison.unfinished)}", ""]
    if results:
        text += [SOURCE, ""]
    return "\n".join(text)


def steps_table(comparison: Comparison) -> str:
    """A Markdown table of the mean IoU of all classes learned so far: a row per method, by step."""
    rows = [["all, after step", *map(str, range(comparison.last + 1))]]
    for method in comparison.incremental:
        rows.append([method, *map(mean_and_deviation, comparison.values(method, "all").T)])
    return "\n".join([*_markdown(rows), ""])


def _cells(comparison, method):
    """Means over seeds, in the order of HEADER."""
    numbers = [comparison.values(method, group)[:, -1] for group in GROUPS.values()]
    numbers.append(np.array([lost.mean() for lost in comparison.forgetting(method) if lost.size]))
    numbers.append(comparison.values(method, "seconds").sum(axis=1) / 60)
    numbers.append(comparison.values(method, "memory_bytes")[:, -1] / 1024)
    return [*map(mean_and_deviation, numbers), str(len(comparison.runs[method]))]


def mean_and_deviation(values: np.ndarray) -> str:
    """Mean ± sample standard deviation of the values that are not NaN, as far as there are any."""
    values = values[~np.isnan(values)]
    if not values.size:
        return "-"
    deviation = f" ± {values.std(ddof=1):.1f}" if values.size > 1 else ""
    return f"{values.mean():.1f}{deviation}"


def _markdown(rows):
    """Lines of a table with padded columns, the first on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [lines[0], f"| {' | '.join(rule)} |", *lines[1:]]


def report_experiments(folder: Path) -> None:
    """Tables in report.md, which shows the figures as well, and on standard output."""
    text, shown = INTRODUCTION, ""
    comparisons = read_comparisons(folder / "results.csv")
    from scripts.figures import draw_comparison

    for comparison in comparisons:
        tables = f"\n{comparison_table(comparison)}"
        figures = {}
        if comparison.incremental:
            tables += f"\n{steps_table(comparison)}"
            figures = draw_comparison(comparison, folder)
        shown += tables
        text += tables + "".join(f"\n![{title}]({path.name})\n" for title, path in figures.items())
    (folder / "report.md").write_text(text, encoding="utf-8")
    print(f"{shown}\nreport      {folder / 'report.md'}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="of a run (step_0, ...) or of experiments (results.csv)"
    )
    folder = parser.parse_args(argv).folder
    try:
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
        (report_experiments if (folder / "results.csv").exists() else report_run)(folder)
    except UserError as error:
        exit_with(error)
    except OSError as error:
        exit_with(UserError(f"cannot read or write {error.filename or folder}: {error.strerror}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
