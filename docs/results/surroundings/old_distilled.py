"""Train a step of EIR in which background without a label says nothing against the old classes.

python docs/results/surroundings/old_distilled.py -c configs/config_photographs.json \
    --rskd_region all --surroundings 0.25 ...

The flags are those of train_voc.py. As in DKD, the channels of the old classes have no BCE there; only
the distillation holds them. Labels, pseudo labels and pasted instances count in all channels, as ever.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import utils.program  # noqa: F401

import torch.nn.functional as F

import trainer.incremental
from configs.options import parse_train
from data_loader.tasks import task_of
from models.losses import bce_sum
from trainer.run import train
from utils.distributed import launch


def main() -> None:
    config, call = parse_train(sys.argv[1:])
    task = task_of(config.data)
    new = 1 + len(task.seen(config.task.step - 1))

    def without_old(logits, labels, classes, weights, pos_weight):
        """models.losses.bce_sum without the old classes' channels where there is background alone."""
        free = (labels == 0) & (weights.sum(dim=0) == 0)
        unknown = (F.softplus(logits[1:new]).sum(dim=0) * free).sum()
        return bce_sum(logits, labels, classes, weights, pos_weight) - unknown

    trainer.incremental.bce_sum = without_old
    launch(train, config, call)


if __name__ == "__main__":
    main()
