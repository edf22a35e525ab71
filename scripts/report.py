"""Report on a run's folder: the table over steps, and its curve as a PNG.

python scripts/report.py _saved_voc/models/overlap_5-3_EIR
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.errors import UserError, exit_with

GROUPS = {"old": "old", "new": "new", "overall": "all", "harmonic": "hIoU"}


def read_steps(folder: Path) -> dict[int, dict]:
    """Metrics by step, of the finished steps of a run."""
    found = {int(p.parent.name[5:]): p for p in folder.glob("step_*/metrics.json")}
    if not found:
        raise UserError(f"no step_*/metrics.json in {folder}: give the folder of a run that has one")
    return {step: json.loads(found[step].read_text()) for step in sorted(found)}


def mean_iou(metrics: dict) -> dict:
    return metrics["Mean_Intersection_over_Union"]


def table(steps: dict[int, dict]) -> str:
    """Means and class IoUs over steps, in percent."""
    header = f"{'step':<16}" + "".join(f"{step:>8}" for step in steps)
    lines = [header, "-" * len(header)]
    for group, title in GROUPS.items():
        lines.append(_row(title, [mean_iou(m)[group] for m in steps.values()]))
    lines.append("")
    last = mean_iou(steps[max(steps)])["by_class"]
    for name in last:
        lines.append(_row(name, [mean_iou(m)["by_class"].get(name) for m in steps.values()]))
    return "\n".join(lines)


def _row(title, values):
    cells = (f"{value:>8.2f}" if value is not None else f"{'-':>8}" for value in values)
    return f"{title:<16}" + "".join(cells)


def curve(steps: dict[int, dict], path: Path, title: str) -> None:
    """Mean IoU over steps, of old, new and all classes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for group, name in GROUPS.items():
        points = [(s, mean_iou(m)[group]) for s, m in steps.items()]
        points = [p for p in points if p[1] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="step", ylabel="mean IoU, %", title=title, ylim=(0, 100), xticks=list(steps))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of a run, which holds step_0, step_1, ...")
    folder = parser.parse_args().folder
    try:
        steps = read_steps(folder)
    except UserError as error:
        exit_with(error)
    print(f"\n{folder.name}: IoU in percent on the test images of each step\n\n{table(steps)}")
    curve(steps, folder / "curve.png", folder.name)
    print(f"\ncurve       {folder / 'curve.png'}")


if __name__ == "__main__":
    main()
