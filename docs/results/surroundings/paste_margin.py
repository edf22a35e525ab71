"""Train a step of EIR whose instances are pasted with their surroundings, as background.

python docs/results/surroundings/paste_margin.py -c configs/config_photographs_animals.json \
    --surroundings 0.25 ...

The flags are those of train_voc.py. What is stored of an instance is pasted as one rectangle; its class
has the pixels of the class, and the background has the rest.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import utils.program  # noqa: F401

import numpy as np
import torch

import trainer.incremental
from configs.options import parse_train
from data_loader.paste import Bank, PasteAugmentation
from scripts.plain import plain_bce, plain_soft_labels
from trainer.run import train
from utils.distributed import launch

bank_of_objects, fuse_objects = Bank.__init__, PasteAugmentation.fuse


def bank_of_rectangles(bank, memory, channels, device):
    """All that is stored of an entry is its region; `object` has the pixels of the class."""
    objects = [label == c for label, c in zip(memory.labels, memory.drawn_for, strict=True)]
    labels = memory.labels
    memory.labels = [np.full_like(x, c) for x, c in zip(labels, memory.drawn_for, strict=True)]
    bank_of_objects(bank, memory, channels, device)
    memory.labels = labels
    bank.object = torch.from_numpy(np.concatenate([x.ravel() for x in objects])).to(device)


def fuse(paste, images, plan):
    """The composite, with K more pastes: the background's shares of the same rectangles."""
    composite = fuse_objects(paste, images, plan)
    bank = paste.bank
    region, bank.of_class = bank.of_class, bank.object
    shown = torch.zeros_like(composite.weights, dtype=torch.bool)
    cells, batch = paste.cells(shown), torch.arange(len(images), device=images.device)
    for k in range(shown.shape[1]):
        at = batch, plan.cell[:, k] // paste.grid, plan.cell[:, k] % paste.grid, k
        cells[at] = paste.sample(plan, k)[1]
    bank.of_class = region
    weights = torch.cat([composite.weights * shown, composite.weights * ~shown], dim=1)
    classes = torch.cat([plan.classes, torch.zeros_like(plan.classes)], dim=1)
    return replace(composite, classes=classes, weights=weights)


def bce_sum(logits, labels, classes, weights, pos_weight):
    """models.losses.bce_sum where pastes of the background have no pos_weight, by the plain one."""
    image = logits[None], labels[None], classes[None], weights[None]
    soft = plain_soft_labels(*image[1:], len(logits))
    return plain_bce(image[0], soft, image[1], pos_weight).sum()


def main() -> None:
    Bank.__init__, PasteAugmentation.fuse = bank_of_rectangles, fuse
    trainer.incremental.bce_sum = bce_sum
    launch(train, *parse_train(sys.argv[1:]))


if __name__ == "__main__":
    main()
