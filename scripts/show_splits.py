"""Show which images each step of a task trains, validates and tests on.

python scripts/show_splits.py --data_root data/VOC2012 --task_name 15-1
python scripts/show_splits.py -c configs/config_ade.json --task_name 100-10 --json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.program

from configs.options import DEFAULT_CONFIG, load_config
from data_loader.data_loaders import cores
from data_loader.data_root import DataRoot
from data_loader.tasks import SETTINGS, Task, get_task
from scripts.command_line import Parser
from utils.errors import UserError, exit_with

SPLITS = {"train": "train", "val": "val", "test": "val"}  # split -> the list it is chosen from


def read_splits(root: DataRoot, task: Task, allow_val_in_train: bool = False) -> list[dict]:
    """Per step: `step`, `classes` (their ids), ids of `train`, `val` and `test`, and `shown`.

    `shown`: class -> number of the step's training images that show it.
    Raises UserError for lists and labels that cannot be read, and for images of val in train unless
    allow_val_in_train.
    """
    lists = root.read_lists(allow_val_in_train)
    present = {name: root.index(images, cores()).present for name, images in lists.items()}
    steps = []
    for step, classes in enumerate(task.steps):
        chosen = {split: task.select(step, split, present[name]) for split, name in SPLITS.items()}
        ids = {split: [lists[SPLITS[split]].ids[i] for i in rows] for split, rows in chosen.items()}
        counts = present["train"][chosen["train"]].sum(axis=0)
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
    parser = Parser(__doc__)
    of_it = "(that of the configuration)"
    parser.add_argument(
        "-c",
        "--config",
        type=utils.program.a_path,
        default=DEFAULT_CONFIG,
        help="JSON configuration of the data",
    )
    parser.add_argument(
        "--data_root", type=utils.program.a_path, help=f"folder of the data set {of_it}"
    )
    parser.add_argument("--task_name", help=f"task {of_it}")
    parser.add_argument("--task_setting", help=f"{', '.join(SETTINGS)} {of_it}")
    parser.add_argument(
        "--idxs_path",
        type=utils.program.a_path,
        help=f"folder of the label index {of_it}",
    )
    parser.add_argument(
        "--allow_val_in_train", choices=("on", "off"), help=f"images in both lists {of_it}"
    )
    parser.add_argument("--json", action="store_true", help="all image ids, as JSON")
    args = parser.parse_args(argv)
    try:
        data = load_config(args.config)[0].data
        name = data.task.name if args.task_name is None else args.task_name
        setting = data.task.setting if args.task_setting is None else args.task_setting
        task = get_task(name, setting, data.dataset.classes)
        index = args.idxs_path or data.task.idxs_path
        root = DataRoot(args.data_root or data.data_root, index, data.dataset)
        allowed = args.allow_val_in_train
        steps = read_splits(root, task, data.allow_val_in_train if allowed is None else allowed == "on")
    except UserError as error:
        exit_with(error)
    print((format_json if args.json else format_table)(task, steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
