"""Train a step of EIR with fewer pastes, or with others.

python docs/results/surroundings/fewer_pastes.py 0.25 -c configs/config_photographs.json ...
python docs/results/surroundings/fewer_pastes.py behind -c configs/config_photographs.json ...

The first argument is the share of the images that is pasted into, drawn anew in each epoch; behind: all
are, but what a new image shows of its labelled classes stays; void: all are, but on new images nothing
counts where an instance lies. What follows are flags of train_voc.py.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import utils.program  # noqa: F401

import torch

from configs.options import parse_train
from data_loader.paste import Composite, PasteAugmentation
from trainer.run import train
from utils.distributed import launch
from utils.visualize import VOID

plan_all, paste_over = PasteAugmentation.plan, PasteAugmentation.__call__


def plan_some(share):
    def plan(paste, given, labels, views, numbers, replayed):
        found = plan_all(paste, given, labels, views, numbers, replayed)
        # with a position by background, nothing else reads the cells' random numbers
        return replace(found, used=found.used & (numbers["cells"][:, :1] < share))

    return plan


def paste_behind(paste, images, given, labels, epoch, indices, replayed):
    over = paste_over(paste, images, given, labels, epoch, indices, replayed)
    kept = ((given > 0) & (given != VOID))[:, None] & ~replayed[:, None, None, None]
    return Composite(torch.where(kept, images, over.images), over.classes, over.weights * ~kept)


def paste_void(paste, images, given, labels, epoch, indices, replayed):
    over = paste_over(paste, images, given, labels, epoch, indices, replayed)
    covered = (over.weights.sum(dim=1) > 0) & ~replayed[:, None, None]
    given[covered], labels[covered] = VOID, VOID  # those of the batch, which its losses read later
    return over


def main() -> None:
    if sys.argv[1] in ("behind", "void"):
        PasteAugmentation.__call__ = paste_behind if sys.argv[1] == "behind" else paste_void
    else:
        PasteAugmentation.plan = plan_some(float(sys.argv[1]))
    launch(train, *parse_train(sys.argv[2:]))


if __name__ == "__main__":
    main()
