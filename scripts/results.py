"""Results: the rows of results.csv, the runs that a results.csv compares, and published numbers.

run_experiments.py writes results.csv, a row for each finished step of each run; report.py shows it.
"""

import csv
import io
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

from configs.options import Config, DataArgs
from data_loader.memory import MANIFEST, read_manifest
from data_loader.tasks import Task, check_step, get_task
from trainer.output import read_record, read_results
from utils.checkpoint import json_digest, write_atomically
from utils.errors import UserError
from utils.metrics import harmonic_mean

# The means of the IoU: what metrics.json calls them, and the columns and tables.
GROUPS = {"old": "old", "new": "new", "overall": "all", "harmonic": "hIoU"}

# The columns of results.csv, by what their cells hold. A number that is not known is an empty cell.
# After these stands the IoU of each class, in the learning order of the data set. without_images names
# the classes whose 0 is no error of the model, with "; " between; test is what how_tested gives. Older
# files lack these two.
TEXTS = ("method", "task", "setting", "without_images", "test")
INTEGERS = ("seed", "step")
NUMBERS = (
    "val_images", *GROUPS.values(), "seconds", "peak_mib", "memory_entries", "memory_bytes",
    "background",
)  # fmt: skip
COLUMNS = (*TEXTS[:3], *INTEGERS, *NUMBERS, *TEXTS[3:])

# Published results in the setting overlap, in percent: by the number of validation images (of VOC 2012
# and of ADE20K), task and method, the hIoU and the mean IoU of all classes after the last step. ORDERS
# has digests of their classes' names, in learning order.
PUBLISHED = {
    1449: {
        "19-1": {"DKD": (56.95, 76.13), "DKD-M": (68.14, 77.04)},
        "15-5": {"DKD": (67.17, 73.95), "DKD-M": (68.96, 74.84)},
        "15-1": {"DKD": (57.46, 70.50), "DKD-M": (64.09, 72.95)},
        "10-1": {"DKD": (57.21, 60.43), "DKD-M": (64.89, 66.20)},
        "5-3": {"DKD": (61.32, 58.98), "DKD-M": (65.02, 63.32)},
    },
    2000: {
        "100-50": {"DKD": (29.42, 35.55)},
        "100-10": {"DKD": (26.79, 34.53)},
        "50-50": {"DKD": (34.77, 34.39)},
    },
}
ORDERS = {
    1449: "ce42b86533b1c85e1fe217f2500055a7263e015f54041b27d6afb3747a2065e0",
    2000: "9bf5f612ed5c7d1d07e09c58712c7e0e074ec3e34bf52ebec063f117b2e722b1",
}
SOURCE = (
    'published: by the DKD project, "Decomposed Knowledge Distillation for Class-Incremental Semantic '
    'Segmentation", NeurIPS 2022, overlap setting; hIoU and mean IoU of all classes'
)


def class_column(name: str) -> str:
    """The column of a class; some data set may have a class of another column's name (ADE20K: step)."""
    return f"{name} (class)" if name in COLUMNS and name != "background" else name


def published(task: Task, images: float | None, test: str) -> dict[str, tuple[float, float]]:
    """Published hIoU and mean IoU of all classes after the last step, in percent, by method.

    images: number of images that the results to compare with were validated on, None if it varies or
    is not known. test: how, as how_tested gives it.
    Empty for other tasks and settings than those published, for another number of images than their
    data sets have, for another test, and for other classes or the same in another order.
    """
    found = PUBLISHED.get(images, {}).get(task.name, {}) if task.setting == "overlap" else {}
    if not found or test != how_tested(Config().data):
        return {}
    order = json_digest(task.class_names(len(task.steps) - 1)[1:])
    return found if order == ORDERS[images] else {}


def val_images(folder: Path) -> int | None:
    """Number of images on the validation list of the step in a folder; None if it does not say."""
    return read_record(folder).get("val_images")


def how_tested(data: DataArgs) -> str:
    """How a model is tested, in words."""
    test = data.test.args
    words = [f"centre crop {test.transform_args.crop_size}" if test.transform else "whole"]
    words += ["later classes void"] if test.masking_value else []
    words += ["test images allowed in training"] if data.allow_val_in_train else []
    return ", ".join(words)


def group_means(iou: dict[str, float], task: Task, step: int) -> dict[str, float | None]:
    """Means of the IoU over groups of the classes seen at a step, by the columns' names.

    iou: by class. old is the mean over background and the classes of step 0, new over those of later
    steps, all over both; hIoU is the harmonic mean of old and new. At step 0 new and hIoU are None.
    """
    values = [iou[name] for name in task.class_names(step)]
    old, new = (mean(values[c] for c in group) if group else None for group in task.groups(step))
    return {"old": old, "new": new, "all": mean(values), "hIoU": harmonic_mean(old, new)}


def row(method: str, task: Task, seed: int, config: Config) -> dict:
    """One finished step as a row of results.csv; what its folder does not tell is left out.

    config: of the step. Joint training, which learns all classes in one step, gives a row of the
    last step of `task`, its classes grouped as that step groups them. UserError for damaged records.
    """
    step = len(task.steps) - 1 if config.task.name == "joint" else config.task.step
    folder = config.step_dir()
    metrics = read_results(folder)
    if metrics is None:
        raise UserError(f"cannot read the results in {folder}: train the step anew")
    found = metrics["Mean_Intersection_over_Union"]
    iou = found["by_class"]
    return {
        "method": method,
        "task": task.name,
        "setting": task.setting,
        "seed": seed,
        "step": step,
        "val_images": val_images(folder),
        **group_means(iou, task, step),
        **_cost(config.step_dir(kind="log") / "metrics.jsonl"),
        **_memory(folder / "memory"),
        "without_images": "; ".join(found.get("without_images", ())),
        "test": how_tested(config.data),
        # in the data set's order, not in the task's
        **{class_column(name): iou.get(name) for name in ("background", *config.data.dataset.classes)},
    }


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
    if not (folder / MANIFEST).is_file():
        return {}
    entries = read_manifest(folder)["entries"]
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"memory_entries": len(entries), "memory_bytes": size}


def write_results(path: Path, rows: list[dict]) -> None:
    """Write results.csv, whole or not at all. What a row lacks, or has as None, is an empty cell."""
    text = io.StringIO(newline="")
    classes = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    writer = csv.DictWriter(text, [*COLUMNS, *classes], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def keep_former(path: Path, rows: list[dict]) -> Path | None:
    """Keep a table with rows of steps that `rows`, which will be written in its place, lack.

    Returns where it lies then, None where nothing would be lost.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            former = {_step_of(cells) for cells in csv.DictReader(file)}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (UnicodeDecodeError, csv.Error):
        former = {None}  # what cannot be read is kept
    if former <= {_step_of(row) for row in rows}:
        return None
    numbers = (path.with_name(f"{path.stem}_until_{n}{path.suffix}") for n in itertools.count(1))
    kept = next(place for place in numbers if not place.exists())
    path.replace(kept)
    return kept


def _step_of(row):
    return tuple(str(row.get(column)) for column in ("method", "task", "setting", "seed", "step"))


@dataclass(frozen=True)
class Comparison:
    """The runs of one task and setting, in the order of results.csv.

    runs: method -> seeds -> steps -> row. Only runs that reached the last step are here, and they have
        all steps; a method that learns all classes at once (joint) has only the last.
    unfinished: the other runs, in words.
    val_images, test: number of validation images and how the models are tested on them; None and ""
        if they differ between rows, or are not known.
    without_images: classes whose IoU is 0 through no error of a model, since no image shows them, in
        the last step of any of the runs.
    """

    task: Task
    runs: dict[str, list[list[dict]]]
    unfinished: list[str]
    val_images: float | None
    test: str
    without_images: list[str]

    @property
    def last(self) -> int:
        """The last step."""
        return len(self.task.steps) - 1

    @property
    def incremental(self) -> list[str]:
        """Methods that learn step by step."""
        return [method for method, seeds in self.runs.items() if len(seeds[0]) > 1]

    def values(self, method: str, column: str) -> np.ndarray:
        """A column of numbers: float64 [seeds, steps], NaN where the cell is empty."""
        return np.array([[row[column] for row in steps] for steps in self.runs[method]])

    def class_iou(self, method: str, step: int) -> np.ndarray:
        """IoU of background and the classes seen at a step, in learning order.

        Returns float64 [seeds, steps, classes], NaN before a class is learned.
        """
        names = self.task.class_names(step)
        return np.stack([self.values(method, class_column(name)) for name in names], axis=-1)

    def forgetting(self, method: str) -> np.ndarray:
        """Best IoU over the steps minus that of the last step: float64 [seeds, classes].

        The classes are those learned before the last step, in learning order, without background.
        method: one of `incremental`.
        """
        iou = self.class_iou(method, self.last - 1)[:, :, 1:]
        return np.fmax.reduce(iou, axis=1) - iou[:, -1]


def _number(text):
    """The number in a cell, NaN for an empty one; ValueError if it is no number or not finite."""
    number = float(text) if text else math.nan
    if text and not math.isfinite(number):
        raise ValueError
    return number


def _read_row(place, cells):
    """A row with its cells as texts, integers and numbers."""
    if None in cells or None in cells.values():
        raise UserError(f"{place} has more or fewer cells than the header")
    row = {column: cells.get(column, "") for column in TEXTS}
    for column in [column for column in cells if column not in TEXTS]:
        try:
            row[column] = int(cells[column]) if column in INTEGERS else _number(cells[column])
        except ValueError:
            kind = "an integer" if column in INTEGERS else "a number"
            message = f"{place}, column {column}: {cells[column]!r} is not {kind}"
            raise UserError(message) from None
    return row


def _read_rows(path):
    """The rows of a results.csv, each with its file and line as text for error messages, and the
    classes of their data set, numbered in the order of the columns.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            known = (*(reader.fieldnames or ()), *TEXTS[3:])
            missing = [column for column in COLUMNS if column not in known]
            if reader.fieldnames and missing:
                raise UserError(f"{path} lacks the columns {', '.join(missing)}")
            rows = []
            columns = [column for column in reader.fieldnames or () if column not in COLUMNS]
            for cells in reader:
                place = f"{path}, line {reader.line_num}"
                rows.append((place, _read_row(place, cells)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not rows:
        raise UserError(f"{path} is empty: it has no row of results")
    names = (column.removesuffix(" (class)") for column in columns)
    return rows, {name: number for number, name in enumerate(names, start=1)}


def _compare(task, methods):
    """The comparison of a task. methods: method -> seed -> step -> row."""
    total = len(task.steps)
    runs, unfinished, tests = {}, [], set()
    for method, seeds in methods.items():
        at_once = all(list(steps) == [total - 1] for steps in seeds.values())
        needed = [total - 1] if at_once else range(total)
        for seed, steps in seeds.items():
            tests |= {(row["val_images"], row["test"]) for row in steps.values()}
            if all(step in steps for step in needed):
                runs.setdefault(method, []).append([steps[step] for step in needed])
            else:
                unfinished.append(f"{method} seed {seed} ({len(steps)} of {total} steps)")
    last = [steps[-1]["without_images"].split("; ") for seeds in runs.values() for steps in seeds]
    lacking = [name for name in task.class_names(total - 1) if any(name in names for names in last)]
    images, test = tests.pop() if len(tests) == 1 else (None, "")
    return Comparison(task, runs, unfinished, images, test, lacking)


def read_comparisons(path: Path) -> list[Comparison]:
    """A comparison for each task and setting of a results.csv; UserError naming what is wrong in it."""
    tasks = {}
    rows, classes = _read_rows(path)
    for place, row in rows:
        try:
            task = get_task(row["task"], row["setting"], classes)
            check_step(task, row["step"])
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        methods = tasks.setdefault(task, {})
        steps = methods.setdefault(row["method"], {}).setdefault(row["seed"], {})
        if row["step"] in steps:
            raise UserError(f"{place}: this method, seed and step have a row already")
        steps[row["step"]] = row
    return [_compare(task, methods) for task, methods in tasks.items()]
