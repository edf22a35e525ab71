"""results.csv: what the folders of runs say about each finished step, a row each."""

import csv
import functools
import io
import json
from pathlib import Path
from statistics import mean

from data_loader.tasks import CLASS_NAMES, Task
from data_loader.voc import VOC2012
from utils.checkpoint import write_atomically
from utils.config import Config
from utils.errors import UserError
from utils.metrics import harmonic_mean

GROUPS = ("old", "new", "all", "hIoU")
COLUMNS = (
    "method", "task", "setting", "seed", "step", "val_images", *GROUPS,
    "seconds", "peak_mib", "memory_entries", "memory_bytes", *CLASS_NAMES,
)  # fmt: skip


def row(method: str, task: Task, seed: int, config: Config) -> dict:
    """One finished step as a row of results.csv.

    Joint training gives a row of the task's last step, its classes grouped as that step groups them.
    """
    joint = config.task.name == "joint"
    step = len(task.steps) - 1 if joint else config.task.step
    folder = config.step_dir()
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    iou = metrics["Mean_Intersection_over_Union"]["by_class"]
    return {
        "method": method,
        "task": task.name,
        "setting": task.setting,
        "seed": seed,
        "step": step,
        "val_images": _val_images(config.data.data_root),
        **group_means(iou, task, step),
        **_cost(config.step_dir(kind="log") / "metrics.jsonl"),
        **_memory(folder / "memory"),
        **iou,
    }


@functools.cache
def _val_images(root):
    """Number of validation images: read once, since reading the list looks for its files."""
    return len(VOC2012(root).read_list("val").ids)


def group_means(iou: dict[str, float], task: Task, step: int) -> dict[str, float | None]:
    """Means of class IoUs: old (background and step 0), new, all, and old and new's harmonic mean."""
    names = task.class_names(step)
    first = 1 + len(task.steps[0])
    old, new = mean(iou[n] for n in names[:first]), None
    if step:
        new = mean(iou[n] for n in names[first:])
    overall = mean(iou[n] for n in names)
    return {"old": old, "new": new, "all": overall, "hIoU": harmonic_mean(old, new)}


def _cost(path):
    """Seconds of training and peak memory, from the records of the epochs."""
    if not path.is_file():
        return {}
    try:
        epochs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        seconds = sum(epoch["seconds"] for epoch in epochs)
        return {"seconds": seconds, "peak_mib": max(epoch["peak_mib"] for epoch in epochs)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the records of the epochs in {path}: {error!r}") from None


def _memory(folder):
    """Entries of the stored memory, and bytes of all its files."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return {}
    entries = json.loads(manifest.read_text(encoding="utf-8"))["entries"]
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"memory_entries": len(entries), "memory_bytes": size}


def write_results(path: Path, rows: list[dict]) -> None:
    """Write results.csv, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
