"""Tasks: which classes come in which step, and what a step sees of an image's label.

Pure: names, tuples and arrays, no files. Classes are ids as in the label maps of the data set;
*channels* number them in learning order, so that logit channel k belongs to the k-th class learned and
0 to the background.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from configs.options import SETTINGS, VOC_CLASSES, DataArgs
from utils.errors import UserError
from utils.visualize import VOID

ALIASES_OF_5_3 = ("5-3-60", "5-3-140", "5-3-180")
PUBLISHED = (
    "19-1", "15-5", "15-1", "10-1", "10-5", "10-10", "5-3", "100-50", "100-10", "100-5", "50-50"
)  # fmt: skip

# Class orders of the tasks 15-1_b .. 15-1_w of twenty classes, as places in the learning order.
ORDERS = {
    "b": "12 9 20 7 15 8 14 16 5 19 4 1 13 2 11 17 3 6 18 10",
    "c": "13 19 15 17 9 8 5 20 4 3 10 11 18 16 7 12 14 6 1 2",
    "d": "15 3 2 12 14 18 20 16 11 1 19 8 10 7 17 6 5 13 9 4",
    "e": "7 5 3 9 13 12 14 19 10 2 1 4 16 8 17 15 18 6 11 20",
    "f": "7 13 5 11 9 2 15 12 14 3 20 1 16 4 18 8 6 10 19 17",
    "g": "7 5 9 1 15 18 14 3 20 10 4 19 11 17 16 12 8 6 2 13",
    "h": "12 9 19 6 4 10 5 18 14 15 16 3 8 7 11 13 2 20 17 1",
    "i": "13 10 15 8 7 19 4 3 16 12 14 11 5 20 6 2 18 9 17 1",
    "j": "1 14 9 5 2 15 8 20 6 16 18 7 11 10 19 3 4 17 12 13",
    "k": "16 13 1 11 12 18 6 14 5 3 7 9 20 19 15 4 2 10 8 17",
    "l": "10 7 6 19 16 8 17 1 14 4 9 3 15 11 12 2 18 20 13 5",
    "m": "18 4 14 17 12 10 7 3 9 1 8 15 6 13 2 5 11 20 16 19",
    "n": "5 4 13 18 14 10 19 15 7 9 3 2 8 16 20 1 12 11 6 17",
    "o": "9 12 13 18 7 1 15 17 10 8 4 5 20 16 6 14 19 11 2 3",
    "p": "9 12 13 18 2 11 15 17 10 8 4 5 20 16 6 14 19 1 7 3",
    "q": "3 14 13 18 2 11 15 17 10 8 4 5 20 16 6 12 19 1 7 9",
    "r": "3 14 13 1 2 11 15 17 7 8 4 5 9 16 19 12 6 18 10 20",
    "s": "3 14 6 1 2 11 12 17 7 20 4 5 9 16 19 15 13 18 10 8",
    "t": "3 15 13 1 2 11 18 17 7 20 8 5 9 16 19 14 6 12 10 4",
    "u": "3 15 13 14 6 11 18 17 7 20 8 4 9 16 10 1 2 12 19 5",
    "v": "1 2 12 14 6 19 18 17 5 20 8 4 9 16 10 3 15 13 11 7",
    "w": "1 2 12 14 13 19 18 7 11 20 8 4 9 16 10 3 15 6 5 17",
}


@dataclass(frozen=True)
class Task:
    """A task: its steps' classes in learning order, its setting, and the names of all classes."""

    name: str
    setting: str
    steps: tuple[tuple[int, ...], ...]
    names: tuple[tuple[int, str], ...]

    @property
    def order(self) -> tuple[int, ...]:
        """All classes in learning order: channel k is order[k - 1]."""
        return self.seen(len(self.steps) - 1)

    def seen(self, step: int) -> tuple[int, ...]:
        """Classes of steps 0..step, in learning order; none for step -1."""
        return tuple(c for classes in self.steps[: step + 1] for c in classes)

    def channels(self, step: int) -> list[int]:
        """Channels of the classes of one step."""
        first = len(self.seen(step - 1)) + 1
        return list(range(first, first + len(self.steps[step])))

    def class_names(self, step: int) -> list[str]:
        """Names by channel, background first, of all classes seen at a step."""
        return ["background", *self.named(self.seen(step))]

    def groups(self, step: int) -> tuple[list[int], list[int]]:
        """Channels reported as old (background and the classes of step 0) and as new (all others)."""
        first, seen = 1 + len(self.steps[0]), 1 + len(self.seen(step))
        return list(range(first)), list(range(first, seen))

    def named(self, classes: Iterable[int]) -> list[str]:
        """Names of classes."""
        names = dict(self.names)
        return [names[c] for c in classes]

    def visible(self, step: int, split: str) -> tuple[int, ...]:
        """Classes whose labels are shown: C^0..C^t, but C^t alone in training (not in sequential)."""
        hides = split == "train" and self.setting != "sequential"
        return self.steps[step] if hides else self.seen(step)

    def label_table(self, visible: tuple[int, ...], hidden: int = 0) -> np.ndarray:
        """Table uint8 [256] from ids in label maps to channels.

        visible: the classes that get their channel; all other classes get `hidden`. Void stays, and
        what is no class of the task is background.
        """
        table = np.zeros(256, dtype=np.uint8)
        table[list(self.order)], table[VOID] = hidden, VOID
        for c in visible:
            table[c] = self.order.index(c) + 1
        return table

    def select(self, step: int, split: str, present: np.ndarray) -> np.ndarray:
        """Indices of the images of a step.

        present: bool [images, ids], true where an image shows a class, of all labels.
        Train and val: images that show a class of C^t (disjoint and sequential: and, for train,
        no class of a later step). Test: images that show a class of C^0..C^t.
        """
        shown = self.seen(step) if split == "test" else self.steps[step]
        chosen = present[:, list(shown)].any(axis=1)
        if split == "train" and self.setting != "overlap":
            later = [c for c in self.order if c not in self.seen(step)]
            chosen &= ~present[:, later].any(axis=1)
        return np.flatnonzero(chosen)


def task_of(data: DataArgs) -> Task:
    """The task of a configuration (its part `data_loader.args`); UserError as get_task."""
    return get_task(data.task.name, data.task.setting, data.dataset.classes)


def get_task(name: str, setting: str, classes: dict[str, int] | None = None) -> Task:
    """The task of that name, or UserError saying which exist.

    classes: names and ids of the data set's classes in learning order, as configs.options.DataSet has
    them; None: those of VOC 2012.
    Names: A-B (A classes first, then B at a time, up to all), joint; and where there are twenty classes
    15-1_b .. 15-1_w, and 5-3-60, 5-3-140, 5-3-180, which the release's data_loader/task.py defines as
    5-3.
    """
    if setting not in SETTINGS:
        raise UserError(f"unknown setting {setting!r}: choose {', '.join(SETTINGS)}")
    classes = VOC_CLASSES if classes is None else classes
    ids = list(classes.values())
    parsed = _parse(name, len(ids))
    if parsed is None:
        examples = [example for example in PUBLISHED if _parse(example, len(ids))]
        examples += [f"an A-B where B divides {len(ids)}-A"]
        examples += ["15-1_b .. 15-1_w"] if len(ids) == len(ORDERS["b"].split()) else []
        raise UserError(f"unknown task {name!r}: choose {', '.join(examples)}, or joint")
    order, sizes = parsed
    steps, start = [], 0
    for size in sizes:
        steps.append(tuple(ids[place - 1] for place in order[start : start + size]))
        start += size
    names = tuple((number, of) for of, number in classes.items())
    return Task(name, setting, tuple(steps), names)


def _parse(name, total):
    """Places of the classes in learning order, and how many each step learns; None if there is no such
    task of `total` classes.
    """
    order = list(range(1, total + 1))
    if name == "joint":
        return order, [total]
    name = "5-3" if name in ALIASES_OF_5_3 else name
    match = re.fullmatch(r"([1-9][0-9]{0,2})-([1-9][0-9]{0,2})(?:_([b-w]))?", name)
    if not match:
        return None
    base, increment = int(match[1]), int(match[2])
    if match[3]:
        order = [int(place) for place in ORDERS[match[3]].split()]
        if (base, increment) != (15, 1) or len(order) != total:
            return None
    left = total - base
    if left < increment or left % increment:
        return None
    return order, [base] + [increment] * (left // increment)


def check_step(task: Task, step: int) -> None:
    """Raise UserError if the task has no such step."""
    if not 0 <= step < len(task.steps):
        raise UserError(
            f"task {task.name} has no step {step}: its steps are 0 to {len(task.steps) - 1}"
        )
