"""Train a step with the memory of an image replay's step, its images shown in another way.

python docs/results/surroundings/variants.py grey RUN 2 -c configs/config_photographs_animals.json ...

RUN is the folder of a run with --replay image that has reached the step, whose number is the third
argument; what follows are flags of train_voc.py. The step starts from RUN's model of the step
before, and replays the same images as RUN did: whole (image); whole, with their unlabelled pixels
void (void); only the pixels of their objects, on grey (grey), so and pasted besides (paste), with a
margin of a quarter of their box around them (box), or on a new image (on-image).
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import utils.program  # noqa: F401

import numpy as np
import torch

from configs.options import parse_train
from data_loader.dataset import TrainDataset
from data_loader.memory import FILL, Memory, bounding_box
from data_loader.paste import Bank, PasteAugmentation
from trainer.incremental import IncrementalStep
from trainer.run import train
from utils.distributed import launch
from utils.visualize import VOID

whole = Memory.replay


def objects(label):
    """Where a label map shows a class: bool [H, W]."""
    return (label > 0) & (label != VOID)


def void(memory, i):
    image, label = whole(memory, i)
    return image, torch.where(label == 0, VOID, label)


def grey(memory, i, margin=None):
    image, label = whole(memory, i)
    shown = objects(label)
    if margin is not None:
        rows, columns = bounding_box(shown.numpy())
        height, width = (int(margin * (part.stop - part.start)) for part in (rows, columns))
        shown = torch.zeros_like(shown)
        rows = slice(max(rows.start - height, 0), rows.stop + height)
        shown[rows, max(columns.start - width, 0) : columns.stop + width] = True
    fill = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
    return torch.where(shown, image, fill), label


def box(memory, i):
    return grey(memory, i, 0.25)


def on_new_images():
    """Let the objects of a replayed image stand on a random image of the step."""
    sample = TrainDataset.__getitem__

    def composed(dataset, key):
        epoch, i = key
        above = sample(dataset, key)
        if above["replayed"]:
            generator = np.random.default_rng((dataset.seed, epoch, i, 7))
            below = sample(dataset, (epoch, int(generator.integers(len(dataset.images)))))
            shown = objects(above["label"])
            for part in ("image", "label"):
                above[part] = torch.where(shown, above[part], below[part])
        return above

    TrainDataset.__getitem__ = composed


def with_pastes():
    """Paste from the memory of images as EIR does from one of instances."""
    make = IncrementalStep.training_set

    def training_set(step):
        samples = make(step)
        bank = Bank(samples.memory, 1 + sum(step.teacher.classes), step.device)
        crop = step.config.data.train.args.transform_args.crop_size
        step.paste = PasteAugmentation(step.config.hyperparameter.paste, crop, bank, step.config.seed)
        return samples

    IncrementalStep.training_set = training_set


def main() -> None:
    variant, run, step, *flags = sys.argv[1:]
    if variant == "on-image":
        on_new_images()
    else:
        ways = {"image": whole, "void": void, "grey": grey, "box": box, "paste": grey}
        Memory.replay = ways[variant]
    if variant == "paste":
        with_pastes()
    before = max(Path(run, f"step_{int(step) - 1}").glob("checkpoint-epoch*.pth"), key=os.path.getmtime)
    flags += ["--task_step", step, "--name", variant, "--replay", "image", "--num_workers", "0"]
    launch(train, *parse_train([*flags, "--prev_checkpoint", str(before)]))


if __name__ == "__main__":
    main()
