"""Show which images each step of a task trains, validates and tests on.

python scripts/show_splits.py --data_root data/VOC2012 --task_name 15-1
python scripts/show_splits.py -c configs/config_ade.json --task_name 100-10 --json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.program  # noqa: F401

from configs.options import parse_train
from data_loader.data_loaders import StepData
from data_loader.tasks import Task
from utils.config import Parser

SPLITS = ("train", "val", "test")


def read_splits(data: StepData) -> list[dict]:
    """Per step: `step`, `classes` (their ids), ids of `train`, `val` and `test`, and `shown`.

    `shown`: class -> number of the step's training images that show it.
    """
    steps = []
    for step, classes in enumerate(data.task.steps):
        chosen = {split: data.select(split, step) for split in SPLITS}
        ids = {split: [data.lists[split].ids[i] for i in rows] for split, rows in chosen.items()}
        counts = data.indices["train"].present[chosen["train"]].sum(axis=0)
        shown = {c: int(counts[c]) for c in classes}
        steps.append({"step": step, "classes": list(classes), **ids, "shown": shown})
    return steps


def format_json(task: Task, steps: list[dict]) -> str:
    """The splits as JSON: task, setting, and per step its classes and the ids of its splits."""
    keys = ("step", "classes", *SPLITS)
    rows = [{key: step[key] for key in keys} for step in steps]
    return json.dumps({"task": task.name, "setting": task.setting, "steps": rows})


def format_table(task: Task, steps: list[dict]) -> str:
    """A table for people: images of each split, and training images of each class."""
    lines = [
        f"task {task.name}, {task.setting}: images of each step, and training images of each class",
        "",
        f"{'step':>4}{'train':>8}{'val':>8}{'test':>8}  classes",
    ]
    for step in steps:
        sizes = "".join(f"{len(step[split]):>8}" for split in SPLITS)
        counts = zip(task.named(step["shown"]), step["shown"].values(), strict=True)
        names = [f"{name} {count}" for name, count in counts]
        for row in range(0, len(names), 5):
            head = f"{step['step']:>4}{sizes}" if row == 0 else " " * 28
            lines.append(f"{head}  {', '.join(names[row : row + 5])}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(None, __doc__, epilog="further flags are those of train_voc.py")
    parser.add_argument("--json", action="store_true", help="all image ids, as JSON")
    args, rest = parser.parse_known_args(argv)
    config, call = parse_train(rest, program=parser.prog)
    if call.ignored or call.unused:
        print(f"warning: without effect: {', '.join(call.ignored + call.unused)}", file=sys.stderr)
    config.task.step = 0  # all steps are shown
    data = StepData(config)
    steps = read_splits(data)
    print((format_json if args.json else format_table)(data.task, steps))
    lacking = [c for step in steps for c, images in step["shown"].items() if not images]
    if lacking:
        names = ", ".join(data.task.named(lacking))
        print(f"warning: no training image shows {names}: are their ids right?", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
