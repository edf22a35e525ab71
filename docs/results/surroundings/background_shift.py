"""How much of what is unlabelled in the training images of a step shows an old class (overlap).

python docs/results/surroundings/background_shift.py -c configs/config_photographs_animals.json

The flags are those of train_voc.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import utils.program  # noqa: F401

from configs.options import parse_train
from data_loader.data_root import DataRoot
from data_loader.tasks import get_task

if __name__ == "__main__":
    data = parse_train(sys.argv[1:])[0].data
    task = get_task(data.task.name, "overlap", data.dataset.classes)
    root = DataRoot(data.data_root, description=data.dataset)
    index = root.index(root.read_list("train"), 2)
    for step in range(1, len(task.steps)):
        pixels = index.pixels[task.select(step, "train", index.present)]
        old, new = (pixels[:, c].sum() for c in (task.seen(step - 1), task.steps[step]))
        print(step, f"{100 * old / (pixels.sum() - new):.1f} %")  # void is not counted
