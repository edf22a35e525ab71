"""Finished runs of one task, method by method, as arrays read from results.csv."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_loader.tasks import CLASS_NAMES, Task, check_step, get_task
from utils.errors import UserError

TEXTS = ("method", "task", "setting")
INTEGERS = ("seed", "step", "val_images")
NUMBERS = ("old", "new", "all", "hIoU", "seconds", "memory_bytes", *CLASS_NAMES)


@dataclass(frozen=True)
class Comparison:
    """The runs of one task and setting that reached its last step.

    runs: method -> float64 [seeds, steps, NUMBERS], NaN where undefined. A method that learns all
        classes at once (joint) has the last step only.
    unfinished: the other runs, in words.
    val_images: number of images of the validation list; None if that differs between rows.
    """

    task: Task
    runs: dict[str, np.ndarray]
    unfinished: list[str]
    val_images: int | None

    @property
    def last(self) -> int:
        """The last step."""
        return len(self.task.steps) - 1

    @property
    def incremental(self) -> list[str]:
        """Methods that learn step by step."""
        return [method for method, values in self.runs.items() if values.shape[1] > 1]

    def values(self, method: str, name: str) -> np.ndarray:
        """One of NUMBERS over seeds and steps: [seeds, steps]."""
        return self.runs[method][:, :, NUMBERS.index(name)]

    def iou(self, method: str, step: int) -> np.ndarray:
        """IoU: background, then classes seen at a step, in learning order: [seeds, steps, classes]."""
        names = self.task.class_names(step)
        return self.runs[method][:, :, [NUMBERS.index(name) for name in names]]

    def forgetting(self, method: str) -> np.ndarray:
        """Best IoU over the steps minus the last: [seeds, classes].

        Classes are those learned before the last step, in learning order; none if there is one step.
        """
        iou = self.iou(method, self.last - 1)[:, :, 1:]
        if iou.shape[1] == 1:
            return iou[:, -1, :0]
        return np.fmax.reduce(iou, axis=1) - iou[:, -1]


def read_comparisons(path: Path) -> list[Comparison]:
    """A comparison for each task and setting of a results.csv; UserError naming what is wrong in it."""
    groups = {}
    for line, row in _read_rows(path):
        try:
            task = get_task(row["task"], row["setting"])
            check_step(task, row["step"])
        except UserError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
        methods, val_images = groups.setdefault(task, ({}, set()))
        val_images.add(row["val_images"])
        steps = methods.setdefault(row["method"], {}).setdefault(row["seed"], {})
        if row["step"] in steps:
            raise UserError(f"{path}, line {line}: this method, seed and step have a row already")
        steps[row["step"]] = [row[name] for name in NUMBERS]
    return [_compare(task, *group) for task, group in groups.items()]


def _compare(task, methods, val_images):
    """methods: method -> seed -> step -> numbers; val_images: set of their numbers."""
    total = len(task.steps)
    runs, unfinished = {}, []
    for method, seeds in methods.items():
        at_once = all(list(steps) == [total - 1] for steps in seeds.values())
        needed = [total - 1] if at_once else range(total)
        finished = []
        for seed, steps in seeds.items():
            if all(step in steps for step in needed):
                finished.append([steps[step] for step in needed])
            else:
                unfinished.append(f"{method} seed {seed} ({len(steps)} of {total} steps)")
        if finished:
            runs[method] = np.array(finished)
    return Comparison(task, runs, unfinished, val_images.pop() if len(val_images) == 1 else None)


def _read_rows(path):
    """Line number and row of each line below the header."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [c for c in (*TEXTS, *INTEGERS, *NUMBERS) if c not in (reader.fieldnames or ())]
            if reader.fieldnames and missing:
                raise UserError(f"{path} lacks the columns {', '.join(missing)}")
            rows = [(reader.line_num, _row(path, reader.line_num, cells)) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not rows:
        raise UserError(f"{path} is empty: it has no row of results")
    return rows


def _row(path, line, cells):
    if None in cells or None in cells.values():
        raise UserError(f"{path}, line {line} has more or fewer cells than the header")
    row = {column: cells[column] for column in TEXTS}
    for column in (*INTEGERS, *NUMBERS):
        try:
            row[column] = _number(cells[column], column in INTEGERS)
        except ValueError:
            kind = "an integer" if column in INTEGERS else "a number"
            message = f"{path}, line {line}, column {column}: {cells[column]!r} is not {kind}"
            raise UserError(message) from None
    return row


def _number(text, integer):
    """The number in a cell, NaN for an empty one; ValueError if it is none."""
    if integer:
        return int(text)
    number = float(text) if text else math.nan
    if text and not math.isfinite(number):
        raise ValueError
    return number
